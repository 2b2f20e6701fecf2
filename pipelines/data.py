"""Photos as training batches. Every random choice belongs to (seed, step, sample), so a batch is a pure function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.captions import caption, class_prompt
from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.latents import Latents, small_mask
from pipelines.noise import alphas, generator, turn
from pipelines.photos import Mask, Photo, load_photos
from pipelines.processes import Share, join

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.methods import Stage
    from pipelines.model import Model
    from pipelines.params import TrainParams

__all__ = ["Batch", "Data", "Photo", "Source", "load_photos", "prepare"]

Size = tuple[int, int]  # height, width in pixels


@dataclass
class Batch:
    """This process's rows of one step: photos first, then as many class pictures when prior preservation is on."""

    latents: Tensor  # (rows, c, h, w) fp32, sampled and scaled
    noise: Tensor  # (rows, c, h, w) fp32
    timesteps: Tensor  # (rows,) int64
    captions: list[str]
    masks: Tensor | None  # (rows, 1, h, w) fp32 in [0, 1], 1 = subject; ones where there is no mask
    prior: Tensor  # (rows,) bool: class pictures
    original_sizes: list[Size] = field(default_factory=list)
    crops: list[Size] = field(default_factory=list)  # top, left
    target_sizes: list[Size] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """One picture to learn from, its short side at the training resolution."""

    image: Picture  # (height, width, 3)
    caption: str
    original: Size
    mask: Mask | None = None


@dataclass(frozen=True)
class _Sample:
    """One row of a batch before it is stacked."""

    latents: Tensor
    noise: Tensor
    timestep: int
    mask: Tensor | None
    corner: Size


