"""Masks of the photos in a set: what the mask editor shows, and what becomes of what was painted in it."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines import EMBEDDED, MASK_MARK, Photo, StudioError, load_photos, new_id, write_atomic
from studio.parts.painter import Drawn, drawing, regions
from studio.session import Studio
from studio.work import EXAMPLE, RARE_WORDS, about, photo_folder

Mask = NDArray[np.bool_]  # (height, width)
_ORIENTATION = 0x0112  # EXIF tag
EXAMPLE_STAYS = "The example comes with its masks and stays as it is. Add photos of your own to paint masks."


@dataclass(frozen=True)
class Opened:
    """A photo in the mask editor: the names of its masks there, and the drawing as it was when they were last saved."""

    dataset: str
    photo: str
    layers: tuple[str, ...]
    before: str


def photo_of(studio: Studio, dataset: str, name: str) -> Photo:
    """A photo of a set as a page shows it; StudioError when there is none of that name."""
    if dataset == EXAMPLE:
        raise StudioError(EXAMPLE_STAYS)
    for photo in studio.datasets.photos(dataset) if dataset else []:
        if photo.path.name == name:
            return photo
    raise StudioError("This photo is not in the set any more. Choose the set again.")


def layers(photo: Photo, names: Sequence[str]) -> list[str]:
    """The names of the masks to edit: "" for an only subject's, else one a subject; then what else there is."""
    wanted = list(dict.fromkeys(name for name in names if name))
    wanted = wanted if len(wanted) > 1 else [""]
    return [*wanted, *(name for name in photo.masks if name not in wanted)]


def mask_drawing(photo: Photo, names: Sequence[str]) -> str:
    """The masks of those names as the editor takes them, empty where there is none yet."""
    empty = np.zeros(photo.image.shape[:2], np.bool_)
    return drawing([Drawn(name, photo.masks[name] >= 128 if name in photo.masks else empty) for name in names])


def save_masks(studio: Studio, dataset: str, name: str, names: Sequence[str], value: str) -> list[str]:
    """Write what was changed in the editor, at the photo's full size; the files that were written or taken away.

    An emptied mask goes to the trash. What is saved here is a person's: finding masks leaves it alone.
    """
    photo = photo_of(studio, dataset, name)
    drawn = regions(value)
    if len(drawn) != len(names) or any(one.mask.shape != photo.image.shape[:2] for one in drawn):
        raise StudioError("The drawing is not of this photo any more. Click the photo again.")
    changed = []
    for one, layer in zip(drawn, names, strict=True):
        before = photo.masks[layer] >= 128 if layer in photo.masks else np.zeros_like(one.mask)
        if (before == one.mask).all():
            continue
        path = _file(photo.path, layer)
        for old in photo.path.parent.glob("*"):
            if old.stem == path.stem:  # also one that is no PNG
                _discard(studio, old)
        if one.mask.any():
            write_atomic(path, _png(one.mask, photo.size))
        changed.append(path.name)
    return changed


def save_changes(studio: Studio, opened: Opened | None, value: str) -> list[str]:
    """Write what a person changed since the photo was opened, and nothing else: meanwhile masks may have been found."""
    if opened is None:
        return []
    drawn, before = regions(value), regions(opened.before)
    if [one.mask.shape for one in drawn] != [one.mask.shape for one in before]:
        raise StudioError("The drawing is not of this photo any more. Click the photo again.")
    changed = [at for at, one in enumerate(drawn) if (one.mask != before[at].mask).any()]
    names = [opened.layers[at] for at in changed]
    return save_masks(studio, opened.dataset, opened.photo, names, drawing([drawn[at] for at in changed]))


def _file(photo: Path, layer: str) -> Path:
    if layer and not re.fullmatch(r"[\w.-]{1,64}", layer):
        raise StudioError(f"'{layer[:40]}' can't name a mask. Call the thing by letters, digits, '-' and '_'.")
    return photo.with_name(f"{photo.stem}{MASK_MARK}{'-' if layer else ''}{layer}.png")


