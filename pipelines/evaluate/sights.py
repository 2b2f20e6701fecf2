"""What a detector says of a picture: boxes, and which of them are the same thing seen twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Sight:
    """One thing that was found, which query it answers to, and how sure that is (0-1)."""

    box: Box
    score: float
    query: int


def apart(sights: Sequence[Sight], overlap: float = 0.5) -> list[Sight]:
    """The surest sight of each thing, the surest first: one that shares more than `overlap` (IoU) with a surer one is
    taken for the same thing."""
    kept: list[Sight] = []
    for one in sorted(sights, key=lambda sight: -sight.score):
        if all(shared(one.box, other.box) <= overlap for other in kept):
            kept.append(one)
    return kept


def shared(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both) if areas > both else 0.0


def widened(box: Box, margin: float, size: tuple[int, int]) -> Box:
    """The box with `margin` of the picture's (height, width) more on each side, kept inside the picture."""
    height, width = size
    left, top, right, bottom = box
    return (
        max(left - margin * width, 0.0),
        max(top - margin * height, 0.0),
        min(right + margin * width, float(width)),
        min(bottom + margin * height, float(height)),
    )
