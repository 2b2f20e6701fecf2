"""Masks of what a word means in a photo, from the base's own attention (iSeg, see `pipelines.attention.refine`).

Once per photo, with the base as it is before anything is learned: at one level of noise, averaged over noise draws that
are private to the photo's mask. Nouns compete with each other and with the background for every place.
Departures from the released code: one prompt for all nouns, whose tokens are found by their characters; several noise
draws (there, one with a global seed); every layer of the two levels (there, some of them by name, and chosen heads);
photos keep their shape (there, 512 x 512).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Heatmap, Note, Progress
from pipelines.files import save_tensors, spare_disk

if TYPE_CHECKING:
    from pipelines.concept import Subject
    from pipelines.events import Picture
    from pipelines.model import Model
    from pipelines.photos import Mask, Photo

STAGE = "masks"


class MaskParams(BaseModel):
    """How masks are made; the defaults are iSeg's for pictures of everyday things."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestep: int = Field(100, ge=0, le=999, description="Level of noise at which the photo is looked at")
    draws: int = Field(4, ge=1, le=64, description="Noise draws averaged over")
    seed: int = Field(0, ge=0, description="Seed of the noise")
    boost: float = Field(1.6, gt=0, le=10, description="Factor on the nouns' text states (1 = off)")
    coarse: float = Field(
        0.7, ge=0, le=1, description="Weight of the coarsest cross-attention; the next finer has the rest"
    )
    clusters: int = Field(
        6, ge=0, le=32, description="Smooth the words' attention by clusters from N x N cells (0 = off)"
    )
    layers: Literal["middle", "up"] = Field(
        "middle", description="Finest self-attention: one layer on the way up, or all"
    )
    entropy: float = Field(0.1, ge=0, le=1, description="How strongly weak links between cells are cut")
    steps: int = Field(10, ge=0, le=200, description="Rounds of refinement")
    threshold: float = Field(
        0.0, ge=0, lt=1, description="Score of the background (0 = high only where no noun scores)"
    )
    prompt: str = Field(
        "a photograph of {} and other object and background, ground, land, grass, tree, building, wall, sky, lake",
        max_length=1000,
        description="What the base reads; {} are the nouns",
    )
    articles: bool = Field(False, description="Write 'a cat and a house' rather than 'cat and house'")

    @field_validator("prompt")
    @classmethod
    def _one_place(cls, prompt: str) -> str:
        if prompt.count("{}") != 1:
            raise ValueError("needs {} once, where the nouns go")
        return prompt


_PLAIN = {"boost": 1.0, "clusters": 0, "steps": 0}
# Chosen on Toybox's tuning scenes: noise level, threshold of the background and rounds by `claims --only masks`, which
# tries equally many settings of both; the weight of the levels, boost and layers before, on an earlier base.
_TOYBOX = {"prompt": "a photo of {}", "articles": True, "coarse": 1.0, "clusters": 0}
_BY_KIND: dict[tuple[str, bool], dict[str, Any]] = {
    ("toybox", True): _TOYBOX | {"timestep": 300, "layers": "up", "steps": 1, "threshold": 0.3},
    ("toybox", False): _TOYBOX | {"timestep": 300, "threshold": 0.6},
}


def mask_params(kind: str, *, refine: bool = True) -> MaskParams:
    """The settings for a kind of base ("sd1", "toybox" ...): of refined masks, or of raw attention to compare with."""
    return MaskParams.model_validate(_BY_KIND.get((kind, refine), {}) | ({} if refine else _PLAIN))