def _discard(studio: Studio, path: Path) -> None:
    trash = studio.workspace.trash / new_id(f"mask {path.stem}")
    trash.mkdir()
    shutil.move(path, trash / path.name)


def _png(mask: Mask, size: tuple[int, int]) -> bytes:
    """A mask at `size` (width, height), upright whatever the photo's own turn is."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR).point(lambda value: 255 if value > 127 else 0)
    upright = Image.Exif()
    upright[_ORIENTATION] = 1
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=upright)
    return buffer.getvalue()


def thing_names(found: dict[str, Any] | None) -> list[str]:
    """thing1, thing2 ... as far as a search without a word wrote masks of them; [] for any other."""
    files = [*found["written"], *found["kept"]] if found else []
    names = {Path(file).stem.rpartition(f"{MASK_MARK}-")[2] for file in files}
    names = {name for name in names if re.fullmatch(r"thing[1-9]\d?", name)}
    return sorted(names, key=lambda name: int(name.removeprefix("thing")))


def unused_masks(studio: Studio, things: Sequence[dict[str, str]]) -> str:
    """A sentence where the masks of a photo set all have names, and nothing that is learned from it has one of them."""
    for dataset in dict.fromkeys(one["photos"] for one in things if one["photos"] != EXAMPLE):
        masks = [path.stem.partition(MASK_MARK)[2] for path in studio.datasets.folder(dataset).glob(f"*{MASK_MARK}*.*")]
        names = sorted({name.removeprefix("-") for name in masks})
        if names and not {"", *(one["name"] for one in things if one["photos"] == dataset)} & set(names):
            which = " and ".join(names[:6])
            return f" The masks of its photos are of {which}, and nothing here is called so: they are not used."
    return ""


def as_mudi(studio: Studio, dataset: str, things: Sequence[dict[str, str]]) -> str:
    """A zip of a photo set in MuDI's form, as `masks --metadata` writes it: photos, masks and metadata.jsonl.

    `things` are those in it. Rare words are those that the set brought, then ours.
    """
    from pipelines import Phrase, write_metadata

    source = photo_folder(studio, dataset)
    there = {name for photo in load_photos(source, short_side=64) for name in photo.masks}
    files = [one["name"] if one["name"] in there or len(things) > 1 else "" for one in things]
    if not there & set(files):
        raise StudioError("No photo of this set has a mask of what you named above. Find or paint masks first.")
    own = str(about(studio, dataset).get("rare", ""))
    rare = list(dict.fromkeys(word for word in (own, *RARE_WORDS) if word))[: len(things)]
    folder = studio.scratch() / "photos"
    shutil.copytree(source, folder, ignore=lambda path, names: [name for name in names if (Path(path) / name).is_dir()])
    subjects = [
        Phrase(one["name"] or "-".join(one["noun"].split()), file, word, one["noun"])
        for one, file, word in zip(things, files, rare, strict=True)
    ]
    write_metadata(folder, subjects, {})
    return shutil.make_archive(str(folder.with_name("mudi")), "zip", folder)


def has_finder(where: str) -> bool:
    """Whether a click can find an outline: a segmenter is shipped, or a checkpoint is named."""
    return bool((where or "").strip()) or EMBEDDED.is_file()


def with_outline(value: str, number: int, found: Any) -> str:
    """The drawing with a found outline (height, width) added to one of its regions."""
    drawn = regions(value)
    if not 0 <= number < len(drawn):
        raise StudioError("The drawing has no such part any more. Click the photo again.")
    mask = np.asarray(found) > 127
    one = drawn[number]
    if mask.shape != one.mask.shape:
        raise StudioError("The drawing is not of this photo any more. Click the photo again.")
    drawn[number] = Drawn(one.words, one.mask | mask, one.occurrence, one.weight)
    return drawing(drawn)
