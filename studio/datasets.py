"""Photo sets in the workspace: upload, look, caption, remove. What a person uploads is checked before it is kept."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import (
    MASK_MARK,
    Photo,
    StudioError,
    Workspace,
    caption_bytes,
    captions_in,
    check_id,
    clean_name,
    load_photos,
    new_id,
    write_atomic,
)
from studio.parts.cards import Card
from studio.parts.pictures import data_uri

TITLE = "title.txt"  # of the set, in a folder of its own so that it is no caption
META = "about"
SHOWS = "shows.json"
MOST_PHOTOS = 200
MOST_BYTES = 64_000_000  # one uploaded file
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".txt")
MUDI = "metadata.jsonl"
CLASSES = "class_metadata.jsonl"  # in a set of class pictures
SHOWN = 512  # short side in pixels at which a photo is looked at


@dataclass(frozen=True)
class Dataset:
    """One photo set: `id` is its folder's name, `title` what the person called it."""

    id: str
    title: str


class Datasets:
    """The photo sets of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def all(self) -> list[Dataset]:
        """Those of photos, newest first."""
        return [each for each in self._sets() if not (self.folder(each.id) / CLASSES).is_file()]

    def classes(self) -> list[Dataset]:
        """Those of class pictures, newest first."""
        return [each for each in self._sets() if (self.folder(each.id) / CLASSES).is_file()]

    def _sets(self) -> list[Dataset]:
        folders = [folder for folder in self.workspace.datasets.iterdir() if folder.is_dir() and _is_id(folder.name)]
        folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        return [Dataset(folder.name, _title(folder)) for folder in folders]

    def folder(self, dataset: str) -> Path:
        """Where a set's photos lie; StudioError when there is no such set."""
        found: Path = self.workspace.folder(self.workspace.datasets, dataset, "photo set")
        return found

    def about(self, dataset: str) -> dict[str, Any]:
        """What a set says it shows: {"noun", "name", "rare": word or "", "id": in the file, "with": others}."""
        path = self.folder(dataset) / META / SHOWS
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def photos(self, dataset: str) -> list[Photo]:
        """The photos as a page shows them, reduced; [] for an empty set."""
        folder = self.folder(dataset)
        if not any(path.suffix.lower() in ENDINGS[:-1] for path in folder.iterdir()):
            return []
        found: list[Photo] = load_photos(folder, short_side=SHOWN)
        return found

    def add(self, files: Sequence[Path], title: str, dataset: str = "") -> tuple[str, list[str]]:
        """Put uploaded files into `dataset`, or into a new one called `title`. Gives its id and notes for the person.

        All or nothing: the set with the new files is read as training would read it before anything is kept.
        """
        title = clean_name(title or "Photos", "name of the photo set")
        if any(path.name == MUDI for path in files):
            return self._add_mudi(files)
        if any(path.name == CLASSES for path in files):
            return self._add_classes(files)
        _check(files)
        self.workspace.need(3 * sum(path.stat().st_size for path in files), "the photos")
        notes: list[str] = []
        with tempfile.TemporaryDirectory(prefix="attune-photos-") as temporary:
            trial = Path(temporary)
            if dataset:
                _copy(self.folder(dataset), trial)
            added = [_safe_name(path.name) for path in files]
            _check_photos(added, trial)
            for path, name in zip(files, added, strict=True):
                shutil.copyfile(path, trial / name)
            if len(load_photos(trial, short_side=64, notes=notes)) > MOST_PHOTOS:
                raise StudioError(f"A set holds at most {MOST_PHOTOS} photos. Leave some out.")
            folder = self.folder(dataset) if dataset else self._new(title)
            for name in added:
                write_atomic(folder / name, (trial / name).read_bytes())
        return folder.name, notes

    def _add_mudi(self, files: Sequence[Path]) -> tuple[str, list[str]]:
        """A folder in MuDI's form, uploaded: a new set for each subject, which says what it shows and who the others
        are. Gives the first one's id."""
        from pipelines import read_dataset, subjects_of, unpack

        _check([path for path in files if path.name != MUDI])
        self.workspace.need(3 * sum(path.stat().st_size for path in files), "the photos")
        with tempfile.TemporaryDirectory(prefix="attune-photos-") as temporary:
            flat, made = Path(temporary) / "flat", Path(temporary) / "made"
            flat.mkdir()
            _lay(files, flat)
            dataset = read_dataset(flat)
            nouns = {id: subject.noun for id, subject in zip(dataset.phrases, subjects_of(dataset)[0], strict=True)}
            called = {id: _word(noun, id) for id, noun in nouns.items()}
            if len(set(called.values())) < len(called):
                called = {id: id for id in called}
            subjects, rare = subjects_of(dataset, called)
            folders = unpack(dataset, made, names=called)
            rares = [*rare.split(), *[""] * len(subjects)]
            sets = [self._new(subject.noun) for subject in subjects]
            for id, subject, own, folder in zip(dataset.phrases, subjects, rares, sets, strict=False):
                name = subject.token.strip("<>")
                about = {"noun": subject.noun, "name": name, "rare": own, "id": id}
                about["with"] = [other.name for other in sets if other != folder]
                write_atomic(folder / META / SHOWS, json.dumps(about).encode())
                for path in folders[name].iterdir():
                    write_atomic(folder / path.name, path.read_bytes())
        told = " and ".join(f"<{subject.token.strip('<>')}> ({subject.noun})" for subject in subjects)
        return sets[0].name, [f"{MUDI} names {told}, a photo set each."]

    def _add_classes(self, files: Sequence[Path]) -> tuple[str, list[str]]:
        """Class pictures with their masks, as `prior` and MuDI write them."""
        from pipelines import class_pictures_of, read_dataset

        _check([path for path in files if path.name != CLASSES])
        self.workspace.need(3 * sum(path.stat().st_size for path in files), "the class pictures")
        with tempfile.TemporaryDirectory(prefix="attune-photos-") as temporary:
            trial = Path(temporary)
            _lay(files, trial)
            dataset = read_dataset(trial, CLASSES)
            class_pictures_of(dataset, short_side=64)
            shown = " and ".join(dict.fromkeys(dataset.phrases.values()))
            folder = self._new(clean_name(f"{len(dataset.rows)} of {shown}"[:80], "name of the photo set"))
            for path in sorted(trial.iterdir(), key=lambda path: path.name == CLASSES):  # the file that tells at last
                write_atomic(folder / path.name, path.read_bytes())
        return folder.name, ["Choose them under Class pictures."]

    @contextmanager
    def arriving(self, dataset: str, nouns: Sequence[str]) -> Iterator[Path]:
        """A new folder to write class pictures to. It is the set `dataset` (an id) afterwards, also after a stop, if
        its file is written, which comes last; else nothing is left of it."""
        with tempfile.TemporaryDirectory(prefix=".arriving-", dir=self.workspace.root) as temporary:
            folder = Path(temporary) / dataset
            try:
                yield folder
            finally:
                if (folder / CLASSES).is_file():
                    count = (folder / CLASSES).read_text("utf-8").count("\n") - 1  # the first line names the classes
                    title = f"Class pictures: {', '.join(dict.fromkeys(nouns))}"[:80]
                    (folder / META).mkdir()
                    write_atomic(folder / META / TITLE, f"{title} ({count})".encode())
                    folder.rename(self.workspace.datasets / dataset)

    def _new(self, title: str) -> Path:
        folder = self.workspace.datasets / new_id(title)
        (folder / META).mkdir(parents=True)
        write_atomic(folder / META / TITLE, title.encode())
        return folder

    def caption(self, dataset: str, photo: str, text: str) -> None:
        """Write a photo's caption, or several with an empty line between; an empty one is removed.

        StudioError for more than a reader takes; nothing is written then.
        """
        path = self._photo(dataset, photo).with_suffix(".txt")
        if text.strip():
            write_atomic(path, caption_bytes(captions_in(text), photo))
        else:
            path.unlink(missing_ok=True)

    def remove(self, dataset: str, photo: str) -> None:
        """Move a photo with its masks and caption to the trash."""
        path = self._photo(dataset, photo)
        trash = self.workspace.trash / new_id(f"photo {path.stem}")
        trash.mkdir()
        for found in [path, path.with_suffix(".txt"), *path.parent.glob(f"{_literal(path.stem)}-masklabel*")]:
            if found.is_file():
                shutil.move(found, trash / found.name)

    def _photo(self, dataset: str, photo: str) -> Path:
        """The file of that name in the set, found by listing: what the browser sends is never joined to a path."""
        for path in self.folder(dataset).iterdir():
            if path.name == photo and path.suffix.lower() in ENDINGS[:-1]:
                return path
        raise StudioError("This photo is not in the set any more. Choose the set again.")


