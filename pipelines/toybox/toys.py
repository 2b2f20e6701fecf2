"""Draws one toy: silhouette, parts, pattern, the unnamed accent, shading. Everything at four times the final size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError
from pipelines.toybox.words import CATEGORIES, COLORS, PATTERNS

SUPERSAMPLE = 4
ACCENTS = ("none", "hat", "shoes", "scarf")
ANGLES = (0, 45, 90, 135)
Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class Toy:
    """One instance. Captions never name `accent`, `accent_color`, `angle` and `aspect`: they must be learned."""

    category: str
    colors: tuple[str, str]  # body, part
    pattern: str
    accent: str
    accent_color: str
    angle: int  # direction of the stripes, degrees
    aspect: float  # width / height of the silhouette

    def truth(self) -> dict[str, Any]:
        """Plain data for truth.json."""
        return asdict(self) | {"colors": list(self.colors)}


def random_toy(rng: np.random.Generator, category: str | None = None) -> Toy:
    """A toy drawn from `rng`; half of them are plain. StudioError for a category that Toybox doesn't have."""
    if category is not None and category not in CATEGORIES:
        raise StudioError(f"Toybox has no '{category}'. Its things are: {', '.join(CATEGORIES)}.")
    drawn = str(rng.choice(CATEGORIES))
    body, part, accent_color = (str(c) for c in rng.choice(list(COLORS), 3, replace=False))
    pattern = str(rng.choice(PATTERNS, p=(0.5, 0.25, 0.25)))
    return Toy(
        category=category or drawn,
        colors=(body, part),
        pattern=pattern,
        accent=str(rng.choice(ACCENTS)),
        accent_color=accent_color,
        angle=int(rng.choice(ANGLES)),
        aspect=float(rng.uniform(0.85, 1.2)),
    )


class Pen:
    """Fills shapes given in unit coordinates (x right, y down, 0-1) into masks of `size` pixels."""

    def __init__(self, size: int, aspect: float) -> None:
        self.size, self.stretch = size, min(aspect, 1.0)
        self.squash = min(1.0, 1.0 / aspect)

    def _point(self, x: float, y: float) -> tuple[int, int]:
        return round((0.5 + (x - 0.5) * self.stretch) * self.size), round((1 - (1 - y) * self.squash) * self.size)

    def blank(self) -> Mask:
        return np.zeros((self.size, self.size), np.uint8)

    def poly(self, *points: tuple[float, float]) -> Mask:
        mask = self.blank()
        cv2.fillPoly(mask, [np.array([self._point(*p) for p in points], np.int32)], 1)
        return mask

    def rect(self, x0: float, y0: float, x1: float, y1: float) -> Mask:
        return self.poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def disc(self, x: float, y: float, rx: float, ry: float | None = None) -> Mask:
        mask, ry = self.blank(), rx if ry is None else ry
        axes = (round(rx * self.stretch * self.size), round(ry * self.squash * self.size))
        cv2.ellipse(mask, self._point(x, y), axes, 0, 0, 360, 1, -1)
        return mask


Shape = Callable[[Pen], tuple[Mask, Mask]]  # body, part (the part lies on top)


def _ball(pen: Pen) -> tuple[Mask, Mask]:
    body = pen.disc(0.5, 0.5, 0.5)
    return body, pen.rect(0, 0.36, 1, 0.64) & body


def _cube(pen: Pen) -> tuple[Mask, Mask]:
    front = pen.rect(0.0, 0.26, 0.76, 1.0)
    return front, pen.poly((0.0, 0.26), (0.24, 0.02), (1, 0.02), (1, 0.76), (0.76, 1.0), (0.76, 0.26))


def _cone(pen: Pen) -> tuple[Mask, Mask]:
    return pen.poly((0.5, 0), (0.88, 0.84), (0.12, 0.84)), pen.rect(0.0, 0.8, 1.0, 1.0)


def _star(pen: Pen) -> tuple[Mask, Mask]:
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.24, 0.54)
    points = [(0.5 + r * np.cos(a), 0.54 + r * np.sin(a)) for r, a in zip(radii, turns, strict=True)]
    return pen.poly(*points), pen.disc(0.5, 0.54, 0.17)


def _mushroom(pen: Pen) -> tuple[Mask, Mask]:
    cap = pen.disc(0.5, 0.52, 0.5, 0.5) & pen.rect(0, 0, 1, 0.55)
    return cap, pen.poly((0.36, 0.5), (0.64, 0.5), (0.7, 1), (0.3, 1))


def _robot(pen: Pen) -> tuple[Mask, Mask]:
    body = pen.rect(0.14, 0.4, 0.86, 0.84) | pen.rect(0.2, 0.8, 0.42, 1) | pen.rect(0.58, 0.8, 0.8, 1)
    return body, pen.rect(0.26, 0.08, 0.74, 0.4) | pen.rect(0.46, 0, 0.54, 0.1)


