"""A folder of photos: `x.png`, its masks `x-masklabel.png` or `x-masklabel-<name>.png`, its caption `x.txt`.

Limits are checked on the header, before a pixel is decoded, so a small file cannot ask for gigabytes.
`truth.json` (what the embedded world knows about its pictures) is never opened here.
"""

from __future__ import annotations

import contextlib
import json
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.captions import MAX_CAPTION, captions_in
from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.events import Picture

Mask = NDArray[np.uint8]  # (height, width), 255 = subject

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 40_000_000
MAX_SIDE = 12_000
MASK_MARK = "-masklabel"
SIDECARS = ("truth.json", "metadata.jsonl", "class_metadata.jsonl")  # of Toybox and of MuDI; they lie beside photos
_ORIENTATION = 0x0112  # EXIF tag
_DECODING = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, struct.error, zlib.error, MemoryError)


@dataclass
class Photo:
    """One photo, upright, with what lies beside it."""

    path: Path
    image: Picture  # (height, width, 3)
    masks: dict[str, Mask] = field(default_factory=dict)  # "" = the subject; other names for several subjects
    caption: str | None = None  # several stand in a line each
    size: tuple[int, int] = (0, 0)  # width, height of the whole upright photo, before `short_side` was applied
    shows: tuple[str, ...] = ()  # names of the subjects in it, () = all that are learned


def load_photos(folder: str | Path, *, short_side: int = 0, notes: list[str] | None = None) -> list[Photo]:
    """Every photo of `folder` by name, upright, RGB on white, at its own size or reduced to `short_side` pixels.

    EXIF orientation turns photo and mask alike. One sentence for each file that was left out goes to `notes`.
    StudioError names the file that is broken, too large, or the mask that does not fit.
    """
    folder, notes = Path(folder), [] if notes is None else notes
    others = _listed_masks(folder)
    pictures = [path for path in _pictures(folder, notes) if MASK_MARK in path.stem or path.name not in others]
    masks: dict[str, list[tuple[str, Path]]] = {}
    photos = []
    for path in pictures:
        stem, mark, name = path.stem.partition(MASK_MARK)
        if mark:
            masks.setdefault(stem, []).append((name.removeprefix("-"), path))
        else:
            photos.append(path)
    stems = {path.stem for path in photos}
    notes += [
        f"{path.name} is a mask without a photo; it was left out."
        for stem in masks.keys() - stems
        for _, path in masks[stem]
    ]
    if not photos:
        raise StudioError(f"There are no photos in '{folder}'. Put three or more PNG, JPEG or WebP files there.")
    return [_load(path, masks.get(path.stem, []), short_side) for path in photos]


def load_photo(path: Path, masks: Mapping[str, Path], *, short_side: int = 0) -> Photo:
    """One photo with the masks that lie elsewhere under names of their own, by subject; else as `load_photos`."""
    return _load(path, list(masks.items()), short_side)


def _pictures(folder: Path, notes: list[str]) -> list[Path]:
    """Files that are pictures by their ending; the others are noted unless they belong to the format."""
    if not folder.is_dir():
        raise StudioError(f"There is no folder '{folder}'. Name the folder that holds the photos.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    stems = {path.stem for path in pictures}
    for path in files:
        caption = path.suffix.lower() == ".txt" and path.stem in stems
        if path.suffix.lower() not in SUFFIXES and not caption and path.name not in SIDECARS:
            notes.append(f"{path.name} is not a PNG, JPEG or WebP picture; it was left out.")
    return pictures


def _listed_masks(folder: Path) -> set[str]:
    """Files that a folder's metadata calls masks (MuDI's form): they are no photos, whoever reads the folder."""
    found = set()
    for name in SIDECARS[1:]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in (folder / name).read_text(encoding="utf-8-sig").splitlines():
                with contextlib.suppress(ValueError, RecursionError, AttributeError):
                    found.add(str(json.loads(line).get("mask_path", "")))
    return found


def _load(path: Path, masks: list[tuple[str, Path]], short_side: int) -> Photo:
    with _opened(path) as photo:
        stored, orientation = photo.size, photo.getexif().get(_ORIENTATION, 1)
        upright = _turned(photo, orientation)
        size = upright.size
        image = _reduced(_rgb(upright), short_side)
    loaded = {name: _mask(mask, path, stored, size, orientation, short_side) for name, mask in masks}
    return Photo(path, np.asarray(image, dtype=np.uint8), loaded, _caption(path), size)


def _mask(
    path: Path, photo: Path, stored: tuple[int, int], upright: tuple[int, int], orientation: int, short_side: int
) -> Mask:
    """Turned by its own EXIF tag if it has one, else like its photo unless it fits only the photo turned upright."""
    with _opened(path) as mask:
        own = mask.getexif().get(_ORIENTATION)
        turn = own or (orientation if mask.size == stored else 1)
        turned = _turned(mask, turn)
        if turned.size != upright:
            raise StudioError(
                f"The mask {path.name} has {_by(turned.size)} pixels but its photo {photo.name} has {_by(upright)}. "
                "Save the mask at the photo's size, or delete it."
            )
        grey = _grey(turned)
    if np.asarray(grey).max() < 128:
        raise StudioError(f"The mask {path.name} is empty: white marks the subject. Paint the subject, or delete it.")
    return np.asarray(_reduced(grey, short_side), dtype=np.uint8)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture with its header read and its limits checked; every decoding error becomes one that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(path, formats=FORMATS)
        with image:
            width, height = image.size
            if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
                raise _too_large(path, f"{_by(image.size)} pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise _too_large(path, "far more pixels than any camera") from error
    except _DECODING as error:
        raise StudioError(
            f"{path.name} is broken or not a PNG, JPEG or WebP picture. Open it in a picture program and save it "
            "again, or take it out of the folder."
        ) from error


def _too_large(path: Path, size: str) -> StudioError:
    limit = f"{MAX_PIXELS // 1_000_000} million pixels and {MAX_SIDE:,} a side"
    return StudioError(f"{path.name} has {size}. The limit is {limit}. Make it smaller, or take it out.")


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """`image` as EXIF says it is looked at (TIFF 6.0, tag 274: 1 upright ... 8)."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    image.load()
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent parts become white, 16 bits a channel become 8."""
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Lightness; transparent parts are not the subject."""
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        return Image.alpha_composite(black, image).convert("L")
    return image.convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey at 255 when it converts; the top byte is what is meant."""
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))


def _reduced(image: Image.Image, short_side: int) -> Image.Image:
    """Short side at `short_side` pixels when it is longer; never enlarged here."""
    if not short_side or min(image.size) <= short_side:
        return image
    return image.resize(_sides(image.size, short_side), Image.Resampling.BICUBIC)


def _sides(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    width, height = size
    scale = short_side / min(size)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def _caption(photo: Path) -> str | None:
    path = photo.with_suffix(".txt")
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CAPTION:
        raise StudioError(f"{path.name} is longer than {MAX_CAPTION:,} bytes. Shorten its captions, or delete it.")
    try:
        text = captions_in(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise StudioError(f"{path.name} is not UTF-8 text. Save it as UTF-8, or delete it.") from error
    return text or None


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
