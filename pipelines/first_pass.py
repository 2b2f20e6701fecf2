"""Where concepts will be, before they act: a short first pass with the base's weights, and masks of its nouns.

As FreeFuse (arXiv:2510.23515) does it: the first steps of the same picture are painted without what the concepts
change, each concept's place is read off attention, and the picture begins anew from the same noise. Departure: what
the first steps show is looked at as a photo would be (`pipelines.masks`), so that no layer has to be chosen by hand.
Concepts whose masks don't tell them apart (the same noun, or a base that mixes nouns up) share the things in the
picture out by where their own words were looked for.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.events import Event, Heatmap, Progress
from pipelines.generate import decode, denoise
from pipelines.preview import to_uint8
from pipelines.tokens import find_word

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.regions import Stage
    from pipelines.scene import Scene

SHARE = 0.4  # of the steps; FreeFuse takes 5 of 28 on FLUX, 10 of 30 on SDXL
INSIDE = 0.5  # of a map's greatest value: below, a cell is nobody's
MOST = 0.6  # of the picture: a larger mask is of the background
SMALL = 0.2  # of the largest piece: smaller ones are crumbs


def find_cells(scene: Scene, stage: Stage, first: int) -> Generator[Event, None, Tensor]:
    """The variant number of each cell (pictures, h, w) for the batch from seed `first` on; 0 = nobody's.

    Yields Progress of the stage "regions", and for each picture and concept a Heatmap of its region (1 inside) over
    what the first pass shows.
    """
    from pipelines.attention.probe import probe_attention
    from pipelines.attention.store import AttentionStore

    words = {min(tokens): number for number, tokens in stage.own.items()}
    nouns = {min(tokens): _nouns(scene, tokens) for tokens in stage.own.values()}
    store = AttentionStore({min(tokens): _positions(scene, tokens) for tokens in stage.own.values()}, budget_mb=0)
    steps = max(1, round(SHARE * scene.request.steps))
    with probe_attention(stage.model.unet, store) as tap:
        work = denoise(stage.model, scene, first, tap, steps)
        clean = yield from _followed(work, scene.request.steps, steps)
    maps = torch.from_numpy(np.stack([store.maps(word) for word in words]))  # (concepts, pictures, h, w)
    maps = F.interpolate(maps, scene.size, mode="bilinear")
    cells = []
    for row, latents in enumerate(clean.split(1)):
        picture = to_uint8(decode(stage.model, latents)[0])
        winners = split_masks(noun_areas(stage, picture, nouns, scene.size), maps[:, row])
        for place, word in enumerate(words, start=1):
            yield Heatmap(word, (winners == place).float().numpy(), picture, step=steps)
        cells.append(torch.tensor([0, *words.values()])[winners])
    return torch.stack(cells)


def _followed(work: Generator[Event, None, Tensor], whole: int, steps: int) -> Generator[Event, None, Tensor]:
    """The first pass with progress of its own, and without previews of what will not be."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            clean: Tensor = end.value
            return clean
        if isinstance(event, Progress):
            yield Progress("regions", (event.step - 1) % whole + 1, steps)


def _nouns(scene: Scene, tokens: frozenset[str]) -> list[str]:
    """What the concept's subjects are called."""
    return sorted({span.expansion.noun for span in scene.prompt.spans if span.token in tokens and span.expansion.noun})


def _positions(scene: Scene, tokens: frozenset[str]) -> list[int]:
    """Where the concept's words stand: the attention of all of them is summed."""
    spans = {span.token for span in scene.prompt.spans}
    return sorted({position for token in tokens & spans for position in find_word(scene.prompt, token)})


def noun_areas(stage: Stage, picture: Picture, nouns: Mapping[str, list[str]], size: tuple[int, int]) -> list[Tensor]:
    """For each concept where its nouns are in the picture: (h, w) bool, the nouns competing with each other."""
    from pipelines.masks import noun_masks

    every = list(dict.fromkeys(noun for group in nouns.values() for noun in group))
    masks = {
        noun: torch.from_numpy(mask.binary(size)) for noun, mask in noun_masks(stage.model, picture, every).items()
    }
    nothing = torch.zeros(size, dtype=torch.bool)
    return [torch.stack([nothing, *(masks[noun] for noun in group)]).any(0) for group in nouns.values()]


def split_masks(areas: list[Tensor], maps: Tensor) -> Tensor:
    """Areas (h, w) bool and maps (concepts, h, w) -> winners (h, w): 0 = nobody, 1 = the first concept.

    Where several concepts have an area, the one wins whose words look there most. When one has none, or all but the
    whole picture, and there are as many things as concepts, each gets the thing its words look at more than others do;
    else it takes what its words look at most, as far as that is nobody's.
    """
    level = _scaled(maps[:, None])[:, 0]
    claims = torch.stack([area if area.float().mean() <= MOST else torch.zeros_like(area) for area in areas])
    if not claims.flatten(1).any(1).all():
        things = pieces(claims.any(0))
        if len(things) >= len(areas):
            return _dealt(things, level)
    strongest = torch.where(claims, level, -1.0).argmax(0)
    winners = torch.where(claims.any(0), strongest + 1, 0)
    spare = compete(maps[:, None])[0]
    for place in range(1, len(areas) + 1):
        if not (winners == place).any():
            winners = torch.where((spare == place) & (winners == 0), place, winners)
    return winners


def pieces(area: Tensor) -> list[Tensor]:
    """The connected parts of an area (h, w) bool, crumbs left out."""
    count, labels = cv2.connectedComponents(area.numpy().astype(np.uint8), connectivity=8)
    parts = [torch.from_numpy(labels == number) for number in range(1, count)]
    largest = max((int(part.sum()) for part in parts), default=0)
    return [part for part in parts if int(part.sum()) >= SMALL * largest]


def _dealt(things: list[Tensor], level: Tensor) -> Tensor:
    """Each concept the thing that fits it best, all together; what is left goes to whom it fits best."""
    from scipy.optimize import linear_sum_assignment

    share = level / level.sum(0).clamp(min=1e-6)
    fit = torch.stack([share[:, thing].mean(1) for thing in things], 1)  # (concepts, things)
    winners = torch.zeros(level.shape[1:], dtype=torch.long)
    owner = fit.argmax(0)
    for concept, thing in zip(*linear_sum_assignment(-fit.numpy()), strict=True):
        owner[thing] = int(concept)
    for thing, place in zip(things, owner.tolist(), strict=True):
        winners[thing] = place + 1
    return winners


def _scaled(maps: Tensor) -> Tensor:
    """Maps (concepts, pictures, h, w), smoothed, each from 0 to 1."""
    smooth = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    return (smooth - low) / (high - low).clamp(min=1e-12)


def compete(maps: Tensor) -> Tensor:
    """Maps (concepts, pictures, h, w) -> the winner of each cell (pictures, h, w): 0 = nobody, 1 = the first concept.

    Each map is smoothed and scaled to its own greatest value, so that small and large things count alike; a cell goes
    to the greatest if that is high enough, and then to whom most of its neighbours belong.
    """
    scaled = _scaled(maps)
    value, winner = scaled.max(0)
    winner = torch.where(value >= INSIDE, winner + 1, 0)
    votes = F.one_hot(winner, len(maps) + 1).permute(0, 3, 1, 2).float()
    voted = F.avg_pool2d(votes, 3, 1, 1, count_include_pad=False).argmax(1)
    peaks = scaled >= 0.9999  # nobody loses all
    for place, peak in enumerate(peaks, start=1):
        voted = torch.where(peak, place, voted)
    return voted