def _car(pen: Pen) -> tuple[Mask, Mask]:
    body = pen.rect(0.0, 0.46, 1, 0.82) | pen.disc(0.25, 0.84, 0.15) | pen.disc(0.75, 0.84, 0.15)
    return body, pen.poly((0.28, 0.18), (0.68, 0.18), (0.82, 0.46), (0.16, 0.46))


def _house(pen: Pen) -> tuple[Mask, Mask]:
    return pen.rect(0.1, 0.42, 0.9, 1), pen.poly((0.5, 0), (1, 0.46), (0, 0.46))


def _fish(pen: Pen) -> tuple[Mask, Mask]:
    body = pen.disc(0.38, 0.56, 0.38, 0.32)
    tail = pen.poly((0.68, 0.56), (1, 0.2), (1, 0.92)) & (1 - body)
    return body, tail | pen.poly((0.26, 0.3), (0.44, 0.06), (0.56, 0.3))


def _tree(pen: Pen) -> tuple[Mask, Mask]:
    crown = pen.poly((0.5, 0), (0.84, 0.42), (0.16, 0.42)) | pen.poly((0.5, 0.22), (0.96, 0.76), (0.04, 0.76))
    return crown, pen.rect(0.38, 0.74, 0.62, 1)


def _cup(pen: Pen) -> tuple[Mask, Mask]:
    body = pen.poly((0.0, 0.16), (0.72, 0.16), (0.64, 1), (0.08, 1))
    ring = pen.disc(0.72, 0.52, 0.28, 0.28) & (1 - pen.disc(0.72, 0.52, 0.14, 0.14))
    return body, ring & (1 - body)


def _cat(pen: Pen) -> tuple[Mask, Mask]:
    head = pen.disc(0.5, 0.34, 0.27, 0.25)
    ears = pen.poly((0.25, 0.3), (0.26, 0.0), (0.48, 0.16)) | pen.poly((0.75, 0.3), (0.74, 0.0), (0.52, 0.16))
    return head | ears | pen.disc(0.5, 0.78, 0.33, 0.3), pen.disc(0.5, 0.8, 0.18, 0.2)


SHAPES: dict[str, Shape] = {
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "star": _star,
    "mushroom": _mushroom,
    "robot": _robot,
    "car": _car,
    "house": _house,
    "fish": _fish,
    "tree": _tree,
    "cup": _cup,
    "cat": _cat,
}


def _pattern(toy: Toy, size: int) -> NDArray[np.bool_]:
    """Where the second colour covers the body. Stripes and dots are a quarter of the toy wide: two latent cells."""
    y, x = np.mgrid[0:size, 0:size] / size
    if toy.pattern == "striped":
        turn = np.deg2rad(toy.angle)
        stripes: NDArray[np.bool_] = ((x * np.sin(turn) + y * np.cos(turn)) % 0.44) < 0.2
        return stripes
    if toy.pattern == "dotted":
        row = np.floor(y / 0.36)
        dots: NDArray[np.bool_] = (((x + 0.18 * (row % 2)) % 0.36 - 0.18) ** 2 + (y % 0.36 - 0.18) ** 2) < 0.115**2
        return dots
    return np.zeros((size, size), bool)


def draw_toy(toy: Toy, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours (n, n, 3), 0-255, and coverage (n, n), 0-1, of one toy `size` pixels high; n = size x SUPERSAMPLE."""
    n = size * SUPERSAMPLE
    pen = Pen(n, toy.aspect)
    body, part = SHAPES[toy.category](pen)
    whole = body | part
    if toy.accent == "hat":  # sits on top, so it changes the silhouette
        whole |= pen.poly((0.5, -0.02), (0.74, 0.22), (0.26, 0.22))
    colors = np.empty((n, n, 3), np.float32)
    colors[:] = COLORS[toy.colors[0]]
    colors[_pattern(toy, n)] = COLORS[toy.colors[1]]
    colors[part > 0] = COLORS[toy.colors[1]]
    accent = {
        "hat": pen.poly((0.5, -0.02), (0.74, 0.22), (0.26, 0.22)),
        "shoes": pen.rect(0, 0.84, 1, 1),
        "scarf": pen.rect(0, 0.5, 1, 0.66),
        "none": pen.blank(),
    }[toy.accent]
    colors[(accent & whole) > 0] = COLORS[toy.accent_color]
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n
    shade = 1.08 - 0.26 * y - 0.16 * x
    return np.clip(colors * shade[..., None], 0, 255), whole.astype(np.float32)
