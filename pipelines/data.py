"""Photos as training batches. Every random choice belongs to (seed, step, sample), so a batch is a pure function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.augment import Augment
from pipelines.batch import Batch
from pipelines.captions import class_prompt
from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.latents import Latents, small_mask
from pipelines.noise import alphas, generator, turn
from pipelines.photos import Photo, load_photos
from pipelines.processes import Share, join
from pipelines.sources import ClassPicture, Mixer, Size, Source, class_source, photo_source

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.methods import Stage
    from pipelines.model import Model
    from pipelines.params import TrainParams

__all__ = ["Batch", "ClassPicture", "Data", "Mixer", "Photo", "Source", "load_photos", "prepare"]


@dataclass(frozen=True)
class _Sample:
    """One row of a batch before it is stacked."""

    source: Source  # what the row shows, a collage perhaps
    latents: Tensor
    noise: Tensor
    timestep: int
    masks: dict[str, Tensor]  # by subject, (1, h, w)
    mask: Tensor | None  # all subjects' as one
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
    mixer: Mixer | None = None  # photo rows go through it
    class_mixer: Mixer | None = None  # class pictures through this one, whenever the photo of their number is mixed
    augment: Augment = field(default_factory=Augment)

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
        samples = []
        for (what, _, index), (sources, number) in zip(rows, chosen, strict=True):
            chance, photo = (generator("sample", kind, self.seed, stage.name, step, index) for kind in (what, "photo"))
            mixing = generator("mix", photo.initial_seed())  # one draw for a photo and its class picture
            samples.append(self._sample(sources[number], (what, number), chance, mixing))
        return self._stacked(samples, [what == "prior" for what, _, _ in rows])

    def digest(self) -> str:
        """A hash of everything learned from, so that a run is not resumed on other photos."""
        digest = hashlib.sha256(f"{self.resolution}".encode())
        for source in [*self.sources, *self.prior]:
            for part in (source.image, *source.masks.values()):
                digest.update(str(part.shape).encode() + part.tobytes())
            digest.update(f"{source.caption}|{source.original}|{list(source.masks)}|{source.shows}".encode())
            digest.update("".join(f"|{text}" for text in source.others).encode())
        return digest.hexdigest()

    def _sample(
        self, source: Source, name: tuple[str, int], chance: torch.Generator, mixing: torch.Generator
    ) -> _Sample:
        """All draws are made in a fixed order, used or not, so that no setting shifts another's."""
        t, across, down, mirrored = torch.rand(4, generator=chance, dtype=torch.float64).tolist()
        source, key = self._mixed(source, name, mixing)
        own = key is not None  # a collage's caption may say who is left, so it is neither mirrored nor turned
        flip = self.params.flip and mirrored < self.augment.flip_chance and own
        if own:
            source = source.told(generator("caption", chance.initial_seed()))
        if own and name[0] == "photo":
            turned = self.augment.turned(source, generator("turn", chance.initial_seed()), self.resolution)
            source, key = turned, key if turned is source else None  # nobody will see this angle again
        height, width = source.image.shape[:2]
        corner = self._corner(height, down), self._corner(width, across)
        picture = self._cut(source.image, corner, flip)
        moments = self.latents.moments(key and (*key, corner, flip), picture)
        noise = torch.randn(moments.shape, generator=chance)  # the posterior's draw, the diffusion's noise
        of_photo = source.masks if name[0] == "photo" else {}  # a class picture counts everywhere
        masks = {token: self._small(mask, corner, flip) for token, mask in of_photo.items()}
        together = source.mask if len(masks) > 1 else None
        mask = next(iter(masks.values()), None) if together is None else self._small(together, corner, flip)
        timestep = int(t * len(alphas(self.model)))
        return _Sample(source, self.latents.sample(moments, noise[0]), noise[1], timestep, masks, mask, corner)

    def _mixed(
        self, source: Source, name: tuple[str, int], chance: torch.Generator
    ) -> tuple[Source, tuple[str, int] | None]:
        """The source or a collage that nobody will see again, and so is not remembered."""
        mixer, others = (self.mixer, self.sources) if name[0] == "photo" else (self.class_mixer, self.prior)
        if mixer is None:
            return source, name
        mixed = mixer.mix(source, others, chance, self.resolution)
        return mixed, name if mixed is source else None

    def _small(self, mask: Picture, corner: Size, flip: bool) -> Tensor:
        return small_mask(self._cut(mask, corner, flip), self.model.scale_factor)

    def _corner(self, side: int, chance: float) -> int:
        """Where the crop starts: the middle, or a random latent cell (so few places that the cache knows them)."""
        room = side - self.resolution
        cell = self.model.scale_factor
        return cell * int(chance * (room // cell + 1)) if self.params.random_crop else room // 2

    def _cut(self, picture: Picture, corner: Size, flip: bool) -> Picture:
        top, left = corner
        cut = picture[top : top + self.resolution, left : left + self.resolution]
        return cut[:, ::-1] if flip else cut

    def _stacked(self, samples: Sequence[_Sample], prior: list[bool]) -> Batch:
        device, sources = self.model.device, [sample.source for sample in samples]
        masks, each = self._masks(samples)
        shows = [() if other else source.shows for source, other in zip(sources, prior, strict=True)]
        return Batch(
            latents=torch.stack([sample.latents for sample in samples]).to(device),
            noise=torch.stack([sample.noise for sample in samples]).to(device),
            timesteps=torch.tensor([sample.timestep for sample in samples], device=device),
            captions=[source.caption for source in sources],
            masks=None if masks is None else masks.to(device),
            prior=torch.tensor(prior, device=device),
            original_sizes=[source.original for source in sources],
            crops=[sample.corner for sample in samples],
            target_sizes=[(self.resolution, self.resolution)] * len(samples),
            subject_masks=None if each is None else each.to(device),
            shown=torch.tensor([[s.token in who for s in self.subjects] for who in shows], device=device),
            mixed=torch.tensor([source.mixed for source in sources], device=device),
        )

    def _masks(self, samples: Sequence[_Sample]) -> tuple[Tensor | None, Tensor | None]:
        """All subjects' masks as one, ones where there is none; and one each, zeros where there is none."""
        if not any(sample.masks for sample in samples):
            return None, None
        whole = torch.ones_like(samples[0].latents[:1])
        none = torch.zeros_like(whole)
        masks = torch.stack([whole if sample.mask is None else sample.mask for sample in samples])
        tokens = [subject.token for subject in self.subjects]
        each = [torch.cat([sample.masks.get(token, none) for token in tokens]) for sample in samples]
        return masks, torch.stack(each)


def prepare(
    model: Model,
    photos: Sequence[Photo],
    params: TrainParams,
    subjects: Sequence[Subject],
    seed: int,
    *,
    prior: Sequence[ClassPicture | tuple[Picture, str]] = (),
    mixer: Mixer | None = None,
    class_mixer: Mixer | None = None,
    augment: Augment | None = None,
) -> Data:
    """Photos (and class pictures with their prompts, see prior.py) ready to train on; mixers make collages of them.

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
    sources = [photo_source(photo, subjects, resolution, masked=params.masked_loss) for photo in photos]
    if mixer is not None:
        mixer.check(sources)
    pictures = [class_source(ClassPicture(*one), resolution) for one in (prior if params.prior_weight else ())]
    whole = (model, params, tuple(subjects), seed, sources, pictures, Latents(model), resolution, join())
    return Data(*whole, mixer, class_mixer, augment or Augment())
