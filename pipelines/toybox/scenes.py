"""Draws Toybox scenes and knows the truth about them: true masks, places, identities, backgrounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.toybox.toys import SUPERSAMPLE, Toy, draw_toy, random_toy
from pipelines.toybox.words import BACKGROUNDS

SIZE = 64
# Random streams that never meet: training scenes, held-out scenes, subjects and their photos.
STREAMS = {"train": 1, "tune": 2, "test": 3, "subject": 4, "photo": 5}
# background -> (sky top, sky bottom, ground near, ground far)
_PAINT: dict[str, tuple[tuple[int, int, int], ...]] = {
    "grass": ((120, 186, 240), (196, 226, 250), (84, 168, 60), (118, 196, 84)),
    "sand": ((250, 214, 150), (252, 236, 200), (214, 170, 104), (232, 198, 138)),
    "snow": ((164, 178, 200), (206, 214, 226), (236, 242, 250), (220, 230, 244)),
    "sea": ((186, 230, 244), (224, 246, 250), (20, 116, 150), (56, 160, 184)),
    "night": ((14, 16, 56), (44, 40, 104), (24, 36, 48), (36, 52, 70)),
    "road": ((222, 196, 206), (240, 222, 224), (92, 92, 98), (126, 126, 132)),
    "table": ((232, 220, 190), (242, 232, 208), (150, 96, 52), (178, 122, 72)),
    "carpet": ((190, 204, 190), (208, 220, 206), (150, 44, 70), (176, 70, 94)),
    "simple": ((252, 252, 252), (252, 252, 252), (252, 252, 252), (252, 252, 252)),
}
PROPS = ("flag", "lamp", "bucket", "sign")
_PROP_PAINT = {
    "flag": ((70, 70, 74), (236, 60, 120)),
    "lamp": ((60, 60, 66), (255, 240, 150)),
    "bucket": ((90, 190, 200), (60, 130, 140)),
    "sign": ((130, 100, 60), (250, 250, 250)),
}


@dataclass(frozen=True)
class Placed:
    """A toy somewhere: `x` centre, `bottom` edge, `size` height, all in pixels."""

    toy: Toy
    x: float
    bottom: float
    size: int
    subject_seed: int | None = None


@dataclass
class Scene:
    """A picture (64, 64, 3) uint8 with its truth. `masks` are (64, 64) bool, what is visible of each toy."""

    image: NDArray[np.uint8]
    background: str
    toys: list[dict[str, Any]]
    masks: list[NDArray[np.bool_]]
    prop: str | None = None
    prop_box: list[int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def stream(name: str, *seeds: int) -> np.random.Generator:
    """Private randomness: the same name and seeds give the same draws, whatever else has run."""
    return np.random.default_rng([STREAMS[name], *seeds])


def subject(seed: int, category: str | None = None) -> Toy:
    """The one toy that `seed` stands for, of a given category if asked."""
    return random_toy(stream("subject", seed), category)


def draw_background(name: str, rng: np.random.Generator) -> tuple[NDArray[np.float32], float]:
    """The empty stage (64, 64, 3) and its horizon in pixels; light and horizon vary."""
    sky_top, sky_low, far, near = (np.array(c, np.float32) for c in _PAINT[name])
    horizon, light = float(rng.uniform(0.45, 0.6)) * SIZE, float(rng.uniform(0.94, 1.04))
    y = (np.arange(SIZE, dtype=np.float32) + 0.5)[:, None, None]
    sky = sky_top + (sky_low - sky_top) * (y / horizon).clip(0, 1)
    ground = far + (near - far) * ((y - horizon) / (SIZE - horizon)).clip(0, 1)
    blend = (y - horizon + 0.5).clip(0, 1)
    column = np.clip((sky * (1 - blend) + ground * blend) * (1 if name == "simple" else light), 0, 255)
    stage = np.empty((SIZE, SIZE, 3), np.float32)
    stage[:] = column
    return stage, horizon


def _composite(canvas: NDArray[np.float32], placed: Placed, night: bool) -> NDArray[np.float32]:
    """Paints a toy and its soft shadow; returns the toy's coverage (64, 64)."""
    colors, cover = draw_toy(placed.toy, placed.size)
    if night:
        colors = colors * 0.86
    left, top = placed.x - placed.size / 2, placed.bottom - placed.size
    move = np.array([[1, 0, left * SUPERSAMPLE], [0, 1, top * SUPERSAMPLE]], np.float32)
    big = (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE)
    full_cover: Any = cv2.warpAffine(cover, move, big)
    full_color = cv2.warpAffine(colors * cover[..., None], move, big)
    small = (SIZE, SIZE)
    alpha: NDArray[np.float32] = cv2.resize(full_cover, small, interpolation=cv2.INTER_AREA)
    color = cv2.resize(full_color, small, interpolation=cv2.INTER_AREA)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    flat = ((x - placed.x - 1) / (0.55 * placed.size)) ** 2 + ((y - placed.bottom) / (0.13 * placed.size)) ** 2
    canvas *= (1 - 0.34 * np.exp(-1.4 * flat**2))[..., None]
    canvas *= 1 - alpha[..., None]
    canvas += color
    return alpha


