"""Cones 2: tune the whole text encoder on the bare noun, then keep only how far it moved the noun's own states.

Paper: "Cones 2: Customizable Image Synthesis with Multiple Subjects", Liu et al. 2023, arXiv:2305.19327. With E and E0
the states (tokens, width) of the tuned and the frozen encoder, and n tokens of the noun after the start token:

    L = mean (prediction - target)^2 + r1 |E0[0:1] - E[0:1]| + r2 |E0[1+n:] - E[1+n:]|     (norms, not squared)
    residual = mean over 27 templates T of (E(T) - E0(T)) at the noun's tokens             (n, width)

To generate, the frozen encoder is used, and strength * residual is added to its output at the noun's tokens of
`<name>`; nothing else changes, so a prompt without `<name>` is the base's own.

Departures from the released code: E0 always comes from the frozen encoder (there, a resume takes the tuned one for it);
any batch size (norms are taken for each row, then averaged; there, only 1 works); the noun's tokens are found by
character offsets (there, by the first token's id, which also finds the noun's first token in a template's own words);
nouns of several tokens are learned whole. The paper's figure trains on "a photo of", its code on the bare noun:
`prompt` offers both, and a person's own captions. SDXL, which the paper does not treat, trains both encoders on their
side-by-side states and leaves the pooled text as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.methods import Stage
from pipelines.params import TrainParams
from pipelines.templates import TEMPLATES, filled

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.batch import Batch
    from pipelines.model import Model
    from pipelines.text import TextStates, Tokenized
    from pipelines.tuned_text import TunedText

name = "residual"
title = "Residual (Cones 2)"
paper = "https://arxiv.org/abs/2305.19327"

KEY = "residual"  # the one tensor of a concept: (tokens of the noun, width)


class Params(TrainParams):
    """The defaults are the published ones."""

    steps: int = Field(4000, ge=1, le=100_000, description="Training steps")
    lr: float = Field(5e-6, gt=0, le=1, description="Learning rate of the text encoder")
    anchor_start: float = Field(1e-2, ge=0, le=10, description="How firmly the start token is held (r1)")
    anchor_rest: float = Field(1e-3, ge=0, le=10, description="How firmly every other word is held (r2)")
    prompt: Literal["noun", "templates", "captions"] = Field(
        "noun", description="What it reads while it learns: the bare noun, the 27 templates, or the photos' captions"
    )

    @model_validator(mode="after")
    def _no_class_pictures(self) -> Params:
        if self.prior_weight:
            raise ValueError(
                "prior_weight must be 0: residual learns without class pictures, its anchors hold the rest"
            )
        return self


def stages(params: Params) -> Sequence[Stage]:
    """One stage."""
    return (Stage("residual", params.steps, params.batch_size, params.weight_decay, params.max_grad_norm),)


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[Residual]:
    """`<name>` means the noun with its states shifted. The model's own parts stay as they are, also in training.

    StudioError for more than one subject, or a noun that the text encoder can't read.
    """
    from pipelines.tokens import Expansion, placeholder

    if len(subjects) != 1:
        raise StudioError("residual learns one subject at a time. Train each by itself, then use them together.")
    subject = subjects[0]
    adapter = Residual(model, params, subject)
    with placeholder(
        model, subject.token, Expansion(subject.noun, subject.noun, adapter.rows, lambda: adapter.strength)
    ):
        yield adapter


def loss(model: Model, adapter: Residual, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """The denoising loss with the tuned encoder's states, and the two anchors."""
    from pipelines.losses import denoising_loss

    text, start, rest = adapter.read(batch)
    anchors = {"start": adapter.params.anchor_start * start, "rest": adapter.params.anchor_rest * rest}
    return denoising_loss(model, adapter, batch, adapter.params, text) | anchors