def photo_cards(photos: Sequence[Photo]) -> list[Card]:
    """Cards of a set: the subject as it is, the rest dimmed where there is a mask."""
    return [
        Card(
            id=photo.path.name,
            text=photo.caption or "",
            image=data_uri(with_mask(photo), 224),
            badge="mask" if photo.masks else "",
        )
        for photo in photos
    ]


def with_mask(photo: Photo) -> Image.Image:
    """The photo with everything outside its masks washed out, and the masks' border drawn."""
    image = np.asarray(photo.image).astype(np.float32)
    if photo.masks:
        inside = np.max(np.stack(list(photo.masks.values())), axis=0)[..., None] >= 128
        image = np.where(inside, image, 0.35 * image + 0.65 * np.array([19.0, 67.0, 64.0]))
    return Image.fromarray(image.astype(np.uint8))


def _check(files: Sequence[Path]) -> None:
    if not files:
        raise StudioError("No file was chosen. Choose PNG, JPEG or WebP photos.")
    for path in files:
        if path.suffix.lower() not in ENDINGS:
            raise StudioError(f"{path.name} is not a photo Attune reads. Save it as PNG, JPEG or WebP.")
        if path.stat().st_size > MOST_BYTES:
            raise StudioError(f"{path.name} is larger than {MOST_BYTES // 1_000_000} MB. Make it smaller.")


