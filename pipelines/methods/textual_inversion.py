"""Textual Inversion: a subject as the row of one new word, everything else frozen.

Paper: Gal et al., "An Image is Worth One Word", ICLR 2023, arXiv:2208.01618.

    v* = argmin_v  E |e - e_θ(z_t, t, c_θ(y))|^2        (eq. 2; y one of the templates with the new word in it)

Departures from the released code: with `with_noun` the prompt reads "<new word> cat", as follow-ups do (the paper has
the new word stand alone); several tokens start at one place and are told apart by their positions alone; the gradient
can be clipped; a batch is one batch, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.concept import Subject
from pipelines.methods import Stage
from pipelines.params import TrainParams
from pipelines.templates import TEMPLATES, filled

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.batch import Batch
    from pipelines.learned_tokens import LearnedTokens
    from pipelines.model import Model

name = "textual_inversion"
title = "Textual Inversion"
paper = "https://arxiv.org/abs/2208.01618"


class Params(TrainParams):
    """The defaults are the published ones."""

    steps: int = Field(5000, ge=1, le=100_000, description="Training steps")
    batch_size: int = Field(4, ge=1, le=256, description="Photos a step (all processes together)")
    lr: float = Field(5e-3, gt=0, le=1, description="Learning rate of the new tokens")
    max_grad_norm: float = Field(0.0, ge=0, description="Gradient clipping (0 = off)")
    tokens: int = Field(1, ge=1, le=16, description="New tokens for each subject")
    start_word: str = Field("", max_length=100, description="Word the tokens start from (empty = the noun)")
    with_noun: bool = Field(False, description="Let the noun follow the new tokens in a prompt")
    prompt: Literal["templates", "captions"] = Field(
        "templates", description="What it reads while it learns: the 27 templates, or the photos' captions"
    )


def stages(params: Params) -> Sequence[Stage]:
    """One stage."""
    return (Stage("tokens", params.steps, params.batch_size, params.weight_decay, params.max_grad_norm),)


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[Tokens]:
    """Each subject's new tokens in the table, and its `<name>` meaning them."""
    from pipelines.learned_tokens import learned_tokens

    with learned_tokens(
        model, subjects, count=params.tokens, start=params.start_word, with_noun=params.with_noun
    ) as learned:
        yield Tokens(learned, params, subjects)


def loss(model: Model, adapter: Tokens, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """Denoising, with a template or the photo's caption as the prompt."""
    from pipelines.losses import denoising_loss

    text = model.encode(adapter.prompts(batch))
    return denoising_loss(model, adapter, batch, adapter.params, text)


class Tokens:
    """The adapter: learned tokens and what they are trained with."""

    def __init__(self, learned: LearnedTokens, params: Params, subjects: Sequence[Subject]) -> None:
        self.learned = learned
        self.params = params
        self.subjects = tuple(subjects)

    @property
    def strength(self) -> float:
        return self.learned.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.learned.strength = value

    def param_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """The new rows of every text encoder."""
        return [{"params": self.learned.parameters(), "lr": self.params.lr}]

    def tensors(self) -> dict[str, Tensor]:
        return self.learned.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.learned.load(tensors)

    def bake(self) -> None:
        self.learned.bake()

    def prompts(self, batch: Batch) -> list[str]:
        """What each row's text is. A row's random timestep also draws its template; class pictures keep their words."""
        if self.params.prompt == "captions":
            return list(batch.captions)
        rows = zip(batch.captions, batch.timesteps.tolist(), batch.prior.tolist(), strict=True)
        return [caption if prior else self._templated(caption, t) for caption, t, prior in rows]

    def _templated(self, caption: str, timestep: int) -> str:
        said = [subject.token for subject in self.subjects if subject.token in caption]
        return filled(TEMPLATES[timestep % len(TEMPLATES)], " and ".join(said))[0]
