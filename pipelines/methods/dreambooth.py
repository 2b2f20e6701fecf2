"""DreamBooth: the weights learn that a rare word before the noun means this one subject.

Paper: Ruiz et al., "DreamBooth", CVPR 2023, arXiv:2208.12242.

    E |x̂_θ(a_t x + s_t e, c) - x|^2  +  λ E |x̂_θ(a_t' x_pr + s_t' e', c_pr) - x_pr|^2        (eq. 2)

`tune = "full"` trains every weight of the UNet, as the paper does; "lora" a low-rank change of its attention (Hu et al.
2021), which is what most people train today. The second term (`prior_weight` is λ) keeps the class what it was.

Departures: the loss is that of the base's own target (noise or v), a mean over pixels; the text encoder is trained by
the same form of change as the UNet, at `lr_text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.concept import Subject
from pipelines.methods import Stage
from pipelines.params import BASIC, TrainParams

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.batch import Batch
    from pipelines.fulltune import FullTune
    from pipelines.lora import Lora
    from pipelines.model import Model
    from pipelines.one_change import OneChange

name = "dreambooth"
title = "DreamBooth"
paper = "https://arxiv.org/abs/2208.12242"


class Params(TrainParams):
    """The defaults are those of the low-rank form."""

    lr: float = Field(1e-4, gt=0, le=1, description="Learning rate (5e-6 for full tuning)", json_schema_extra=BASIC)
    prior_weight: float = Field(1.0, ge=0, le=10, description="Prior preservation weight (0 = off)")
    tune: Literal["lora", "full"] = Field(
        "lora", description="What learns: low-rank changes (small files), or every weight", json_schema_extra=BASIC
    )
    rank: int = Field(16, ge=1, le=512, description="Rank of the low-rank changes")
    alpha: float = Field(0.0, ge=0, le=4096, description="Scale of the low-rank changes times rank (0 = the rank)")
    targets: Literal["attention", "all-linear", "all"] = Field(
        "attention", description="Layers with low-rank changes: attention, all linear ones, or convolutions too"
    )
    train_text_encoder: bool = Field(False, description="Let the text encoder learn too")
    lr_text: float = Field(5e-6, gt=0, le=1, description="Learning rate of the text encoder")
    rare_word: str = Field(
        "sks", max_length=100, description="Word before the noun that stands for the subject; one each for several"
    )


def stages(params: Params) -> Sequence[Stage]:
    """One stage."""
    return (Stage("weights", params.steps, params.batch_size, params.weight_decay, params.max_grad_norm),)


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[OneChange]:
    """A change of nothing on the chosen weights, and each subject's `<name>` meaning "<rare word> <noun>"."""
    from pipelines.fulltune import fulltune
    from pipelines.lora import lora
    from pipelines.one_change import OneChange
    from pipelines.rare_words import rare_words
    from pipelines.tokens import Expansion, placeholder

    words = rare_words(params.rare_word, subjects)
    with ExitStack() as stack:
        change: Lora | FullTune
        if params.tune == "full":
            change = stack.enter_context(fulltune(model, text_encoder=params.train_text_encoder))
        else:
            change = stack.enter_context(
                lora(
                    model,
                    rank=params.rank,
                    alpha=params.alpha or params.rank,
                    targets=params.targets,
                    text_encoder=params.train_text_encoder,
                )
            )
        adapter = OneChange(change, params)
        for subject, word in zip(subjects, words, strict=True):
            meaning = Expansion(f"{word} {subject.noun}".strip(), subject.noun, strength=lambda: adapter.strength)
            stack.enter_context(placeholder(model, subject.token, meaning))
        yield adapter


def loss(model: Model, adapter: OneChange, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """Denoising, with prior preservation and masks as the batch brings them."""
    from pipelines.losses import denoising_loss

    return denoising_loss(model, adapter, batch, adapter.params)
