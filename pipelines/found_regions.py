"""The regions that a first pass found, as a picture for each picture that is painted with them.

    <folder of the pictures>/regions/0001.png      side by side, each concept's place over what the first pass shows

They lie in a folder of their own, so that nobody who reads the pictures takes them for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from pipelines.album import save_overlay
from pipelines.attention.heatmap import overlay
from pipelines.files import make_folder

if TYPE_CHECKING:
    from pipelines.album import Album
    from pipelines.events import Heatmap, Picture
    from pipelines.request import Request

FOLDER = "regions"
_STRIP, _GAP = 16, 4  # pixels: above each place, for its name, and between two


@dataclass
class FoundRegions:
    """Gathers what a first pass tells, and saves it as soon as all `concepts` of a picture have their place."""

    album: Album
    request: Request
    concepts: int
    files: dict[int, Path] = field(default_factory=dict)  # by the picture's place in the request
    _heats: list[Heatmap] = field(default_factory=list)
    _coming: int = 0

    def take(self, heat: Heatmap, first: int) -> tuple[int, Path] | None:
        """The next region of the batch from picture `first` on; (picture, file) when it was its picture's last."""
        self._heats.append(heat)
        if len(self._heats) < self.concepts:
            return None
        heats, self._heats = self._heats, []
        index = max(self._coming, first)
        self._coming = index + 1
        if self.request.keep and self.request.seeds[index] not in self.request.keep:
            return None
        waiting = sum(other >= first for other in self.files)  # of this batch, whose pictures come later
        name = self.album.name(self.album.coming() + waiting)
        path = make_folder(self.album.folder / FOLDER) / name
        save_overlay(path, drawn(heats), {"regions": [one.token for one in heats], "picture": name})
        self.files[index] = path
        return index, path


def drawn(heats: Sequence[Heatmap]) -> Picture:
    """Each region over its picture, side by side, with its concept's name above."""
    shown = [overlay(heat.values, heat.image) for heat in heats]
    height, width = max(one.shape[0] for one in shown), sum(one.shape[1] + _GAP for one in shown) - _GAP
    sheet = Image.new("RGB", (width, height + _STRIP), "white")
    left = 0
    for heat, one in zip(heats, shown, strict=True):
        label = Image.new("RGB", (one.shape[1], _STRIP), "white")  # of its own, so that a long name is cut
        ImageDraw.Draw(label).text((2, 2), heat.token.encode("ascii", "replace").decode(), fill="black")
        sheet.paste(label, (left, 0))
        sheet.paste(Image.fromarray(one), (left, _STRIP))
        left += one.shape[1] + _GAP
    return np.asarray(sheet)
