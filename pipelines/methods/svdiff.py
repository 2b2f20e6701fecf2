"""SVDiff: a concept as shifts of singular values.

Paper: Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning", ICCV 2023, arXiv 2303.11305.

    W = U diag(σ) Vᵀ                                       (eq. 1)
    W_δ = U diag(ReLU(σ + s δ)) Vᵀ                         (eq. 2; s = `strength`, 1 while training)
    σ + δ₁ + δ₂,  σ + α δ₁ + (1 - α) δ₂  inside the ReLU   (eq. 4 and 5: stacked concepts, each with its own strength)

Only δ trains: one vector a layer, 0.9 MB for the UNet of SD 1.5.

Departures from the paper and from the released code:
- W + U diag(ReLU(σ + s δ) - σ) Vᵀ is applied, the same but exactly W at δ = 0 (the authors add the error of the SVD
  back as well; the released code doesn't).
- The gains of norms: `mode_1d = "scalar"` is the released code (each norm scaled as a whole, one number), "element" the
  paper (w + s δ, one number a channel). Biases never change.
- Training never forms U diag(σ + δ) Vᵀ where a cheaper form exists (`pipelines.changes`), and generation folds the
  change in once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.methods import Stage
from pipelines.params import TrainParams

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.data import Batch
    from pipelines.model import Model
    from pipelines.shifts import Shifts

name = "svdiff"
title = "SVDiff"
paper = "https://arxiv.org/abs/2303.11305"

Layers = Literal["all", "ca", "ca-kv", "1d", "2d", "4d", "up", "down", "mid", "up-ca", "down-ca", "mid-ca"]


class Params(TrainParams):
    """The published settings."""

    lr_1d: float = Field(1e-6, gt=0, le=1, description="Learning rate of the norms' gains")
    prior_weight: float = Field(1.0, ge=0, le=10, description="Prior preservation weight (0 = off)")
    mode_1d: Literal["scalar", "element"] = Field(
        "scalar", description="Norms: one number each (released code) or one per channel (paper)"
    )
    layers: Layers = Field("all", description="Layers of the UNet that learn (ca = cross-attention)")
    train_text_encoder: bool = Field(True, description="Let the text encoder learn too")
    rare_word: str = Field(
        "sks", max_length=100, description="Word before the noun that stands for the subject; one each for several"
    )


def stages(params: Params) -> Sequence[Stage]:
    """One stage."""
    return [Stage("shifts", params.steps, params.batch_size, params.weight_decay, params.max_grad_norm)]


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[Shifts]:
    """Shifts of zero on the chosen layers, and each subject's token meaning "<rare word> <noun>"."""
    from pipelines.shifts import Shifts, chosen, no_change  # torch is heavy, and settings are read without it
    from pipelines.tokens import Expansion, placeholder
    from pipelines.weights import changed

    words = _rare_words(params, subjects)
    changes = {name: no_change(module, params) for name, module in chosen(model, params).items()}
    with ExitStack() as stack:
        adapter = Shifts(stack.enter_context(changed(model, changes)), params)
        for subject, word in zip(subjects, words, strict=True):
            meaning = Expansion(f"{word} {subject.noun}".strip(), subject.noun, strength=lambda: adapter.strength)
            stack.enter_context(placeholder(model, subject.token, meaning))
        yield adapter


def loss(model: Model, adapter: Shifts, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """Denoising, with prior preservation and masks as the batch brings them."""
    from pipelines.losses import denoising_loss

    return denoising_loss(model, adapter, batch, cast(Params, adapter.params))


def _rare_words(params: Params, subjects: Sequence[Subject]) -> list[str]:
    words = params.rare_word.split()
    if words and len(words) < len(subjects):
        raise StudioError(
            f"{len(subjects)} subjects need {len(subjects)} rare words to tell them apart, and 'rare_word' has only "
            f"'{params.rare_word}'. Write one for each, with spaces between."
        )
    return words[: len(subjects)] if words else [""] * len(subjects)
