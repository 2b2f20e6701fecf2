"""Layouts as the Generate tab has them: a drawing and some settings, to and from what the engine paints by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines import Area, Heatmap, Layout, Region, StudioError
from studio.parts.painter import Drawn, drawing, regions

Values = Mapping[str, Any]
FINEST, FINE = 1024, 512  # pixels of a drawing's longer side in the browser: at most, and usually


def shape(native: int, width: Any, height: Any) -> list[int]:
    """What the painter shows: (width, height) of the picture, 0 being the base's own."""
    sides = [int(side) if side and 0 < side < 100_000 else native for side in (width, height)]
    return sides if max(sides) < 20 * min(sides) else [native, native]


def layout_of(values: Values) -> Layout | None:
    """The layout that the controls describe, None where there is none or it is switched off.

    StudioError for a region without a word, or one whose word isn't in the prompt.
    """
    drawn = regions(values["layout"]) if values["layout_on"] else []
    if not drawn:
        return None
    prompt = values["prompt"] or ""
    parts = tuple(Region(one.words, Area.of(one.mask), one.occurrence, one.weight) for one in drawn)
    for part in parts:
        if part.words.strip() and part.words.casefold() not in prompt.casefold():
            raise StudioError(
                f"The layout has a region for '{part.words}', which is not in the prompt. Write it there, choose "
                "another word for the region, or take the region out."
            )
    steps = str(values["guided_steps"] or "").strip()
    if steps and not steps.isdecimal():
        raise StudioError(
            f"The layout can't guide '{steps[:20]}' steps. Give a whole number, or leave it empty for all."
        )
    layout = Layout(
        parts,
        strength=_number(values["guide"], "The layout's strength"),
        steps=int(steps) if steps else None,
        negative=_number(values["outside"], "The weight outside"),
        mode="figure" if values["figure"] else "strict",
    )
    layout.check()
    return layout


def _number(value: Any, what: str) -> float:
    if value is None or value == "":
        raise StudioError(f"{what} is empty. Give a number.")
    return float(value)


def layout_values(data: dict[str, Any] | None) -> dict[str, Any]:
    """The controls' values for a request's layout as JSON; without one the drawing stays and is switched off."""
    if data is None:
        return {"layout_on": False}
    layout = Layout.from_json(data)
    return {
        "layout": drawing(_on_one_grid(layout.regions)),
        "layout_on": True,
        "guide": layout.strength,
        "guided_steps": "" if layout.steps is None else str(layout.steps),
        "outside": layout.negative,
        "figure": layout.mode == "figure",
    }


def _on_one_grid(parts: Sequence[Region]) -> list[Drawn]:
    """Regions as the painter takes them: pixel for pixel where they share a size that a browser can draw on."""
    height = min(max(part.area.height for part in parts), FINEST)
    width = min(max(part.area.width for part in parts), FINEST)
    rows, columns = np.arange(height), np.arange(width)
    found = []
    for part in parts:
        at = np.ix_(rows * part.area.height // height, columns * part.area.width // width)
        found.append(Drawn(part.words, part.area.mask[at], part.occurrence, part.weight))
    return found


def found_layout(found: Mapping[str, Heatmap]) -> str:
    """A drawing of the regions that a first pass found, large enough to be painted on."""
    parts = []
    for token, heat in found.items():
        fine = heat.values.repeat(max(1, FINE // heat.values.shape[0]), 0).repeat(
            max(1, FINE // heat.values.shape[1]), 1
        )
        parts.append(Drawn(token, fine > 0.5))
    if not parts:
        raise StudioError(
            "No regions were found yet. Set 'Keep concepts apart' to always under Advanced, and generate."
        )
    return drawing(parts)
