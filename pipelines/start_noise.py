"""Mean-shifted start noise: the first noise already holds a faint collage of the subjects, so that each has its place.

Paper: Jang et al. 2024 (MuDI), arXiv 2404.04243, section 4.2, algorithm 2 and appendix A.1. With the collage x and its
mask M, the VAE's encoder E and its scale s, and t0 the first timestep that the scheduler visits:

    z  = s E(x) * M                                     (nothing outside the subjects: not the latent of white)
    z0 = sqrt(a_t0) gamma z + sqrt(1 - a_t0) eps        (algorithm 2: the forward process up to t0)

The text's short form, gamma z + eps, leaves the root out and would be about 13 times too strong; algorithm 2 counts.
Schedulers that work on sigmas hold the same picture scaled: gamma z + sigma_0 eps. Both come from the scheduler's own
`add_noise`, divided by its `init_noise_sigma`, by which `generate` multiplies; what the UNet sees first is z0 under
every scheduler. gamma is 2 for two or three subjects and 3 for more (appendix B.9); beyond 4 pictures turn gaudy. It
helps only models that learned with Seg-Mix (B.8). gamma 0 is the plain noise, bit for bit (the algorithm would scale
it by sqrt(1 - a_t0), 0.997).

A collage follows from a picture's own seed, so it is the same in every batch. `Request.start` holds all it is made of
(`pipelines.cutouts`), and so does the recipe of a finished picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.collage import Box, Collage, Piece, Recipe, box_region, cut_out, seg_mix, set_in
from pipelines.errors import StudioError
from pipelines.latents import Latents, small_mask
from pipelines.layout import labels
from pipelines.noise import generator
from pipelines.schedulers import make_scheduler

if TYPE_CHECKING:
    from pipelines.layout import Area
    from pipelines.model import Model
    from pipelines.photos import Mask
    from pipelines.request import Request
    from pipelines.sources import Source

Start = Callable[[Tensor, tuple[int, ...]], Tensor]  # (noise (n, c, h, w), seeds) -> the noise to begin with
Layout = Callable[[int], Collage]  # a picture's seed -> what it should begin as
Pieces = Mapping[str, Sequence[Piece]]  # by subject: its photos, cut out

__all__ = [
    "Box",
    "Layout",
    "Start",
    "box_layout",
    "mask_layout",
    "mean_shift",
    "pieces_of",
    "random_layout",
    "shifted",
    "start_of",
]


def pieces_of(sources: Sequence[Source]) -> dict[str, list[Piece]]:
    """Every subject of `sources`, cut out of each photo that has a mask of it, by token."""
    found: dict[str, list[Piece]] = {}
    for source in sources:
        for token, mask in source.masks.items():
            if (mask > 128).any():
                found.setdefault(token, []).append(cut_out(token, source.image, mask))
    return found


def random_layout(pieces: Pieces, size: tuple[int, int], recipe: Recipe | None = None) -> Layout:
    """A random Seg-Mix collage of (height, width) for each seed, one photo of each subject; the paper's own choice.

    StudioError when a subject has no photo that it could be cut out of.
    """
    known = _checked(pieces)

    def layout(seed: int) -> Collage:
        chance = generator("layout", seed)
        return seg_mix(_chosen(known, chance), size, recipe or Recipe(), chance)

    return layout


def box_layout(pieces: Pieces, boxes: Mapping[str, tuple[float, float, float, float]], size: tuple[int, int]) -> Layout:
    """Each subject in the box (left, top, right, bottom as shares of the canvas) that somebody drew for it."""
    regions = {name: box_region(box, size) for name, box in boxes.items()}
    return mask_layout(pieces, regions, size)


def mask_layout(pieces: Pieces, regions: Mapping[str, Mask], size: tuple[int, int]) -> Layout:
    """Each subject as large as fits into the region that somebody painted, (height, width) uint8 with 255 = here."""
    missing = [name for name in regions if name not in pieces]
    if missing:
        raise StudioError(
            f"A place is marked for {', '.join(missing)}, of which no photo with a mask was given. Add one."
        )
    known = _checked({name: pieces[name] for name in regions})

    def layout(seed: int) -> Collage:
        return set_in(_chosen(known, generator("layout", seed)), regions, size)

    return layout


def start_of(model: Model, request: Request) -> Start | None:
    """What the request's own start noise makes pictures begin as; None for the plain noise. The request has its size.

    StudioError when a cut-out's pixels are not known.
    """
    start = request.start
    if start is None or start.gamma == 0:
        return None
    size = (request.height, request.width)
    pieces: dict[str, list[Piece]] = {}
    for cutout in start.cutouts:
        pieces.setdefault(cutout.word, []).append(cutout.piece)
    regions = start.regions(request.layout)
    if not regions:
        return mean_shift(model, request, random_layout(pieces, size, Recipe(sizes=dict(start.sizes))), start.gamma)
    places = {word: _place([one.area for one in regions if one.words.strip() == word], size) for word in pieces}
    return mean_shift(model, request, mask_layout(pieces, places, size), start.gamma)


def _place(areas: Sequence[Area], size: tuple[int, int]) -> Mask:
    """All areas as one, stretched over the picture: (height, width) uint8, 255 inside."""
    numbers, meaning = labels({str(place): area for place, area in enumerate(areas)}, size)
    return np.where(np.array([bool(one) for one in meaning])[numbers], 255, 0).astype(np.uint8)


def mean_shift(model: Model, request: Request, layout: Layout, gamma: float = 2.0) -> Start:
    """What `generate(start=...)` takes, for this request's size, steps and scheduler. A collage is encoded once.

    StudioError when the layout has another size than the request, and for a gamma that makes no sense.
    """
    if not 0 <= gamma <= 20:
        raise StudioError(f"A start noise shifted {gamma} times can't be painted. Choose 0 (off) to 4; 2 is usual.")
    width, height = request.width or model.native_size, request.height or model.native_size
    model.latent_size(width, height)
    scheduler = make_scheduler(request.scheduler, model.scheduler_config)
    scheduler.set_timesteps(request.steps, device=model.device)
    latents = Latents(model)
    kept: dict[int, Tensor] = {}

    def start(noise: Tensor, seeds: tuple[int, ...]) -> Tensor:
        if gamma == 0:
            return noise
        for seed in seeds:
            if seed not in kept:
                kept.clear()  # seeds come in batches, one after the other
                kept.update({one: encoded(latents, model, layout(one), (height, width)) for one in seeds})
        clean = torch.stack([kept[seed] for seed in seeds])
        return shifted(noise, clean, scheduler, gamma)

    return start


@torch.no_grad()
def encoded(latents: Latents, model: Model, collage: Collage, size: tuple[int, int]) -> Tensor:
    """z of algorithm 2: the scaled mean of the VAE's posterior, zero outside the subjects, (c, h, w) fp32."""
    if collage.image.shape[:2] != size:
        made = f"{collage.image.shape[1]} x {collage.image.shape[0]}"
        raise StudioError(
            f"The layout was made for {made} pixels, the picture has {size[1]} x {size[0]}. Make it anew."
        )
    moments = latents.moments(None, collage.image)
    scaled: Tensor = moments[0] * model.vae.config.scaling_factor
    return scaled * small_mask(collage.mask, model.scale_factor)


def shifted(noise: Tensor, clean: Tensor, scheduler: Any, gamma: float) -> Tensor:
    """`noise` (n, c, h, w) with its mean moved by gamma * `clean`, such that times `init_noise_sigma` it is what
    `scheduler` (its timesteps set) would make of gamma * `clean` at its first timestep."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a timestep that stands twice is taken for its second place
    first = scheduler.timesteps[:1].expand(len(noise))
    wide = noise.float()
    noisy = scheduler.add_noise(gamma * clean.to(wide), wide, first)
    return (noisy / scheduler.init_noise_sigma).to(noise.dtype)


def _checked(pieces: Pieces) -> dict[str, list[Piece]]:
    empty = [name for name, photos in pieces.items() if not photos]
    if empty or not pieces:
        raise StudioError(f"No photo with a mask of {', '.join(empty) or 'any subject'} was given. Add one.")
    return {name: list(photos) for name, photos in pieces.items()}


def _chosen(pieces: Mapping[str, Sequence[Piece]], chance: torch.Generator) -> list[Piece]:
    """One photo of each subject."""
    return [photos[int(torch.randint(len(photos), (1,), generator=chance))] for photos in pieces.values()]
