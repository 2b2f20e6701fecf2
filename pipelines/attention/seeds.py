"""A mark in a picture spread over the thing it is on, by self-attention: iSeg's points, lines and boxes.

Method: iSeg (Sun et al. 2024, arXiv 2409.03209), the modes of its desktop program. No noun is named: a mark is a column
of cells instead of cross-attention, refined as nouns are (`pipelines.attention.refine`):

    point   1 in its cell                      line   one column for each cell that it touches
    box     1 in all its cells                 each column by itself:  N rounds,  then divided by its greatest value

and the columns of one thing are averaged. Several clicks count as the cells of a line do. Departures: the base looks
at the picture several times (there once), sharpened links aren't cut at 1 (there for marks they are), a box smaller
than a cell is that cell (there a division by 0), and what is outside a box is not the thing (there the box is only a
seed; on Toybox the mean IoU rose from 0.57 to 0.80).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.attention.gaze import Gaze, Grid, clean_latents, fitted, look_at, self_sites
from pipelines.attention.refine import refined, scaled, transition

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.marks import Marking, Point
    from pipelines.masks import MaskParams
    from pipelines.model import Model

PROMPT = " "  # what the base reads while it looks; no word is meant


def cell_links(model: Model, image: Picture, params: MaskParams) -> tuple[Tensor, Grid]:
    """P of the refinement, (cells, cells) with rows that sum to 1, and its grid; once for all marks in a picture."""
    gaze = Gaze(selves=self_sites(model, params.layers))
    latents = clean_latents(model, fitted(model, image))
    text = model.encode([PROMPT])
    look_at(model, latents, text, gaze, timestep=params.timestep, draws=params.draws, seed=params.seed)
    links, grid = gaze.links()
    return transition(links, params.entropy), grid


def spread(links: Tensor, columns: Tensor, steps: int) -> Tensor:
    """Seeds (cells, n) of one thing, refined each by itself -> its score (cells,) from 0 to 1."""
    return scaled(scaled(refined(columns, links, steps).T).mean(0))


def seed_columns(marking: Marking, size: tuple[int, int], grid: Grid) -> Tensor:
    """What is marked as on the thing, as seeds (cells, n) on `grid`; the marks are in a picture of `size` (width,
    height)."""
    spots = [_cell(point, size, grid) for point in marking.clicks]
    for line in marking.lines:
        spots += touched(line, size, grid)
    columns = [_column([spot], grid) for spot in dict.fromkeys(spots)]
    if marking.box is not None:
        columns.append(_column(_inside(marking.box, size, grid), grid))
    return torch.stack(columns, 1)


def room(marking: Marking, size: tuple[int, int], grid: Grid) -> Tensor:
    """1 in the cells (cells,) that the thing may have: those of its box, or all."""
    if marking.box is None:
        return torch.ones(grid[0] * grid[1])
    return _column(_inside(marking.box, size, grid), grid)


def away_columns(marking: Marking, size: tuple[int, int], grid: Grid) -> Tensor:
    """What is marked as not on the thing, as seeds (cells, n); n may be 0."""
    spots = dict.fromkeys(_cell(point, size, grid) for point in marking.away)
    return torch.stack([_column([spot], grid) for spot in spots], 1) if spots else torch.zeros(grid[0] * grid[1], 0)


def touched(line: Sequence[Point], size: tuple[int, int], grid: Grid) -> list[tuple[int, int]]:
    """The cells (row, column) that a line through two or more points passes, in order."""
    found: dict[tuple[int, int], None] = {}
    for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
        wide, tall = abs(x1 - x0) * grid[1] / size[0], abs(y1 - y0) * grid[0] / size[1]
        count = 8 * math.ceil(wide + tall) + 1  # eight looks a cell: a corner that is only grazed may be left out
        for step in range(count + 1):
            share = step / count
            found[_cell((x0 + share * (x1 - x0), y0 + share * (y1 - y0)), size, grid)] = None
    return list(found)


def _cell(point: Point, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
    """The row and column of the cell that a point lies in; one on the far edge lies in the last."""
    column, row = int(point[0] * grid[1] / size[0]), int(point[1] * grid[0] / size[1])
    return min(max(row, 0), grid[0] - 1), min(max(column, 0), grid[1] - 1)


def _inside(box: tuple[float, float, float, float], size: tuple[int, int], grid: Grid) -> list[tuple[int, int]]:
    """The cells whose middle lies in the box; the one in its middle when there is none."""
    left, top, right, bottom = box
    rows = [row for row in range(grid[0]) if top <= (row + 0.5) * size[1] / grid[0] <= bottom]
    columns = [column for column in range(grid[1]) if left <= (column + 0.5) * size[0] / grid[1] <= right]
    middle = _cell(((left + right) / 2, (top + bottom) / 2), size, grid)
    return [(row, column) for row in rows or [middle[0]] for column in columns or [middle[1]]]


def _column(spots: Sequence[tuple[int, int]], grid: Grid) -> Tensor:
    """(cells,) with 1 in the given cells."""
    column = torch.zeros(grid)
    for row, across in spots:
        column[row, across] = 1
    return column.flatten()