class Residual:
    """The adapter: the encoder that learns (from the first call of `param_groups` on), or the rows that were loaded."""

    def __init__(self, model: Model, params: Params, subject: Subject) -> None:
        self.strength = 1.0
        self.params = params
        self._model = model
        self._subject = subject
        self._count = len(self._reading(subject.noun, [(0, len(subject.noun))])[1])
        self._loaded: Tensor | None = None
        self._text: TunedText | None = None
        self._reached: tuple[int, Tensor] | None = None  # rows by the version of the text they were measured at

    def param_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """Every parameter of the copied text encoders."""
        return [{"params": self._learning().parameters(), "lr": self.params.lr}]

    def tensors(self) -> dict[str, Tensor]:
        """{"residual": (tokens of the noun, width)} fp32; zeros when nothing was learned or loaded."""
        rows = self.rows()
        if rows is None:
            rows = self._model.encode([self._subject.noun]).states.new_zeros(self._count, self._width())
        return {KEY: rows.detach().float().cpu().clone()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved rows; StudioError when they are for another width or number of tokens."""
        rows = tensors.get(KEY)
        if rows is None or set(tensors) != {KEY} or rows.ndim != 2:
            raise StudioError("This is no residual: it needs one tensor 'residual'. Choose a file that training wrote.")
        if rows.shape[1] != self._width():
            raise StudioError(
                f"The residual was made for text states {rows.shape[1]} wide, those of this base have {self._width()}. "
                "Load the base it was trained on."
            )
        if len(rows) != self._count:
            raise StudioError(
                f"The residual changes {len(rows)} token(s), but '{self._subject.noun}' has {self._count} here. "
                "Give the concept the noun it was trained with."
            )
        self._loaded = rows.detach().float().to(self._model.device)

    def bake(self) -> None:
        """Nothing to fold in: the rows are added once per prompt."""

    def rows(self) -> Tensor | None:
        """What is added to the noun's states now, (tokens of the noun, width) fp32: what training has reached so far,
        else what was loaded, else nothing."""
        if self._text is None:
            return self._loaded
        if self._reached and self._reached[0] == self._text.version():  # prompts ask several times for one picture
            return self._reached[1]
        noun = self._subject.noun
        readings = [self._reading(text, [place]) for text, place in (filled(template, noun) for template in TEMPLATES)]
        rows = self._text.mean_change([(prompt.text, nouns) for prompt, nouns in readings])
        self._reached = self._text.version(), rows
        return rows

    def read(self, batch: Batch) -> tuple[TextStates, Tensor, Tensor]:
        """The tuned text states for a batch, and how far the start and all other rows but the noun's have moved.

        Texts that several rows share are encoded once. The distances are un-squared norms, averaged over the rows.
        """
        from pipelines.text import TextStates

        self._reached = None  # a step follows, and fused optimizers don't count as a change
        readings = self._readings(batch)
        texts = list(dict.fromkeys(prompt.text for prompt, _ in readings))
        rows = [texts.index(prompt.text) for prompt, _ in readings]
        pair = self._learning().states(texts)
        moved = (pair.frozen - pair.tuned)[rows]  # (rows, tokens, width)
        rest = moved.clone()
        for index, (_, nouns) in enumerate(readings):
            rest[index, [0, *nouns]] = 0  # the start has a weight of its own, the noun is free
        pooled = None if pair.pooled is None else pair.pooled[rows]
        text = TextStates(pair.tuned[rows], pooled, tuple(prompt for prompt, _ in readings))
        return text, _length(moved[:, :1]), _length(rest)

    def _readings(self, batch: Batch) -> list[tuple[Tokenized, list[int]]]:
        """What the encoder reads for each row, and the noun's positions there."""
        from pipelines.tokens import Expansion, expand

        noun = self._subject.noun
        if self.params.prompt == "captions":
            plain = {self._subject.token: Expansion(noun, noun)}
            expanded = [expand(caption, plain) for caption in batch.captions]
            return [self._reading(text, [span.noun for span in spans]) for text, spans in expanded]
        if self.params.prompt == "templates":  # a row's random timestep also draws its template
            drawn = [filled(TEMPLATES[t % len(TEMPLATES)], noun) for t in batch.timesteps.tolist()]
            return [self._reading(text, [place]) for text, place in drawn]
        return [self._reading(noun, [(0, len(noun))])] * len(batch.timesteps)

    def _reading(self, text: str, nouns: Sequence[tuple[int, int]]) -> tuple[Tokenized, list[int]]:
        """A text's tokens, and the positions of the noun, which stands at the characters `nouns`."""
        from pipelines.text import covered

        prompt = self._model.tokenize(text)
        found = [position for start, end in nouns for position in covered(prompt, start, end)]
        if not found:
            raise StudioError(f"The text encoder can't read '{self._subject.noun}' as a noun. Choose an ordinary word.")
        return prompt, found

    def _learning(self) -> TunedText:
        """The encoders that learn, copied from the base's when they are first asked for."""
        if self._text is None:
            from pipelines.tuned_text import TunedText

            self._text = TunedText(self._model)
        return self._text

    def _width(self) -> int:
        return int(self._model.encode([self._subject.noun]).states.shape[-1])


def _length(moved: Tensor) -> Tensor:
    """The Frobenius norm of each row's (tokens, width), averaged over the rows. Its gradient at zero is zero."""
    return moved.flatten(1).norm(dim=1).mean()