def _draw_prop(canvas: NDArray[np.float32], kind: str, x: float, bottom: float, size: float) -> list[int]:
    """An unnamed thing beside the toys; returns its box."""
    pole, top = _PROP_PAINT[kind]
    big = cv2.resize(canvas, None, fx=SUPERSAMPLE, fy=SUPERSAMPLE, interpolation=cv2.INTER_NEAREST)

    def rect(x0: float, y0: float, x1: float, y1: float, color: tuple[int, int, int]) -> None:
        low = (round((x + x0 * size) * SUPERSAMPLE), round((bottom - y0 * size) * SUPERSAMPLE))
        high = (round((x + x1 * size) * SUPERSAMPLE), round((bottom - y1 * size) * SUPERSAMPLE))
        cv2.rectangle(big, low, high, color, -1)

    if kind == "bucket":
        rect(-0.3, 0, 0.3, 0.46, pole)
        rect(-0.36, 0.46, 0.36, 0.62, top)
        span = (0.36, 0.62)
    else:
        rect(-0.07, 0, 0.07, 1, pole)
        shape = {"flag": (0.0, 0.62, 0.5, 1.0), "lamp": (-0.24, 0.66, 0.24, 1.06), "sign": (-0.36, 0.56, 0.36, 0.96)}
        rect(*shape[kind], top)
        span = (0.5 if kind == "flag" else 0.36, 1.06)
    canvas[:] = cv2.resize(big, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    box = (x - span[0] * size, bottom - span[1] * size, x + span[0] * size, bottom)
    return [int(np.clip(round(v), 0, SIZE)) for v in box]


def compose(
    placed: list[Placed], background: str, rng: np.random.Generator, prop: tuple[str, float, float] | None = None
) -> Scene:
    """Draws toys (in the given order, later ones in front) on a background; prop = (kind, x, size)."""
    canvas, horizon = draw_background(background, rng)
    prop_box = None
    if prop is not None:
        prop_box = _draw_prop(canvas, prop[0], prop[1], horizon + 7, prop[2])
    masks: list[NDArray[np.bool_]] = []
    for item in placed:
        alpha = _composite(canvas, item, background == "night")
        masks = [mask & (alpha < 0.5) for mask in masks] + [alpha >= 0.5]
    toys = []
    for item, mask in zip(placed, masks, strict=True):
        ys, xs = np.nonzero(mask)
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(xs) else [0, 0, 0, 0]
        toys.append(item.toy.truth() | {"subject_seed": item.subject_seed, "box": box})
    image = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return Scene(image, background, toys, masks, prop[0] if prop else None, prop_box)


# count -> sizes, then one cell a toy: centre and bottom as shares of the picture. Three and four stand in two rows.
_CELLS: dict[int, tuple[tuple[int, int], tuple[tuple[float, float], ...]]] = {
    1: ((26, 42), ((0.5, 0.82),)),
    2: ((22, 31), ((0.25, 0.82), (0.75, 0.82))),
    3: ((18, 24), ((0.25, 0.6), (0.75, 0.6), (0.5, 0.93))),
    4: ((18, 24), ((0.25, 0.6), (0.75, 0.6), (0.25, 0.95), (0.75, 0.95))),
}


def place(toys: list[Toy], rng: np.random.Generator, seeds: list[int | None] | None = None) -> list[Placed]:
    """Puts one to four toys on the ground, jittered in place and size; those behind come first."""
    (low, high), cells = _CELLS[len(toys)]
    slots, out = rng.permutation(len(toys)), []
    drop = 0.12 if len(toys) <= 2 else 0.03
    for i, toy in enumerate(toys):
        size = int(rng.integers(low, high + 1))
        slack = SIZE / 2 - size / 2 - 1 if len(toys) == 1 else max(0.0, SIZE / 4 - size / 2)
        x = cells[slots[i]][0] * SIZE + float(rng.uniform(-slack, slack))
        bottom = (cells[slots[i]][1] + float(rng.uniform(-drop, drop))) * SIZE
        out.append(Placed(toy, x, max(bottom, size + 2.0), size, seeds[i] if seeds else None))
    return sorted(out, key=lambda item: item.bottom)


def random_prop(rng: np.random.Generator) -> tuple[str, float, float]:
    """Kind, centre and height of a prop near the left or right edge."""
    x = float(rng.uniform(6, 14))
    return str(rng.choice(PROPS)), x if rng.random() < 0.5 else SIZE - x, float(rng.uniform(20, 26))


def random_scene(rng: np.random.Generator, count: int | None = None, background: str | None = None) -> Scene:
    """A scene as the base model is trained on: mostly one toy, a prop now and then."""
    drawn = int(rng.choice((1, 2, 3, 4), p=(0.55, 0.3, 0.08, 0.07)))
    toys = [random_toy(rng) for _ in range(count or drawn)]
    name = background or str(rng.choice(list(BACKGROUNDS)))
    prop = random_prop(rng) if rng.random() < 0.1 else None
    return compose(place(toys, rng), name, rng, prop)


def scene(stream_name: str, seed: int, count: int | None = None) -> Scene:
    """The scene number `seed` of a stream ("train", "tune" or "test")."""
    return random_scene(stream(stream_name, seed), count)
