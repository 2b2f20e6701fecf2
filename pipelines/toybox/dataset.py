"""Training scenes drawn once and kept: pictures in one memory-mapped file, truths beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.toybox.scenes import scene
from pipelines.toybox.words import Caption, Wording, caption

CHUNK = 2000


class Scenes:
    """`count` scenes of a stream, drawn on first use and kept under `folder`."""

    def __init__(self, folder: Path, count: int, stream: str = "train") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._parts = [folder / f"{stream}-{CHUNK}-{start}" for start in range(0, count, CHUNK)]
        self.count = len(self._parts) * CHUNK if count >= CHUNK else count
        self._stream, self._size = stream, min(CHUNK, count)
        self.truths: list[dict[str, Any]] = []
        self._images: list[NDArray[np.uint8]] = []

    def draw(self) -> Iterator[int]:
        """Draws what is missing; yields the number of scenes there are so far."""
        for number, part in enumerate(self._parts):
            images, truths = part.with_suffix(".npy"), part.with_suffix(".json")
            if not truths.exists():
                self._draw_part(number, images, truths)
            self._images.append(np.load(images, mmap_mode="r"))
            self.truths += json.loads(truths.read_text())
            yield len(self.truths)

    def _draw_part(self, number: int, images: Path, truths: Path) -> None:
        scenes = [scene(self._stream, number * CHUNK + i) for i in range(self._size)]
        np.save(images, np.stack([s.image for s in scenes]))
        known = [{"background": s.background, "toys": s.toys, "prop": s.prop, "prop_box": s.prop_box} for s in scenes]
        temporary = truths.with_suffix(".tmp")
        temporary.write_text(json.dumps(known))
        os.replace(temporary, truths)

    def pictures(self, rows: NDArray[np.int64]) -> Tensor:
        """(n, 3, 64, 64) float32 in [-1, 1]."""
        stack = np.stack([self._images[i // CHUNK][i % CHUNK] for i in rows])
        return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()

    def captions(self, rows: NDArray[np.int64], rng: np.random.Generator, wording: Wording) -> list[Caption]:
        """A fresh wording of each scene."""
        return [caption(self.truths[i]["toys"], self.truths[i]["background"], rng, wording) for i in rows]