@dataclass(frozen=True)
class SoftMask:
    """Where one of a photo's nouns is. `shares` (nouns + 1, h, w) are everyone's on the base's grid, the background
    last; they sum to 1 everywhere. `size` is the photo's (height, width)."""

    noun: str
    index: int
    shares: NDArray[np.float32]
    size: tuple[int, int]

    @property
    def soft(self) -> NDArray[np.float32]:
        """(h, w) on the base's grid: how much of each cell is the noun's, 0-1."""
        return self.shares[self.index]

    def binary(self, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
        """(height, width), as large as the photo if not given: True where no other noun and no background has more."""
        own, rival = self._against(size)
        return own > rival

    def picture(self, size: tuple[int, int] | None = None, *, soft: bool = False) -> Mask:
        """As a photo's mask: (height, width) uint8, 255 = the noun. When `soft`, the noun's share of itself and of the
        strongest other there, so that 128 and more is where `binary` has it, however many share a place."""
        if not soft:
            return self.binary(size).astype(np.uint8) * 255
        own, rival = self._against(size)
        return (255 * (own / np.maximum(own + rival, 1e-12))).round().astype(np.uint8)

    def _against(self, size: tuple[int, int] | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The noun's share and the strongest other's, (height, width) each."""
        from pipelines.attention.heatmap import upscale

        size = size or self.size
        others = np.delete(self.shares, self.index, axis=0)
        rival = np.maximum.reduce([upscale(other, size).clip(0, 1) for other in others])
        return upscale(self.soft, size).clip(0, 1), rival


def refined_masks(
    model: Model,
    photos: Sequence[Photo],
    nouns: Sequence[str],
    params: MaskParams | None = None,
    *,
    cache: Path | None = None,
) -> Iterator[Event]:
    """The nouns' masks in every photo; ends with Finished(list[dict[str, SoftMask]]), one dict a photo.

    `cache` is a folder: a photo that was looked at with this base and these settings isn't looked at again. Nothing
    global is touched. StudioError for nouns that can't be told apart or read.
    """
    params = params or mask_params(model.kind)
    found = []
    for number, photo in enumerate(photos, start=1):
        masks = _decided(_remembered(model, photo.image, nouns, params, cache), nouns, photo.image, params)
        for noun, mask in masks.items():
            yield Heatmap(noun, mask.soft, photo.image)
            if not mask.binary().any():
                yield Note(f"No '{noun}' was found in {photo.path.name}. Paint its mask, or choose another word.")
        found.append(masks)
        yield Progress(STAGE, number, len(photos))
    yield Finished(found)


def with_masks(
    model: Model,
    photos: Sequence[Photo],
    subjects: Sequence[Subject],
    params: MaskParams | None = None,
    *,
    cache: Path | None = None,
) -> Iterator[Event]:
    """Refined masks for the subjects that have none; ends with Finished(list[Photo]), the given photos untouched.

    A mask that lies beside a photo is kept, and one without a name is its only subject's. A subject that isn't found
    in a photo gets no mask there.
    """
    names = [subject.token.strip("<>") for subject in subjects]
    done = []
    for photo in photos:
        missing = [name not in photo.masks and not ("" in photo.masks and len(names) == 1) for name in names]
        if any(missing):
            masks: list[dict[str, SoftMask]] = []
            for event in refined_masks(model, [photo], [subject.noun for subject in subjects], params, cache=cache):
                if isinstance(event, Finished):
                    masks = event.value
                elif not isinstance(event, Progress):
                    yield event
            own = {
                name: mask.picture()
                for name, mask, wanted in zip(names, masks[0].values(), missing, strict=True)
                if wanted and mask.binary().any()
            }
            photo = replace(photo, masks=photo.masks | own)
        done.append(photo)
        yield Progress(STAGE, len(done), len(photos))
    yield Finished(done)


def noun_masks(
    model: Model, image: Picture, nouns: Sequence[str], *, refine: bool = True, params: MaskParams | None = None
) -> dict[str, SoftMask]:
    """The nouns' masks in one picture (height, width, 3). Without `refine` from the raw cross-attention alone, whatever
    `params` say: no boost, no smoothing, no self-attention."""
    params = params or mask_params(model.kind, refine=refine)
    if not refine:
        params = params.model_copy(update=_PLAIN)
    return _decided(noun_scores(model, image, nouns, params), nouns, image, params)


def noun_scores(model: Model, image: Picture, nouns: Sequence[str], params: MaskParams) -> NDArray[np.float32]:
    """(nouns, h, w) on the base's grid, each from 0 to 1, before they compete; all 0 where nothing stands out."""
    from pipelines.attention.nouns import look_for
    from pipelines.attention.refine import refined, scaled, transition

    seen = look_for(model, image, nouns, params)
    links = transition(seen.links, params.entropy) if params.steps else seen.links
    columns = refined(seen.columns, links, params.steps)
    return scaled(columns.T).unflatten(1, seen.grid).cpu().numpy()


def _decided(
    scores: NDArray[np.float32], nouns: Sequence[str], image: Picture, params: MaskParams
) -> dict[str, SoftMask]:
    import torch

    from pipelines.attention.refine import shares

    parts = shares(torch.from_numpy(scores), params.threshold).numpy()
    size = (image.shape[0], image.shape[1])
    return {noun: SoftMask(noun, index, parts, size) for index, noun in enumerate(nouns)}


def _remembered(
    model: Model, image: Picture, nouns: Sequence[str], params: MaskParams, cache: Path | None
) -> NDArray[np.float32]:
    """`noun_scores`, once per picture, base and settings. Not while a concept is on: the base is another one then."""
    if cache is None or model.placeholders:
        return noun_scores(model, image, nouns, params)
    import torch

    from pipelines.intake import load_tensors

    settings = params.model_dump(mode="json", exclude={"threshold"})
    key = json.dumps([model.fingerprint, str(model.dtype), list(nouns), settings, image.shape]).encode()
    path = cache / f"{hashlib.sha256(key + np.ascontiguousarray(image).tobytes()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            kept = load_tensors(path)[0].get("scores")
        except StudioError:
            kept = None  # damaged: made again
        if kept is not None and kept.ndim == 3 and len(kept) == len(nouns):
            return kept.float().numpy()
    scores = noun_scores(model, image, nouns, params)
    with spare_disk(cache, 0):
        cache.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"scores": torch.from_numpy(scores)})
    return scores
