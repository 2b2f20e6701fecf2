"""Class pictures painted from the page: a new set beside the photo sets, for prior preservation with masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines import Event, StudioError, new_id, read_dataset, renamed_classes
from studio.datasets import CLASSES, Dataset
from studio.jobs import Job
from studio.session import Studio

KIND = "classes"
EACH = 50  # of a class, as the command paints
SURE = 0.4  # of a detector, as the command
MOST = 200


@dataclass(frozen=True)
class Classes:
    """What is to be painted: `nouns` by the names of what they are for. Masks are found by attention, or by `detector`
    ("toybox", or an OWLv2 by Hub id or folder) and Segment Anything's file `segmenter`, "" = Toybox's own."""

    nouns: dict[str, str]
    each: int = EACH
    detector: str = ""
    segmenter: str = ""
    sure: float = SURE


def start_classes(studio: Studio, wish: Classes) -> Job:
    """Queue the painting. Stopped, it keeps what is done, when that is at least one picture of each class."""
    if not 1 <= wish.each <= MOST:
        raise StudioError(f"{wish.each} pictures of each class can't be painted at once. Choose 1 to {MOST}.")
    nouns = list(dict.fromkeys(wish.nouns.values()))
    dataset = new_id(f"classes {' '.join(nouns)}")

    def work() -> Iterator[Event]:
        from pipelines import ClassWish, class_finder, masked_class_pictures  # late: they bring torch

        model = yield from studio.base.ready()
        find = class_finder(model, wish.detector, wish.segmenter, wish.sure, studio.workspace.root / "masks")
        with studio.datasets.arriving(dataset, nouns) as folder:
            yield from masked_class_pictures(model, wish.nouns, find, folder, ClassWish(wish.each))

    title = f"Paint class pictures: {', '.join(nouns)}"[:80]
    return studio.jobs.submit(title, work, kind=KIND, meta=asdict(wish) | {"set": dataset}, record=False)


def made_by(studio: Studio, job: Job) -> Dataset | None:
    """The set that a job left; None while there is none."""
    return next((each for each in studio.datasets.classes() if each.id == job.meta["set"]), None)


def called_alike(studio: Studio, classes: str, names: Mapping[str, str]) -> Path:
    """The folder of a set of class pictures, or a copy of it under other names: `names` are those of the things that
    are learned, by the ids that their photos came with. A set of other ids stays as it is."""
    folder = studio.datasets.folder(classes)
    found = read_dataset(folder, CLASSES)
    if set(found.phrases) != set(names) or all(id == name for id, name in names.items()):
        return folder
    return renamed_classes(found, studio.scratch(), names)
