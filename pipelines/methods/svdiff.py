"""SVDiff: a concept as shifts of singular values.

Paper: Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning", ICCV 2023, arXiv 2303.11305.

    W = U diag(σ) Vᵀ                                       (eq. 1)
    W_δ = U diag(ReLU(σ + s δ)) Vᵀ                         (eq. 2; s = `strength`, 1 while training)
    σ + δ₁ + δ₂,  σ + α δ₁ + (1 - α) δ₂  inside the ReLU   (eq. 4 and 5: stacked concepts, each with its own strength)

Only δ trains: one vector a layer, 0.9 MB for the UNet of SD 1.5.

Several subjects in one run: with `mix = "cutmix"` a photo gives way, with chance 0.6, to halves of two subjects' photos
(Cut-Mix, section 3.3, `pipelines.mixers`), class pictures likewise, and `unmix_weight` keeps each noun's attention off
the other half (`pipelines.attention.unmix`, where its form is given: the paper has it in words, without a weight). The
released code has none of this. Paint with a negative prompt against seams, as the paper does.

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
from pipelines.methods import Stage
from pipelines.params import TrainParams

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.batch import Batch
    from pipelines.mixers import CutMixer, SegMixer
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
    mix: Literal["none", "cutmix"] = Field(
        "none", description="Several subjects: photos alone, or halves of two subjects' photos too (Cut-Mix)"
    )
    mix_chance: float = Field(0.6, ge=0, le=1, description="Cut-Mix: how often a photo gives way to halves")
    cut_sides: Literal["always", "sometimes", "never"] = Field(
        "sometimes", description="Cut-Mix: say 'on the left' and 'on the right'"
    )
    unmix_weight: float = Field(
        0.0, ge=0, le=1000, description="Weight of keeping nouns from looking at the other subjects (unmix; 0 = off)"
    )


def stages(params: Params) -> Sequence[Stage]:
    """One stage."""
    return [Stage("shifts", params.steps, params.batch_size, params.weight_decay, params.max_grad_norm)]


def mixer(params: Params, subjects: Sequence[Subject]) -> CutMixer | None:
    """Who puts halves of these subjects' photos together; None for a single one."""
    from pipelines.mixers import CutMixer

    if params.mix == "none" or len(subjects) < 2:
        return None
    return CutMixer(tuple(subject.token for subject in subjects), params.mix_chance, params.cut_sides)


def class_mixer(params: Params, subjects: Sequence[Subject]) -> CutMixer | SegMixer | None:
    """The same for class pictures."""
    from pipelines.mixers import of_classes

    made = mixer(params, subjects)
    return of_classes(made, subjects) if made else None


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[Shifts]:
    """Shifts of zero on the chosen layers, and each subject's token meaning "<rare word> <noun>"."""
    from pipelines.rare_words import rare_words
    from pipelines.shifts import Shifts, chosen, no_change  # torch is heavy, and settings are read without it
    from pipelines.tokens import Expansion, placeholder
    from pipelines.weights import changed

    words = rare_words(params.rare_word, subjects)
    changes = {name: no_change(module, params) for name, module in chosen(model, params).items()}
    with ExitStack() as stack:
        tokens = tuple(subject.token for subject in subjects)
        adapter = Shifts(stack.enter_context(changed(model, changes)), params, tokens)
        for subject, word in zip(subjects, words, strict=True):
            meaning = Expansion(f"{word} {subject.noun}".strip(), subject.noun, strength=lambda: adapter.strength)
            stack.enter_context(placeholder(model, subject.token, meaning))
        yield adapter


def loss(model: Model, adapter: Shifts, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """Denoising, with prior preservation and masks as the batch brings them, and what unmixes halves."""
    from pipelines.attention.unmix import unmixing
    from pipelines.losses import denoising_loss

    params = cast(Params, adapter.params)
    with unmixing(model, batch, adapter.tokens if params.unmix_weight else ()) as watched:
        losses = denoising_loss(model, adapter, batch, params)
    return losses if watched is None else losses | {"unmix": params.unmix_weight * watched.loss()}
