"""Several subjects out of one photo: one learned token each, learned together inside their masks.

Papers: ConceptExpress (Hao et al. 2024, arXiv 2407.07077) without names, Break-A-Scene (Avrahami et al. 2023, arXiv
2305.16311) with masks. Targets are named by a person; their masks come from words (`pipelines.masks`), from a brush, or
from `pipelines.attention.discover` where nothing is named. With M the union of the masks of the subjects that a row's
prompt names, a_k the cross-attention of subject k's token on the coarsest grid, m_k its mask there:

    L = sum M (prediction - target)^2 / (C sum M) + w sum_k D(a_k, m_k),   D = EMD | MSE | off

Only the tokens' rows in the embedding table train, then, with `shift_steps`, spectral shifts (SVDiff) instead of the
whole UNet. `split` learns several tokens per subject first, held together by a contrastive loss, and goes on from their
mean (ConceptExpress, section 3.4).

Departures: the error is divided by the masks' area (there, by the picture's), so that `attention_weight` counts more
here than the published 1e-5 does there. EMD is in grid diagonals and has a gradient that depends on the mask. Tokens
start at the noun's own row of the encoder that trains. `schedule = "union"` draws a random set of subjects for each row
(Break-A-Scene); "passes" goes through every subject alone and then all together, a step each (ConceptExpress); "all"
always names every subject in the photo, which is what fits without masks: a prompt that leaves one out isn't true then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.methods import Stage
from pipelines.params import BASIC, TrainParams

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.batch import Batch
    from pipelines.extraction import Extraction
    from pipelines.model import Model
    from pipelines.photos import Photo

name = "extract"
title = "Extraction (several subjects from one photo)"
paper = "https://arxiv.org/abs/2407.07077"

SPLIT, TOKENS, SHIFTS = "split", "tokens", "shifts"  # the stages
Layers = Literal["all", "ca", "ca-kv", "1d", "2d", "4d", "up", "down", "mid", "up-ca", "down-ca", "mid-ca"]


class Params(TrainParams):
    """The defaults are the published ones where they apply."""

    steps: int = Field(500, ge=1, le=100_000, description="Training steps of the tokens", json_schema_extra=BASIC)
    lr: float = Field(5e-4, gt=0, le=1, description="Learning rate of the tokens", json_schema_extra=BASIC)
    masked_loss: bool = Field(
        True, description="Count the loss inside the subjects' masks only", json_schema_extra=BASIC
    )
    background_weight: float = Field(0.0, ge=0, le=1, description="Weight of the loss outside the masks")
    attention: Literal["emd", "mse", "off"] = Field(
        "emd", description="Pull each token's attention onto its mask: by moved mass, by squared error, or not at all"
    )
    attention_weight: float = Field(1e-2, ge=0, le=100, description="Weight of that pull")
    schedule: Literal["union", "passes", "all"] = Field(
        "union",
        description="Which subjects a step names: a random set, each alone in turn and then all together, or always "
        "all of the photo",
    )
    init: Literal["noun", "random"] = Field(
        "noun", description="Where a token starts: at its noun, or at a random word (for things without a name)"
    )
    split: int = Field(1, ge=1, le=20, description="Tokens a subject is learned with at first (1 = no split and merge)")
    split_steps: int = Field(100, ge=1, le=100_000, description="Steps before they are merged")
    contrast_weight: float = Field(1e-3, ge=0, le=100, description="How firmly a subject's tokens are held together")
    shift_steps: int = Field(0, ge=0, le=100_000, description="Steps of a second phase by spectral shifts (0 = none)")
    shift_lr: float = Field(1e-3, gt=0, le=1, description="Learning rate of the shifts")
    lr_1d: float = Field(1e-6, gt=0, le=1, description="Learning rate of the shifts of norms")
    mode_1d: Literal["scalar", "element"] = Field("scalar", description="Norms: one shift each, or one per channel")
    layers: Layers = Field("all", description="Layers of the UNet that get shifts (ca = cross-attention)")
    train_text_encoder: bool = Field(False, description="Shifts for the text encoder too")


def stages(params: Params) -> Sequence[Stage]:
    """Split tokens, the tokens, the shifts; the first and the last only where they are asked for."""
    wanted = [
        (SPLIT, params.split_steps if params.split > 1 else 0),
        (TOKENS, params.steps),
        (SHIFTS, params.shift_steps),
    ]
    return [
        Stage(name, steps, params.batch_size, params.weight_decay, params.max_grad_norm)
        for name, steps in wanted
        if steps
    ]


def needs_masks(params: Params) -> bool:
    """Both the loss and the pull on attention are about where each subject is."""
    return params.masked_loss or params.attention != "off"


def check_photos(params: Params, subjects: Sequence[Subject], photos: Sequence[Photo]) -> None:
    """StudioError for a subject without a mask of its own in a photo of several: nothing could be learned of it."""
    if not needs_masks(params):
        return
    for photo in photos:
        names = [subject.token.strip("<>") for subject in subjects]
        shown = [name for name in names if not photo.shows or name in photo.shows]
        lacking = [name for name in shown if name not in photo.masks] if len(shown) > 1 else []
        if lacking:
            raise StudioError(
                f"{photo.path.name} has no mask that says where {lacking[0]} is, so it can't be told from the others. "
                f"Draw {photo.path.stem}-masklabel-{lacking[0]}.png, or mark it with a click."
            )


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[Extraction]:
    """Each subject's token in the text encoders' tables; shifts of zero where there is a second phase."""
    from pipelines.extraction import extraction  # torch is heavy, and settings are read without it

    with extraction(model, params, subjects) as adapter:
        yield adapter


def loss(model: Model, adapter: Extraction, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """The masked denoising loss, the pull on attention, and the hold on split tokens."""
    from pipelines.attention.follow import Follow
    from pipelines.attention.probe import probe_attention
    from pipelines.losses import denoising_loss

    params, named = adapter.params, adapter.named(batch, stage)
    batch = replace(batch, captions=adapter.captions(batch, named), masks=adapter.union(batch, named))
    text = model.encode(batch.captions)
    follow = Follow(adapter.positions(text, named), adapter.sites if params.attention != "off" else ())
    with probe_attention(model.unet, follow):
        losses = denoising_loss(model, adapter, batch, params, text)
    if params.attention != "off":
        losses["attention"] = params.attention_weight * adapter.pull(follow, batch, named)
    if stage.name == SPLIT and params.contrast_weight:
        losses["contrast"] = params.contrast_weight * adapter.hold()
    return losses
