"""Layout guidance: words are drawn to their regions by a bias on the scores of cross-attention.

Cones 2 (Liu et al. 2023, arXiv:2305.19327, section 3.3, as in the released code), for each layer and picture:

    A = softmax(S + g W ln(1 + sigma^2) std(S)),   S = Q K^T / sqrt(d)

g is the guidance weight, W (queries, tokens) the layout: a word's weight inside its region, a very negative number
outside, 0 for tokens without a region. std is one number, unbiased, over all heads, queries and tokens of the prompt's
row. sigma goes with the guided steps alone: however many there are, it falls from the noisiest level to the cleanest.

Only rows of the prompt are changed, so that they may share a batch with those of the negative prompt. W is interpolated
from the drawing, corner to corner, for every layer's own grid; cells on an edge count as outside.

Departures from the released code: a weight of 0 inside stays 0 (there, it becomes the weight outside); several regions
of one token are joined (there, added, which forbids the token everywhere); a single guided step starts at the noisiest
level (there, at the cleanest).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.attention.protocol import Edit, Site, Step
from pipelines.layout import Bound, Layout


class LayoutGuidance:
    """The probe. `alphas` (train timesteps,) is the base's noise schedule, `steps` how many steps are painted."""

    def __init__(self, layout: Layout, bound: Sequence[Bound], alphas: Tensor, steps: int) -> None:
        self.layout = layout
        self._columns, self._drawn = drawn_weights(layout, bound)
        guided = steps if layout.steps is None else min(layout.steps, steps)
        self._ramp = sigma_ramp(alphas, guided)
        self._grids: dict[tuple[int, int, torch.device], Tensor] = {}

    def wants(self, site: Site) -> Edit | None:
        return Edit() if site.kind == "cross" else None

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        """Nothing is looked at."""

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        """The prompt's rows with their bias; the same tensor after the last guided step."""
        if not self.layout.guides(step.index):
            return logits
        rows = logits[step.cond]
        factor = self.layout.strength * self._ramp[step.index] * rows.flatten(1).std(dim=1)  # (rows,)
        bias = factor[:, None, None] * self._weights(site, logits.device)  # (rows, queries, columns)
        edited = logits.clone()
        edited[step.cond, ..., self._columns] += bias[:, None]
        return edited

    def _weights(self, site: Site, device: torch.device) -> Tensor:
        """W for the tokens that have one: (queries, columns) fp32."""
        key = (site.height, site.width, device)
        if key not in self._grids:
            grid = on_grid(self._drawn, (site.height, site.width))
            self._grids[key] = grid.flatten(1).T.contiguous().to(device)
        return self._grids[key]


def drawn_weights(layout: Layout, bound: Sequence[Bound]) -> tuple[list[int], list[Tensor]]:
    """The tokens that have a region, and for each its weights as drawn: (height, width) fp32."""
    columns = sorted({token for one in bound for token in one.tokens})
    drawn: dict[tuple[int, ...], Tensor] = {}  # tokens of one word share theirs
    found = []
    for column in columns:
        own = tuple(place for place, one in enumerate(bound) if column in one.tokens)
        if own not in drawn:
            drawn[own] = torch.from_numpy(_drawn(layout, bound, own))
        found.append(drawn[own])
    return columns, found


def _drawn(layout: Layout, bound: Sequence[Bound], own: Sequence[int]) -> NDArray[np.float32]:
    """One word's weights as drawn, at the finest of the drawings' sizes."""
    areas = [one.region.area for one in bound]
    size = max(area.height for area in areas), max(area.width for area in areas)
    if layout.mode == "strict":
        weights = np.full(size, layout.negative, np.float32)
    else:
        weights = np.zeros(size, np.float32)
        for place, area in enumerate(areas):
            if place not in own:
                weights[_stretched(area.mask, size)] = layout.negative
    for place in sorted(own, key=lambda place: bound[place].region.weight):
        weights[_stretched(areas[place].mask, size)] = bound[place].region.weight
    return weights


def _stretched(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    if mask.shape == size:
        return mask
    rows, columns = (np.arange(side) * old // side for side, old in zip(size, mask.shape, strict=True))
    return mask[np.ix_(rows, columns)]


def on_grid(drawn: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Weights as drawn -> (words, height, width) on a layer's grid: bilinear, corners on corners, not antialiased."""
    known: dict[int, Tensor] = {}
    for one in drawn:
        if id(one) not in known:
            known[id(one)] = F.interpolate(one[None, None], grid, mode="bilinear", align_corners=True)[0, 0]
    return torch.stack([known[id(one)] for one in drawn])


def sigma_ramp(alphas: Tensor, steps: int) -> list[float]:
    """ln(1 + sigma^2) for each guided step: from the last training timestep evenly down to the first."""
    levels = ((1 - alphas) / alphas).double().sqrt().cpu().numpy()
    times = np.linspace(len(levels) - 1, 0, steps)
    sigmas = np.interp(times, np.arange(len(levels)), levels)
    return [math.log1p(sigma**2) for sigma in sigmas.tolist()]
