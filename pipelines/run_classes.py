"""The class pictures of a run: painted by the base and masked by its attention, or handed in with masks.

Handed in is a folder with MuDI's `class_metadata.jsonl`, whose ids are the subjects' names; the run keeps a copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.events import Event, Note, Progress
from pipelines.files import printable, spare_disk
from pipelines.formats.mudi import CLASS_FILE, Dataset, class_pictures_of, read_dataset
from pipelines.mixers import SegMixer
from pipelines.processes import wait
from pipelines.run_data import MASKS, Work
from pipelines.sources import ClassPicture

if TYPE_CHECKING:
    from pipelines.concept import Subject
    from pipelines.sources import Mixer

PRIOR = "prior"  # in the workspace: painted class pictures, shared by all runs
CLASSES = "classes"  # in the run's folder: those that were handed in
STAGE = "class masks"


def class_pictures_of_run(work: Work, mixer: Mixer | None) -> Generator[Event, None, tuple[list[ClassPicture], Any]]:
    """The pictures, and who mixes them: `mixer`, or nobody where that can't be done, which a Note tells."""
    if not work.share.main:
        wait(work.share)  # they are made by one process and read by all
    if (work.folder / CLASSES).is_dir():
        dataset = read_classes(work.folder / CLASSES, work.subjects)
        pictures = class_pictures_of(dataset, short_side=work.params.resolution or work.model.native_size)
        phrases = {f"<{name}>": phrase for name, phrase in dataset.phrases.items()}
        mixer = None if mixer is None else replace(mixer, phrases=phrases)  # type: ignore[type-var]
    else:
        pictures = yield from _painted(work)
        if isinstance(mixer, SegMixer):
            pictures = yield from _masked(work, pictures)
    if work.share.main:
        wait(work.share)
    cut = isinstance(mixer, SegMixer)
    known = {picture.token for picture in pictures if picture.mask is not None or not cut}
    missing = [subject.noun for subject in work.subjects if subject.token not in known]
    if mixer is not None and missing:
        yield Note(f"Class pictures are not mixed: none of them shows a {missing[0]} that could be cut out.")
        mixer = None
    return pictures, mixer


def read_classes(folder: Path, subjects: tuple[Subject, ...]) -> Dataset:
    """What a folder of class pictures says. StudioError, with file and line, when it is broken or of other subjects."""
    dataset = read_dataset(folder, CLASS_FILE)
    names = [subject.token.strip("<>") for subject in subjects]
    if set(dataset.phrases) != set(names):
        dataset = _renamed(dataset, subjects)
    if set(dataset.phrases) != set(names):
        there = ", ".join(printable(id, 40) for id in dataset.phrases)
        raise StudioError(
            f"{dataset.where(dataset.first)} names {there}, but {', '.join(names)} are learned. Use the same names."
        )
    return dataset


def _renamed(dataset: Dataset, subjects: tuple[Subject, ...]) -> Dataset:
    """With the subjects' names for ids where each noun is the phrase of one id alone; else as it is."""
    names = {subject.noun: subject.token.strip("<>") for subject in subjects}
    called = {id: names.get(phrase, id) for id, phrase in dataset.phrases.items()}
    if len(names) < len(subjects) or set(called.values()) != set(names.values()) or len(called) > len(names):
        return dataset
    phrases = {called[id]: phrase for id, phrase in dataset.phrases.items()}
    return replace(dataset, phrases=phrases, rows=tuple(replace(row, id=called[row.id]) for row in dataset.rows))


def check_classes(folder: Path, subjects: tuple[Subject, ...]) -> None:
    """StudioError as `read_classes`, and for pictures and masks that are broken."""
    class_pictures_of(read_classes(folder, subjects), short_side=64)


def keep_classes(folder: Path, subjects: tuple[Subject, ...], run: Path) -> None:
    """Copy the class pictures in `folder` to the run."""
    dataset = read_classes(folder, subjects)
    files = [dataset.file, *(path for row in dataset.rows for path in (row.picture, row.mask))]
    for path in files:
        target = run / CLASSES / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with spare_disk(target, path.stat().st_size):
            shutil.copyfile(path, target)


def _painted(work: Work) -> Generator[Event, None, list[ClassPicture]]:
    from pipelines.prior import class_pictures

    params, folder = work.params, work.workspace.root / PRIOR
    pictures = yield from class_pictures(work.model, work.subjects, params.prior_count, folder, size=params.resolution)
    return pictures


def _masked(work: Work, pictures: list[ClassPicture]) -> Generator[Event, None, list[ClassPicture]]:
    """With the masks that attention finds."""
    from pipelines.class_masks import by_attention

    find = by_attention(work.model, work.workspace.root / MASKS)
    nouns = {subject.token: subject.noun for subject in work.subjects}
    done = []
    for picture in pictures:
        done.append(picture._replace(mask=find(picture.image, nouns[picture.token])))
        yield Progress(STAGE, len(done), len(pictures))
    return done
