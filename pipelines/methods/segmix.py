"""MuDI: several subjects learned together as one low-rank change, told apart by collages.

Paper: Jang et al., "Identity Decoupling for Multi-Subject Personalization of Text-to-Image Models", NeurIPS 2024, arXiv
2404.04243. With probability 0.3 a photo gives way to a collage of two subjects on white (`pipelines.mixers`):

    L = |prediction - target|^2 of photos and collages + prior_weight * the same of class pictures     (section 4.1)
    L = -log sigmoid(-beta (l - l0))                                 (`loss = "dco"`: the released code, pipelines.dco)

Each subject is "<rare word> <noun>", where a specific noun or an adjective and a noun ("white robot toy") serves best;
no token is added. `mix = "cutmix"` and `mix = "none"` are what the paper compares with: halves of photos (SVDiff; its
regulariser is `unmix_weight`, which the paper leaves off), and DreamBooth on all subjects together. Pictures begin from
`pipelines.start_noise`, with the negative prompt "sticker, collage".

Departures from the released code:
- Any canvas and any number of subjects (there 1024 pixels, and two names for the sizes).
- `soft_alpha` weighs a collage's background as there (mean over all cells); `masked_loss` is ours: inside the masks,
  divided by their area, in photos too.
- DCO and class pictures go together (there, the photos then learn nothing).
- batch_size 2 with micro_batch 1 is its 1 with two accumulated gradients. Learned from step 1 on
  (`segmix_start_step` is 0 in all its commands).
- Class pictures are mixed when their photo is (`mix_class`), as there; where no masks of them are handed in, those of
  the base's attention serve, and a picture without one is not mixed.
- SDXL is told each row's real size, crop and target (there, a constant 1024 and no crop, also where it crops).
- Masks come down to latent cells as means of their areas (there, bilinearly, without smoothing).
- Low-rank files are read and written as diffusers and peft have them today; older spellings are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.concept import Subject
from pipelines.methods import Stage
from pipelines.params import BASIC, TrainParams

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.batch import Batch
    from pipelines.mixers import CutMixer, SegMixer
    from pipelines.model import Model
    from pipelines.one_change import OneChange

name = "segmix"
title = "Seg-Mix (MuDI)"
paper = "https://arxiv.org/abs/2404.04243"


class Params(TrainParams):
    """The published settings: the paper's loss, the released code's numbers."""

    steps: int = Field(1200, ge=1, le=100_000, description="Training steps", json_schema_extra=BASIC)
    batch_size: int = Field(2, ge=1, le=256, description="Photos a step (all processes together)")
    lr: float = Field(1e-4, gt=0, le=1, description="Learning rate", json_schema_extra=BASIC)
    weight_decay: float = Field(1e-4, ge=0, le=1, description="AdamW weight decay")
    prior_weight: float = Field(1.0, ge=0, le=10, description="Prior preservation weight (0 = off)")
    prior_count: int = Field(100, ge=1, le=5000, description="Class pictures for prior preservation, of all subjects")
    rare_word: str = Field(
        "olis hta ult amg lun", max_length=200, description="Words before the nouns, one for each subject in turn"
    )
    mix: Literal["segmix", "cutmix", "none"] = Field(
        "segmix", description="Collages of cut-out subjects, halves of photos, or none", json_schema_extra=BASIC
    )
    mix_chance: float = Field(
        0.3, ge=0, le=1, description="How often a photo gives way to a mixture; more for four subjects and more"
    )
    mix_count: int = Field(2, ge=2, le=9, description="Subjects in a collage")
    mix_class: bool = Field(True, description="Mix class pictures too, where masks of them are found")
    relative_sizes: str = Field(
        "", max_length=200, description="Sizes of the subjects in collages, such as '1 0.5' ('' = random)"
    )
    smallest: float = Field(0.75, gt=0, le=1, description="Smallest size of a cut-out, of what fits")
    margin: float = Field(0.5, ge=0, le=1, description="How far cut-outs stand from the edge, of half the canvas")
    level: bool = Field(False, description="Cut-outs of a collage stand at the same height")
    cut_sides: Literal["always", "sometimes", "never"] = Field(
        "sometimes", description="Cut-Mix: say 'on the left' and 'on the right'"
    )
    unmix_weight: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of keeping nouns from looking at the other subjects (unmix; 0 = off)",
    )
    soft_alpha: float = Field(
        1.0, ge=0, le=1, description="Weight of the loss on a collage's white (1 = everywhere alike)"
    )
    loss: Literal["mse", "dco"] = Field("mse", description="Plain error, or error against the base's own (DCO)")
    dco_beta: float = Field(1000.0, gt=0, le=1e6, description="DCO: how firmly the base holds")
    dco_per_row: bool = Field(True, description="DCO: each photo by itself (off = the batch's mean, as released)")
    rank: int = Field(32, ge=1, le=1024, description="Rank of the low-rank change")
    alpha: float = Field(0.0, ge=0, le=1024, description="Scale of the change times its rank (0 = the rank)")
    targets: Literal["attention", "all-linear", "all"] = Field("attention", description="Layers that learn")
    train_text_encoder: bool = Field(False, description="Let the text encoder learn too")
    lr_text: float = Field(5e-6, gt=0, le=1, description="Learning rate of the text encoder")


def stages(params: Params) -> Sequence[Stage]:
    """One stage."""
    return [Stage("segmix", params.steps, params.batch_size, params.weight_decay, params.max_grad_norm)]


def mixer(params: Params, subjects: Sequence[Subject]) -> SegMixer | CutMixer | None:
    """Who makes collages of these subjects' photos; None for a single one. StudioError for sizes that don't fit."""
    from pipelines.collage import Recipe
    from pipelines.mixers import CutMixer, SegMixer, relative_sizes

    tokens = tuple(subject.token for subject in subjects)
    if params.mix == "none" or len(subjects) < 2:
        return None
    if params.mix == "cutmix":
        return CutMixer(tokens, params.mix_chance, params.cut_sides)
    sizes = relative_sizes(params.relative_sizes, subjects)
    recipe = Recipe(params.smallest, 1.0, params.margin, sizes=sizes, level=params.level)
    return SegMixer(tokens, params.mix_chance, recipe, params.mix_count)


def class_mixer(params: Params, subjects: Sequence[Subject]) -> SegMixer | CutMixer | None:
    """Who makes collages of class pictures."""
    from pipelines.mixers import of_classes

    made = mixer(params, subjects) if params.mix_class else None
    return of_classes(made, subjects) if made else None


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[OneChange]:
    """A low-rank change of zero, and each subject's token meaning "<rare word> <noun>"."""
    from pipelines.lora import lora  # torch is heavy, and settings are read without it
    from pipelines.one_change import OneChange
    from pipelines.rare_words import rare_words
    from pipelines.tokens import Expansion, placeholder

    words = rare_words(params.rare_word, subjects)
    wish: dict[str, Any] = {"targets": params.targets, "text_encoder": params.train_text_encoder}
    with ExitStack() as stack:
        change = stack.enter_context(lora(model, rank=params.rank, alpha=params.alpha or params.rank, **wish))
        adapter = OneChange(change, params, tuple(subject.token for subject in subjects))
        for subject, word in zip(subjects, words, strict=True):
            meaning = Expansion(f"{word} {subject.noun}".strip(), subject.noun, strength=lambda: adapter.strength)
            stack.enter_context(placeholder(model, subject.token, meaning))
        yield adapter