def _check_photos(added: Sequence[str], folder: Path) -> None:
    """StudioError where neither the upload nor the set it goes into has a photo: captions and masks belong to one."""
    names = [Path(name) for name in (*added, *(path.name for path in folder.iterdir()))]
    if not any(name.suffix.lower() in ENDINGS[:-1] and MASK_MARK not in name.stem for name in names):
        raise StudioError(
            f"There is no photo among what you added, only {', '.join(added[:4])}{' ...' if len(added) > 4 else ''}. "
            "Add the PNG, JPEG or WebP photos that captions and masks belong to together with them."
        )


def _safe_name(name: str) -> str:
    """A file name to store under: the upload's own, so that masks and captions keep finding their photo."""
    clean: str = clean_name(Path(name).name, "file name")
    if clean.startswith(".") or any(mark in clean for mark in '/\\:*?"<>|'):
        raise StudioError(f"'{clean}' has a sign that file names can't have everywhere. Rename it.")
    return clean


def _lay(files: Sequence[Path], folder: Path) -> None:
    """Copies of uploads under names that can be stored; the metadata files of MuDI keep theirs."""
    for path in files:
        shutil.copyfile(path, folder / (path.name if path.name in (MUDI, CLASSES) else _safe_name(path.name)))


def _word(noun: str, otherwise: str) -> str:
    """A name made of a noun: "blue drink can" -> "blue-drink-can"."""
    name = "-".join(re.findall(r"\w+", noun.casefold()))
    return name if re.fullmatch(r"[^\W\d_][\w-]{0,40}", name) else otherwise


def _is_id(name: str) -> bool:
    """Whether a folder can be asked for by name; one that somebody made by hand may not."""
    try:
        return bool(check_id(name))
    except StudioError:
        return False


def _copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def _title(folder: Path) -> str:
    path = folder / META / TITLE
    return path.read_text(encoding="utf-8") if path.is_file() else folder.name


def _literal(stem: str) -> str:
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in stem)
