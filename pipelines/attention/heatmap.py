"""Attention as pictures and as numbers: colours, overlays, one atlas to scrub through, mass inside a mask, IoU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError
from pipelines.events import Picture

if TYPE_CHECKING:
    from pipelines.attention.store import AttentionStore

Values = NDArray[np.float32]  # (height, width), >= 0
COLOURS = "inferno"


@lru_cache
def palette(name: str = COLOURS) -> NDArray[np.uint8]:
    """(256, 3): a matplotlib colour map, dark to bright. StudioError for a name it doesn't know."""
    from matplotlib import colormaps

    if name not in colormaps:
        raise StudioError(f"There is no colour map '{name}'. Choose 'inferno', 'viridis' or another of matplotlib's.")
    table: NDArray[np.uint8] = colormaps[name](np.arange(256) / 255, bytes=True)[:, :3]
    return np.ascontiguousarray(table)


def upscale(values: NDArray[Any], size: tuple[int, int]) -> Values:
    """(h, w) -> (height, width), bilinear (area-weighted where it shrinks)."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))  # mode F
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def scaled(values: NDArray[Any], top: float | None = None) -> Values:
    """`values` from 0 to 1, where 1 is `top` (their maximum, if not given); all 0 when there is nothing."""
    top = float(values.max(initial=0)) if top is None else top
    if not top > 0:
        return np.zeros(values.shape, np.float32)
    return np.clip(values / top, 0, 1).astype(np.float32)


def colour(values: NDArray[Any], top: float | None = None, colours: str = COLOURS) -> Picture:
    """(h, w) -> (h, w, 3) uint8."""
    return palette(colours)[_bytes(scaled(values, top))]


def overlay_rgba(
    values: NDArray[Any], size: tuple[int, int], top: float | None = None, opacity: float = 0.75, colours: str = COLOURS
) -> NDArray[np.uint8]:
    """(height, width, 4) uint8 to lay over a picture of that size: the more attention, the more opaque."""
    level = scaled(upscale(values, size), top)
    return np.dstack([palette(colours)[_bytes(level)], _bytes(level * opacity)])


def overlay(
    values: NDArray[Any],
    picture: Picture | None = None,
    top: float | None = None,
    opacity: float = 0.75,
    colours: str = COLOURS,
) -> Picture:
    """The heat map of `values` (any grid) over `picture` (height, width, 3), as large as the picture.

    Without a picture the heat map alone, its longer side at least 256 pixels.
    """
    if picture is None:
        factor = max(1, -(-256 // max(values.shape)))
        return colour(upscale(values, (values.shape[0] * factor, values.shape[1] * factor)), top, colours)
    layer = overlay_rgba(values, picture.shape[:2], top, opacity, colours)
    alpha = layer[..., 3:].astype(np.float32) / 255
    return _rounded(picture * (1 - alpha) + layer[..., :3] * alpha)


def inside(values: NDArray[Any], mask: NDArray[Any]) -> float:
    """The share of the attention that lies inside `mask` (height, width; nonzero = inside), 0-1; 0 without any."""
    where = _mask(mask)
    spread = upscale(values, where.shape)
    total = float(spread.sum(dtype=np.float64))
    return float(spread[where].sum(dtype=np.float64)) / total if total > 0 else 0.0


def iou(values: NDArray[Any], mask: NDArray[Any], threshold: float = 0.5) -> float:
    """Intersection over union of `mask` with the places where `values` reach `threshold` of their maximum."""
    where = _mask(mask)
    hot = scaled(upscale(values, where.shape)) >= threshold
    union = int((hot | where).sum())
    return int((hot & where).sum()) / union if union else 0.0


def atlas(
    store: AttentionStore, label: str, row: int = 0, max_pixels: int = 16_000_000
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Every map of one word in one picture on a single grey sheet, for a widget that scrubs without asking the server.

    The sheet (uint8, one channel) is a table of cells, all of `index["cell"]` = [height, width] pixels. Column 0 is
    the mean over the steps, column c > 0 the step `index["steps"][c - 1]`. Row r is `index["tracks"][r]`:
    {"site": name or null (all layers), "head": number or null (all heads), "place", "grid": [height, width], "top"}.
    So the cell of track r, column c starts at y = r * cell height, x = c * cell width, and a grey value g means the
    probability g / 255 * top; `top` is the track's greatest value, so each track uses all 256 greys.
    Heads are left out (`index["heads"]` false) when they weren't kept for the mean, or when with them even cells of
    8 pixels don't fit into `max_pixels`; steps are listed as far as they were kept. Where only the mean is kept by
    head, the step cells of single heads are black. StudioError for an unknown label or row.
    """
    tracks = _tracks(store, label, row)
    steps = store.steps
    columns = 1 + len(steps)
    height, width = max((track["grid"] for track in tracks), key=math.prod)
    if _cell(height, width, columns * len(tracks), max_pixels) is None:
        tracks = [track for track in tracks if track["head"] is None]
    cell = _cell(height, width, columns * len(tracks), max_pixels) or _smallest(height, width)
    sheet = np.zeros((len(tracks) * cell[0], columns * cell[1]), np.uint8)
    for place, track in enumerate(tracks):
        strip = _strip(store, label, row, track, steps, cell)
        track["top"] = float(strip.max())
        sheet[place * cell[0] : (place + 1) * cell[0]] = _bytes(scaled(strip))
    index = {
        "label": label,
        "row": row,
        "cell": list(cell),
        "steps": steps,
        "tracks": tracks,
        "heads": any(track["head"] is not None for track in tracks),
    }
    return sheet, index


def _tracks(store: AttentionStore, label: str, row: int) -> list[dict[str, Any]]:
    if row not in range(len(store.maps(label))):
        raise StudioError(f"There is no picture {row}. Choose from 0 to {store.rows - 1}.")
    sites = store.sites()
    finest = max(([site.height, site.width] for site in sites), key=math.prod)
    tracks: list[dict[str, Any]] = [{"site": None, "head": None, "place": None, "grid": finest}]
    for site in sites:
        heads: Sequence[int | None] = [None, *(range(site.heads) if store.detail != "mean" else ())]
        grid = [site.height, site.width]
        tracks += [{"site": site.name, "head": head, "place": site.place, "grid": grid} for head in heads]
    return tracks


def _strip(
    store: AttentionStore, label: str, row: int, track: dict[str, Any], steps: list[int], cell: tuple[int, int]
) -> Values:
    """(cell height, columns * cell width): one track's maps side by side."""
    bare = track["head"] is not None and store.detail != "heads"
    maps = [store.maps(label, site=track["site"], head=track["head"], size=cell)[row]]
    for step in steps:
        blank = np.zeros(cell, np.float32)
        maps.append(blank if bare else store.maps(label, step, track["site"], track["head"], cell)[row])
    return np.concatenate(maps, axis=1)


def _cell(height: int, width: int, cells: int, max_pixels: int) -> tuple[int, int] | None:
    """The finest grid, halved until all cells fit; None when cells under 8 pixels would be needed."""
    while height * width * cells > max_pixels:
        height, width = -(-height // 2), -(-width // 2)
        if min(height, width) < 8:
            return None
    return height, width


def _smallest(height: int, width: int) -> tuple[int, int]:
    while min(height, width) >= 16:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _mask(mask: NDArray[Any]) -> NDArray[np.bool_]:
    if mask.ndim != 2:
        raise StudioError(f"A mask is one grey picture, this has the shape {mask.shape}. Take one channel of it.")
    return mask > 0


def _rounded(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _bytes(values: Values) -> NDArray[np.uint8]:
    return _rounded(values * 255)
