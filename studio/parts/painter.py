"""The painter: regions on a picture as boxes and brush strokes, one colour each. For layouts, and for masks of photos.

The browser draws; what comes from it is checked here before it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from pipelines import StudioError

_HERE = Path(__file__).parent
MOST_REGIONS = 64
LARGEST_SIDE = 2048
BROKEN = "The drawing could not be read. Clear it and draw again."


@dataclass(frozen=True)
class Drawn:
    """One region of a drawing. `mask` is (height, width) bool; `occurrence` 0 is the word's first one, None = every."""

    words: str
    mask: NDArray[np.bool_]
    occurrence: int | None = None
    weight: float = 2.5


def painter(elem_id: str, kind: str, visible: bool = True) -> gr.HTML:
    """The component; `kind` is "layout" (regions get words, are added and removed) or "masks" (regions are given).

    Its value is what `drawing` makes and `regions` reads. Other props, for `gr.update`: `shape` (width, height of the
    picture), `picture` (a data URI that lies under the drawing), `finder` (whether a click may ask for an outline). An
    update of one of them resets those that it doesn't name. Reports `paint` after every change, and `find` (read it
    with `wanted`).
    """
    return gr.HTML(
        "",
        html_template=(_HERE / "painter.html").read_text(encoding="utf-8").replace("KIND", kind),
        js_on_load="\n".join(
            (_HERE / name).read_text(encoding="utf-8") for name in ("strokes.js", "words.js", "painter.js", "keys.js")
        ),
        elem_id=elem_id,
        apply_default_css=False,
        visible=visible,
        shape=[512, 512],
        picture="",
        finder=False,
    )


def drawing(parts: Sequence[Drawn]) -> str:
    """The value of the component for regions on one grid; "" for none."""
    if not parts:
        return ""
    height, width = parts[0].mask.shape
    plain = [
        {"words": one.words, "occurrence": one.occurrence, "weight": one.weight, "runs": _runs(one.mask)}
        for one in parts
    ]
    return json.dumps({"size": [width, height], "regions": plain})


def regions(value: str | None) -> list[Drawn]:
    """What was drawn; StudioError for what no painter of ours sends."""
    if not value:
        return []
    try:
        data = json.loads(value)
        width, height = data["size"]
        if not (type(width) is type(height) is int and 0 < min(width, height) <= max(width, height) <= LARGEST_SIDE):
            raise ValueError("not a size")
        if len(data["regions"]) > MOST_REGIONS:
            raise ValueError("too many regions")
        return [_region(one, (height, width)) for one in data["regions"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StudioError(BROKEN) from error


def _region(data: dict[str, Any], size: tuple[int, int]) -> Drawn:
    occurrence = data["occurrence"]
    if occurrence is not None and type(occurrence) is not int:
        raise TypeError("not an occurrence")
    runs = data["runs"]
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise ValueError("not runs")
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size)
    return Drawn(str(data["words"]), mask, occurrence, float(data["weight"]))


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of stretches of pixels, row by row, outside and inside by turns."""
    flat = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])
    turns = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(run) for run in np.diff(turns, prepend=0)]


def wanted(event: gr.EventData) -> tuple[int, list[float], tuple[float, float]]:
    """Of a `find`: the region's number, a point (x, y) or a box (left, top, right, bottom), and the drawing's size."""
    try:
        data = event._data
        at = [float(value) for value in data["at"]]
        width, height = (float(value) for value in data["size"])
        if len(at) not in (2, 4) or min(width, height) <= 0:
            raise ValueError("neither a point nor a box")
        return int(data["number"]), at, (width, height)
    except (KeyError, TypeError, ValueError) as error:
        raise StudioError(BROKEN) from error
