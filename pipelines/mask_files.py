"""Masks as files beside photos: x-masklabel.png and x-masklabel-<name>.png, which photos.py reads.

A file that we write says so and carries a hash of its own pixels. So a later run knows its own files, which it may
replace, from those that a person made or painted over, which it leaves alone.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin

from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Progress, Snapshot
from pipelines.files import make_folder, write_atomic
from pipelines.masks import STAGE, MaskParams, mask_params, refined_masks
from pipelines.photos import MASK_MARK, load_photos
from pipelines.settings import parse_settings, validated
from pipelines.tokens import check_token

if TYPE_CHECKING:
    from pipelines.attention.discover import DiscoverParams
    from pipelines.model import Model
    from pipelines.photos import Mask, Photo

MARK = "attune-mask"  # in the PNG's text: the hash of the pixels as we wrote them
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Wish:
    """What to find in which folder. `names` are what the files are called, () = the nouns."""

    folder: Path
    nouns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    out: Path | None = None  # None = beside the photos
    soft: bool = False
    overwrite: bool = False  # also what a person made
    settings: tuple[str, ...] = ()  # KEY=VALUE of MaskParams, or of DiscoverParams
    discover: bool = False
    cache: Path | None = None

    def check(self) -> None:
        """StudioError for what can't work, before a model is loaded."""
        if not self.folder.is_dir():
            raise StudioError(f"There is no folder {self.folder}. Name the one with the photos.")
        if self.discover:
            self.discovery("")
        else:
            validated(MaskParams, MaskParams().model_dump() | parse_settings(MaskParams, self.settings))
        for name in self.files():
            if name:
                check_token(f"<{name}>")
        if len(set(self.files())) < len(self.files()):
            raise StudioError("Two masks would have one name. Give each noun its own --name.")

    def files(self) -> list[str]:
        """The name of each noun's files; "" for an only noun, or none, whose mask needs no name."""
        if self.names:
            return list(self.names)
        return [""] if len(self.nouns) < 2 else ["-".join(noun.split()) for noun in self.nouns]

    def discovery(self, kind: str) -> DiscoverParams:
        """The settings for things without a word, on a base of that kind."""
        from pipelines.attention.discover import DiscoverParams, discover_params

        own = parse_settings(DiscoverParams, self.settings)
        return validated(DiscoverParams, discover_params(kind).model_dump() | own)

    def params(self, kind: str) -> MaskParams:
        """The settings for a base of that kind."""
        own = parse_settings(MaskParams, self.settings)
        return validated(MaskParams, mask_params(kind).model_dump() | own)


def noun_masks(model: Model, wish: Wish) -> Iterator[Event]:
    """Write every noun's mask for every photo; ends with Finished({"written", "kept", "missing"}), file names each."""
    photos = yield from read_photos(wish, model.native_size)
    report = Report()
    for number, photo in enumerate(photos, start=1):
        found = {}
        for event in refined_masks(model, [photo], wish.nouns, wish.params(model.kind), cache=wish.cache):
            if isinstance(event, Finished):
                (found,) = event.value
            elif not isinstance(event, Progress):
                yield event
        for name, mask in zip(wish.files(), found.values(), strict=True):
            if mask.binary().any():
                size = (photo.size[1], photo.size[0])
                yield from write_mask(wish, photo, name, mask.picture(size, soft=wish.soft), report)
            else:
                report.missing.append(mask_file(photo, name))
        yield Progress(STAGE, number, len(photos))
    yield Finished(report.as_json())


def discovered_masks(model: Model, wish: Wish) -> Iterator[Event]:
    """Write a mask for everything that stands out in each photo, thing1 being the largest; ends as `noun_masks`."""
    from pipelines.attention.discover import discover

    photos = yield from read_photos(wish, model.native_size)
    report = Report()
    for number, photo in enumerate(photos, start=1):
        things = discover(model, photo.image, wish.discovery(model.kind))
        if not things:
            yield Note(f"Nothing stands out in {photo.path.name}. Name what it shows with --noun, or paint a mask.")
            report.missing.append(mask_file(photo, "thing1"))
        for count, thing in enumerate(things, start=1):
            yield from write_mask(wish, photo, f"thing{count}", thing.picture((photo.size[1], photo.size[0])), report)
        yield Progress(STAGE, number, len(photos))
    yield Finished(report.as_json())


class Report:
    """What became of each mask. `boxes`: where a detector saw the thing, by the mask's file, in the photo's pixels."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.kept: list[str] = []
        self.missing: list[str] = []
        self.boxes: dict[str, list[int]] = {}

    def as_json(self) -> dict[str, Any]:
        found = {"written": self.written, "kept": self.kept, "missing": self.missing}
        return found | ({"boxes": self.boxes} if self.boxes else {})


def read_photos(wish: Wish, short_side: int) -> Generator[Event, None, list[Photo]]:
    """The photos at the size they are looked at; their masks are written at their own size."""
    notes: list[str] = []
    photos = load_photos(wish.folder, short_side=short_side, notes=notes)
    yield from map(Note, notes)
    return photos


def write_mask(wish: Wish, photo: Photo, name: str, mask: Mask, report: Report) -> Iterator[Event]:
    """One file, unless a person made the one that is there. `mask`: (height, width) of the whole upright photo."""
    if (yield from keeps(wish, photo, name, report)):
        return
    folder = wish.out or wish.folder
    path = folder / mask_file(photo, name)
    make_folder(folder)
    write_atomic(path, png(mask))
    report.written.append(path.name)
    yield Snapshot("mask", path=str(path), info={"photo": photo.path.name, "name": name})


def keeps(wish: Wish, photo: Photo, name: str, report: Report) -> Generator[Event, None, bool]:
    """Whether the mask that is there was made by a person and stays; it is then reported and told."""
    path = (wish.out or wish.folder) / mask_file(photo, name)
    if not path.exists() or wish.overwrite or is_ours(path):
        return False
    report.kept.append(path.name)
    yield Note(f"{path.name} was made by a person and is kept. Use --overwrite to replace it.")
    return True


def mask_file(photo: Photo, name: str) -> str:
    """What the mask of `name` beside a photo is called; "" is the only subject."""
    return f"{photo.path.stem}{MASK_MARK}{'-' if name else ''}{name}.png"


def png(mask: Mask) -> bytes:
    """A mask (height, width) uint8 as a PNG that says it is ours and that it stands upright."""
    text = PngImagePlugin.PngInfo()
    text.add_text(MARK, _hash(mask))
    upright = Image.Exif()
    upright[_ORIENTATION] = 1  # else a photo's own turn would be applied to a mask of its size
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", pnginfo=text, exif=upright)
    return buffer.getvalue()


def is_ours(path: Path) -> bool:
    """Whether `path` is a mask as we wrote it: not one that a person made, painted over or replaced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # no mask of ours is that large
            with Image.open(path, formats=["PNG"]) as image:
                if not isinstance(image, PngImagePlugin.PngImageFile) or image.mode != "L":
                    return False
                return image.text.get(MARK) == _hash(np.asarray(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return False


def _hash(mask: Mask) -> str:
    return hashlib.sha256(f"{mask.shape}".encode() + np.ascontiguousarray(mask).tobytes()).hexdigest()