@dataclass
class Data:
    """What a run learns from. `latents` remembers what the VAE said; `share` is this process's part of each batch."""

    model: Model
    params: TrainParams
    subjects: tuple[Subject, ...]
    seed: int
    sources: list[Source]
    prior: list[Source]
    latents: Latents
    resolution: int
    share: Share = field(default_factory=Share)

    def batches(self, stage: Stage, start: int = 0) -> Iterator[Batch]:
        """The batches of the steps after `start` up to stage.steps. The same ones whoever asks and however often.

        StudioError when the processes can't share the batch evenly: their mean would not be the batch's mean.
        """
        if stage.batch_size % self.share.count:
            raise StudioError(
                f"A batch of {stage.batch_size} can't be shared by {self.share.count} processes. "
                f"Set batch_size to a multiple of {self.share.count}, or start fewer processes."
            )
        return (self.batch(stage, step) for step in range(start + 1, stage.steps + 1))

    def batch(self, stage: Stage, step: int) -> Batch:
        """The rows of step number `step` (from 1) that fall to this process."""
        mine = stage.batch_size // self.share.count
        indices = range(self.share.index * mine, (self.share.index + 1) * mine)
        rows = [("photo", self.sources, index) for index in indices]
        if self.prior:
            rows += [("prior", self.prior, index) for index in indices]
        chosen = [
            (sources, turn(len(sources), (step - 1) * stage.batch_size + index, what, self.seed, stage.name))
            for what, sources, index in rows
        ]
        samples = [
            self._sample(sources[number], (what, number), generator("sample", what, self.seed, stage.name, step, index))
            for (what, _, index), (sources, number) in zip(rows, chosen, strict=True)
        ]
        sources = [sources[number] for sources, number in chosen]
        return self._stacked(samples, sources, [what == "prior" for what, _, _ in rows])

    def digest(self) -> str:
        """A hash of everything learned from, so that a run is not resumed on other photos."""
        digest = hashlib.sha256(f"{self.resolution}".encode())
        for source in [*self.sources, *self.prior]:
            for part in (source.image, source.mask):
                digest.update(b"-" if part is None else str(part.shape).encode() + part.tobytes())
            digest.update(f"{source.caption}|{source.original}".encode())
        return digest.hexdigest()

    def _sample(self, source: Source, name: tuple[str, int], chance: torch.Generator) -> _Sample:
        """All draws are made in a fixed order, used or not, so that no setting shifts another's."""
        t, across, down, mirrored = torch.rand(4, generator=chance, dtype=torch.float64).tolist()
        flip = self.params.flip and mirrored < 0.5
        height, width = source.image.shape[:2]
        corner = self._corner(height, down), self._corner(width, across)
        moments = self.latents.moments((*name, corner, flip), self._cut(source.image, corner, flip))
        noise = torch.randn(moments.shape, generator=chance)  # the posterior's draw, the diffusion's noise
        mask = (
            None if source.mask is None else small_mask(self._cut(source.mask, corner, flip), self.model.scale_factor)
        )
        timestep = int(t * len(alphas(self.model)))
        return _Sample(self.latents.sample(moments, noise[0]), noise[1], timestep, mask, corner)

    def _corner(self, side: int, chance: float) -> int:
        """Where the crop starts: the middle, or a random latent cell (so few places that the cache knows them)."""
        room = side - self.resolution
        cell = self.model.scale_factor
        return cell * int(chance * (room // cell + 1)) if self.params.random_crop else room // 2

    def _cut(self, picture: Picture, corner: Size, flip: bool) -> Picture:
        top, left = corner
        cut = picture[top : top + self.resolution, left : left + self.resolution]
        return cut[:, ::-1] if flip else cut

    def _stacked(self, samples: Sequence[_Sample], sources: Sequence[Source], prior: list[bool]) -> Batch:
        device = self.model.device
        masks = None
        if any(sample.mask is not None for sample in samples):
            whole = torch.ones_like(samples[0].latents[:1])
            masks = torch.stack([whole if sample.mask is None else sample.mask for sample in samples]).to(device)
        return Batch(
            latents=torch.stack([sample.latents for sample in samples]).to(device),
            noise=torch.stack([sample.noise for sample in samples]).to(device),
            timesteps=torch.tensor([sample.timestep for sample in samples], device=device),
            captions=[source.caption for source in sources],
            masks=masks,
            prior=torch.tensor(prior, device=device),
            original_sizes=[source.original for source in sources],
            crops=[sample.corner for sample in samples],
            target_sizes=[(self.resolution, self.resolution)] * len(samples),
        )


def prepare(
    model: Model,
    photos: Sequence[Photo],
    params: TrainParams,
    subjects: Sequence[Subject],
    seed: int,
    *,
    prior: Sequence[tuple[Picture, str]] = (),
) -> Data:
    """Photos (and class pictures with their prompts, see prior.py) ready to train on.

    StudioError when there is nothing to learn from, when a mask or a noun is missing, or when prior preservation has no
    pictures.
    """
    if not photos or not subjects:
        raise StudioError("There are no photos to learn from. Add three or more, then train again.")
    if params.prior_weight and not prior:
        words = class_prompt(subjects[0])
        raise StudioError(f"Prior preservation needs pictures of '{words}'. Make them first, or set prior_weight to 0.")
    resolution = params.resolution or model.native_size
    model.latent_size(resolution, resolution)
    names = [subject.token.strip("<>") for subject in subjects]
    sources = [
        Source(
            _scaled(photo.image, resolution),
            caption(photo.caption, subjects, photo.path.name),
            _original(photo),
            _mask(photo, names, resolution, params.masked_loss),
        )
        for photo in photos
    ]
    pictures = [
        Source(_scaled(image, resolution), words, (image.shape[0], image.shape[1]))
        for image, words in (prior if params.prior_weight else ())
    ]
    share = join()
    return Data(model, params, tuple(subjects), seed, sources, pictures, Latents(model), resolution, share)


def _mask(photo: Photo, names: Sequence[str], resolution: int, needed: bool) -> Mask | None:
    """The masks of the subjects, as one. Those of other names belong to things that aren't learned."""
    masks = [mask for name, mask in photo.masks.items() if not name or name in names]
    if masks:
        return _scaled(np.maximum.reduce(masks), resolution)
    if needed:
        others = f" (there is one for {', '.join(photo.masks)})" if photo.masks else ""
        raise StudioError(
            f"{photo.path.name} has no mask of {', '.join(names)}{others}. Draw {photo.path.stem}-masklabel.png, "
            "or train without masks."
        )
    return None


def _scaled(picture: Picture, short_side: int) -> Picture:
    height, width = picture.shape[:2]
    scale = short_side / min(height, width)
    if scale == 1:
        return np.ascontiguousarray(picture)
    sides = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(sides, Image.Resampling.BICUBIC))


def _original(photo: Photo) -> Size:
    width, height = photo.size
    return (height, width) if width else (photo.image.shape[0], photo.image.shape[1])
