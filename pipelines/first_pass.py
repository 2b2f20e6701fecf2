"""Where concepts will be, before they act: a short first pass with the base's weights, read off its attention.

As FreeFuse (arXiv:2510.23515) does it: the first steps of the same picture are painted without what the concepts
change, the maps of their words are compared with each other and with what is left over, and the picture begins anew
from the same noise. Departure: the maps are the probabilities of all cross-attention layers, not the scores of one
chosen layer grown by its features, so nothing has to be known about the base.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.events import Event, Heatmap, Picture, Preview, Progress
from pipelines.generate import denoise
from pipelines.tokens import find_word

if TYPE_CHECKING:
    from pipelines.regions import Stage
    from pipelines.scene import Scene

SHARE = 0.4  # of the steps; FreeFuse takes 5 of 28 on FLUX, 10 of 30 on SDXL
INSIDE = 0.5  # of a map's greatest value: below, a cell is nobody's


def find_cells(scene: Scene, stage: Stage, first: int) -> Generator[Event, None, Tensor]:
    """The variant number of each cell (pictures, h, w) for the batch from seed `first` on; 0 = nobody's.

    Yields Progress of the stage "regions", and for each picture and concept a Heatmap of its region (1 inside) over a
    rough picture.
    """
    from pipelines.attention.probe import probe_attention
    from pipelines.attention.store import AttentionStore

    model = stage.model
    words = {min(tokens): number for number, tokens in stage.own.items()}
    places = {min(tokens): sorted(_nouns(scene, tokens)) for tokens in stage.own.values()}
    store = AttentionStore(places, budget_mb=0)
    steps = max(1, round(SHARE * scene.request.steps))
    short = replace(scene, request=replace(scene.request, preview_every=steps))
    rough: dict[int, Picture] = {}
    with probe_attention(model.unet, *stage.probes(scene), store) as tap:
        for event in denoise(model, short, first, tap, steps):
            if isinstance(event, Preview):
                rough[event.index] = event.image
            elif isinstance(event, Progress):
                yield Progress("regions", (event.step - 1) % scene.request.steps + 1, steps)
    maps = torch.from_numpy(np.stack([store.maps(word) for word in words]))  # (concepts, pictures, h, w)
    winners = compete(maps)
    for row in range(len(winners)):
        for place, word in enumerate(words, start=1):
            region = (winners[row] == place).float().numpy()
            yield Heatmap(word, region, rough.get(first + row), step=steps)
    return torch.tensor([0, *words.values()])[winners]


def _nouns(scene: Scene, tokens: frozenset[str]) -> set[int]:
    """Where the concept's words stand: the attention of all of them is summed."""
    spans = {span.token for span in scene.prompt.spans}
    return {position for token in tokens & spans for position in find_word(scene.prompt, token)}


def compete(maps: Tensor) -> Tensor:
    """Maps (concepts, pictures, h, w) -> the winner of each cell (pictures, h, w): 0 = nobody, 1 = the first concept.

    Each map is smoothed and scaled to its own greatest value, so that small and large things count alike; a cell goes
    to the greatest if that is high enough, and then to whom most of its neighbours belong.
    """
    smooth = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    scaled = (smooth - low) / (high - low).clamp(min=1e-12)
    value, winner = scaled.max(0)
    winner = torch.where(value >= INSIDE, winner + 1, 0)
    votes = F.one_hot(winner, len(maps) + 1).permute(0, 3, 1, 2).float()
    voted = F.avg_pool2d(votes, 3, 1, 1, count_include_pad=False).argmax(1)
    peaks = scaled >= 0.9999  # nobody loses all
    for place, peak in enumerate(peaks, start=1):
        voted = torch.where(peak, place, voted)
    return voted
