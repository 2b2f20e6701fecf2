"""One folder of finished pictures while it grows: PNGs, heat maps, and a record that is right after each of them."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.events import Picture
from pipelines.files import make_folder, spare_disk, write_json
from pipelines.pictures import save_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.attention.store import AttentionStore
    from pipelines.workspace import Workspace

RECORD = "result.json"
ATTENTION = "attention"


@dataclass(frozen=True)
class FromZero:
    """A folder whose pictures are called 0.png, 1.png ..., as Cones 2's own are."""

    folder: Path


class Album:
    """Pictures 0001.png ... and attention/0001.npz, attention/0001-<word>.png. `id` is "" outside the workspace. With
    `from_zero` they are 0.png, 1.png ..."""

    def __init__(self, folder: Path, id: str, recipe: dict[str, Any], from_zero: bool = False) -> None:
        self.folder, self.id = folder, id
        self._first, self._digits = (0, 1) if from_zero else (1, 4)
        self._record: dict[str, Any] = {
            "id": id,
            "created": time.time(),
            "complete": False,
            "recipe": recipe,
            "pictures": [],
        }
        self._stores: dict[int, str] = {}  # a store that is already saved -> its file

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """What is saved: {"file", "seed", "width", "height", "attention"?}."""
        saved: list[dict[str, Any]] = self._record["pictures"]
        return saved

    def add(self, image: Picture, recipe: dict[str, Any]) -> Path:
        """Save one picture under the next free number and enter it into the record."""
        path = self._next()
        try:
            save_picture(path, image, recipe)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        height, width = image.shape[:2]
        self.pictures.append({"file": path.name, "seed": recipe["seed"], "width": width, "height": height})
        self._write()
        return path

    def add_attention(
        self, path: Path, image: Picture, heats: Mapping[str, NDArray[np.float32]], row: int, store: AttentionStore
    ) -> dict[str, Any]:
        """Save heat maps of the picture at `path`: one overlay per word, and all numbers, once per batch.

        Returns {"file": the .npz, "row": the picture's row in it, "overlays": {word: file}}, relative to the folder.
        """
        from pipelines.attention.heatmap import overlay

        with spare_disk(self.folder, 0):
            (self.folder / ATTENTION).mkdir(exist_ok=True)
        if id(store) not in self._stores:
            self._stores = {id(store): f"{ATTENTION}/{path.stem}.npz"}
            store.save_npz(self.folder / self._stores[id(store)])
        overlays = {}
        for word, name in zip(heats, _slugs(heats), strict=True):
            overlays[word] = f"{ATTENTION}/{path.stem}-{name}.png"
            recipe = {"word": word, "picture": path.name}
            save_overlay(self.folder / overlays[word], overlay(heats[word], image), recipe)
        saved = {"file": self._stores[id(store)], "row": row, "overlays": overlays}
        self.pictures[-1]["attention"] = saved
        self._write()
        return saved

    def complete(self) -> None:
        """All that was asked for is there."""
        self._record["complete"] = True
        self._write()

    def _write(self) -> None:
        if self.id:
            write_json(self.folder / RECORD, self._record)

    def coming(self) -> int:
        """The number of the next picture, unless another program takes it first."""
        numbers = re.compile(rf"[0-9]{{{self._digits},9}}")
        taken = [int(path.stem) for path in self.folder.glob("*.png") if numbers.fullmatch(path.stem)]
        return max(taken, default=self._first - 1) + 1

    def name(self, number: int) -> str:
        """What a picture's file is called."""
        return f"{number:0{self._digits}d}.png"

    def _next(self) -> Path:
        """The next free number, taken at once, so that two programs never choose the same."""
        number = self.coming()
        while True:
            path = self.folder / self.name(number)
            try:
                with spare_disk(path, 0):
                    path.touch(exist_ok=False)
                return path
            except FileExistsError:
                number += 1


@contextmanager
def open_album(workspace: Workspace, recipe: dict[str, Any], out: str | Path | FromZero | None) -> Iterator[Album]:
    """A new folder in the workspace's results, or `out`. A folder of ours that stayed empty is removed again."""
    request = recipe["request"]
    if out is not None:
        from_zero = isinstance(out, FromZero)
        folder = Path(out.folder if isinstance(out, FromZero) else out).expanduser()
        make_folder(folder)
        yield Album(folder, "", recipe, from_zero)
        return
    count = len(request["keep"] or request["seeds"])
    size = 3 * request["width"] * request["height"]  # an uncompressed picture; an overlay is another one
    workspace.need(count * size * (1 + len(recipe["attention"])), "the pictures")
    folder = workspace.new_folder(workspace.results, request["prompt"])
    album = Album(folder, folder.name, recipe)
    try:
        yield album
    finally:
        if not album.pictures:
            shutil.rmtree(folder, ignore_errors=True)


def save_overlay(path: Path, image: Picture, about: dict[str, Any]) -> None:
    """A picture that is no result itself, so without a recipe; `about` says what it shows."""
    import io
    import json

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from pipelines.files import write_atomic

    texts = PngInfo()
    texts.add_text("attune-attention", json.dumps(about))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=texts)
    write_atomic(path, buffer.getvalue())


def _slugs(words: Mapping[str, Any]) -> list[str]:
    """A file name for each word: its plain letters, numbered where that leaves nothing or the same twice."""
    slugs: list[str] = []
    for number, word in enumerate(words, start=1):
        slug = re.sub(r"[^a-z0-9]+", "-", word[:60].lower()).strip("-") or f"word-{number}"
        slugs.append(f"{slug}-{number}" if slug in slugs else slug)
    return slugs
