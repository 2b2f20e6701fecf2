"""Photos of Toybox subjects in the data-folder format: pictures, masks, truth.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError
from pipelines.files import make_folder
from pipelines.toybox.scenes import Scene, compose, place, random_prop, stream, subject
from pipelines.toybox.words import BACKGROUNDS, caption

LARGEST = 4


@dataclass(frozen=True)
class Shoot:
    """What to photograph. `background` None = varied; `prop` True = the same unnamed thing stands in every photo."""

    seeds: tuple[int, ...]
    count: int = 5
    background: str | None = None
    category: str | None = None
    prop: bool = False

    def check(self) -> None:
        """StudioError for what the world can't show."""
        if not 1 <= len(self.seeds) <= LARGEST:
            raise StudioError(f"{len(self.seeds)} subjects don't fit in a photo. Name 1 to {LARGEST} subject seeds.")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise StudioError("Subject seeds are different whole numbers from 0. Change the repeated or negative one.")
        if not 1 <= self.count <= 1000:
            raise StudioError(f"{self.count} photos can't be drawn. Ask for 1 to 1000.")
        if self.background is not None and self.background not in BACKGROUNDS:
            raise StudioError(f"Toybox has no background '{self.background}'. Choose one of: {', '.join(BACKGROUNDS)}.")


def shoot(wish: Shoot) -> list[Scene]:
    """The photos: places, sizes and light vary from one to the next; the subjects stay what their seeds say."""
    wish.check()
    toys = [subject(seed, wish.category) for seed in wish.seeds]
    fixed = stream("photo", *wish.seeds, 1_000_003)
    order = fixed.permutation(list(BACKGROUNDS))
    prop = random_prop(fixed) if wish.prop else None
    scenes = []
    for number in range(wish.count):
        rng = stream("photo", *wish.seeds, number)
        background = wish.background or str(order[number % len(order)])
        scenes.append(compose(place(toys, rng, list(wish.seeds)), background, rng, prop))
    return scenes


def _png(path: Path, image: NDArray[np.uint8]) -> None:
    ok, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)
    if not ok:
        raise StudioError(f"{path.name} could not be encoded as PNG. Try another folder.")
    path.write_bytes(data.tobytes())


def _mask_names(stem: str, scene: Scene) -> list[str]:
    """One toy: the photo's mask; several: one each, named after its category, with the seed where two share it."""
    if len(scene.toys) == 1:
        return [f"{stem}-masklabel.png"]
    kinds = [toy["category"] for toy in scene.toys]
    names = [k if kinds.count(k) == 1 else f"{k}{t['subject_seed']}" for k, t in zip(kinds, scene.toys, strict=True)]
    return [f"{stem}-masklabel-{name}.png" for name in names]


def write_photos(scenes: Sequence[Scene], folder: Path) -> dict[str, Any]:
    """Writes photos, masks and truth.json into `folder`; returns the truth."""
    make_folder(folder)
    pictures = []
    for number, scene in enumerate(scenes, start=1):
        stem = f"{number:04d}"
        names = _mask_names(stem, scene)
        _png(folder / f"{stem}.png", scene.image)
        for name, mask in zip(names, scene.masks, strict=True):
            _png(folder / name, mask.astype(np.uint8) * 255)
        pictures.append(
            {
                "file": f"{stem}.png",
                "mask": names[0] if len(names) == 1 else None,
                "caption": caption(scene.toys, scene.background, np.random.default_rng(0)).text,
                "background": scene.background,
                "prop": scene.prop,
                "toys": [toy | {"mask": name} for toy, name in zip(scene.toys, names, strict=True)],
            }
        )
    truth = {"pictures": pictures}
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    return truth