def loss(model: Model, adapter: OneChange, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """The error of photos and collages, plain or against the base's own, that of class pictures, and what unmixes."""
    from pipelines.attention.unmix import unmixing
    from pipelines.dco import Dco, dco_loss
    from pipelines.losses import squared_error

    params = adapter.params
    with unmixing(model, batch, adapter.tokens if params.unmix_weight else ()) as watched:
        error = squared_error(model, batch)
    losses = {} if watched is None else {"unmix": params.unmix_weight * watched.loss()}
    if params.loss == "dco":
        settings = Dco(partial(each_row, params), params.dco_beta, params.dco_per_row, params.prior_weight)
        return dco_loss(model, adapter, batch, settings, error) | losses
    each = each_row(params, error, batch)
    losses["denoising"] = each[~batch.prior].mean()
    if params.prior_weight and bool(batch.prior.any()):
        losses["prior"] = params.prior_weight * each[batch.prior].mean()
    return losses


def each_row(params: Params, error: Tensor, batch: Batch) -> Tensor:
    """What counts of each row's squared error (rows, c, h, w), as (rows,).

    A collage's white weighs `soft_alpha`, and the mean is over all cells: sum(w e) / (c h w), w = m + (1 - m) a.
    """
    from pipelines.losses import masked_mean

    if params.masked_loss or batch.masks is None or batch.mixed is None or params.soft_alpha == 1:
        masks = batch.masks if params.masked_loss else None
        return masked_mean(error, masks, params.background_weight)
    mixed = batch.mixed.view(-1, 1, 1, 1)
    weight = batch.masks + (1 - batch.masks) * params.soft_alpha
    return (error * weight.where(mixed, weight.new_ones(()))).mean(dim=(1, 2, 3))
