"""MuDI's data folders as ours: a folder for each subject, class pictures under the names that are learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.captions import caption_bytes
from pipelines.errors import StudioError
from pipelines.files import write_atomic
from pipelines.formats.mudi import CLASS_FILE, Dataset, class_pictures_of, photos_of, png, write_dataset
from pipelines.photos import Photo


def unpack(dataset: Dataset, target: Path, *, names: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The photos as folders of our own, `target/<name>/`: x.png, x-masklabel.png, x.txt; the folders by name.

    StudioError as `photos_of`, for captions that are too long to be read again, before anything is written; and when a
    folder is there already.
    """
    folders: dict[str, Path] = {}
    photos = photos_of(dataset, names=names)
    captions = [
        caption_bytes(photo.caption or "", dataset.where(row.line))
        for row, photo in zip(dataset.rows, photos, strict=True)
    ]
    for number, (photo, content) in enumerate(zip(photos, captions, strict=True)):
        (name,) = photo.shows
        if name not in folders:
            folders[name] = target / name
            if folders[name].exists():
                raise StudioError(f"{folders[name]} is already there. Choose another folder.")
            folders[name].mkdir(parents=True)
        stem = f"{number:04d}"
        write_atomic(folders[name] / f"{stem}.png", png(photo.image))
        write_atomic(folders[name] / f"{stem}-masklabel.png", png(photo.masks[name]))
        write_atomic(folders[name] / f"{stem}.txt", content)
    return folders


def check_classes(dataset: Dataset, classes: Dataset) -> None:
    """StudioError when class pictures are of other ids than the photos: nothing would tie them together."""
    if dataset.phrases.keys() != classes.phrases.keys():
        here, there = (", ".join(sorted(one.phrases)) for one in (dataset, classes))
        raise StudioError(
            f"{classes.where(classes.first)} is about {there}, but {dataset.where(dataset.first)} about {here}. Use "
            "the same ids in both."
        )


def renamed_classes(classes: Dataset, target: Path, names: Mapping[str, str]) -> Path:
    """The same class pictures in the new folder `target`, under other ids. StudioError as `photos_of`."""
    pictures = class_pictures_of(classes, names=names)
    photos = [
        Photo(row.picture, one.image, {name: one.mask}, one.words, shows=(name,))
        for row, one in zip(classes.rows, pictures, strict=True)
        if one.mask is not None and (name := one.token.strip("<>"))
    ]
    phrases = {names.get(id, id): phrase for id, phrase in classes.phrases.items()}
    write_dataset(target, phrases, photos, CLASS_FILE)
    return target
