"""Detect-and-Compare over a folder of pictures, with what was measured and by what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.evaluate.detect_compare import NORMS, Comparison, Match, Norm, detect_and_compare, references, summary
from pipelines.events import Event, Finished, Note, Progress
from pipelines.files import printable
from pipelines.photos import load_photos
from pipelines.sheet import SHEET

if TYPE_CHECKING:
    from pipelines.evaluate.detect_compare import Matrix
    from pipelines.evaluate.eyes import Eyes
    from pipelines.events import Picture
    from pipelines.photos import Photo

STAGE = "compare"


@dataclass(frozen=True)
class Known:
    """A subject that the pictures should show: its name, what a detector is asked for, and its photos."""

    name: str
    query: str
    photos: tuple[Picture, ...]


@dataclass(frozen=True)
class Compared:
    """The pictures with what was found in each, and what they were compared by."""

    subjects: tuple[Known, ...]
    pictures: tuple[Photo, ...]
    results: tuple[Comparison, ...]
    own: Matrix  # S_GT: how alike the subjects' photos are to each other
    eyes: str
    match: Match

    @property
    def names(self) -> list[str]:
        """The subjects, in the order of rows and columns."""
        return [one.name for one in self.subjects]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data: "summary", "subjects" with S_GT, and "pictures", a Comparison each."""
        rows = zip(self.pictures, self.results, strict=True)
        subjects = [{"name": one.name, "query": one.query, "photos": len(one.photos)} for one in self.subjects]
        return {
            "summary": summary(self.results),
            "measured_with": self.eyes,
            "match": self.match,
            "subjects": subjects,
            "own": self.own.round(4).tolist(),
            "pictures": [{"file": picture.path.name} | result.to_json() for picture, result in rows],
        }


def compare(
    eyes: Eyes,
    pictures: Sequence[Photo],
    subjects: Sequence[Known],
    *,
    norm: Norm = "spectral",
    match: Match = "greedy",
) -> Iterator[Event]:
    """Judge every picture; ends with Finished(Compared). StudioError without pictures, subjects or photos of one."""
    if norm not in NORMS:
        raise StudioError(f"There is no norm '{norm}'. Choose one of: {', '.join(NORMS)}.")
    if not pictures:
        raise StudioError("There are no pictures to judge. Make some first.")
    photos = {one.name: one.photos for one in subjects}
    if len(photos) < len(subjects):
        raise StudioError("Two subjects have one name. Give each its own: --subject NAME:NOUN=DIR.")
    known = references(eyes, photos, {one.name: one.query for one in subjects})
    results = []
    for number, picture in enumerate(pictures, start=1):
        results.append(detect_and_compare(eyes, picture.image, known, norm=norm, match=match))
        yield Progress(STAGE, number, len(pictures))
    alike = [
        f"{one.name} and {other.name}"
        for row, one in enumerate(subjects)
        for column, other in enumerate(subjects[:row])
        if known.own[row, column] >= min(known.own[row, row], known.own[column, column])
    ]
    if alike:
        yield Note(
            f"The photos of {printable(', '.join(alike))} are as alike as those of one subject, so these eyes can't "
            "tell them apart."
        )
    yield Finished(Compared(tuple(subjects), tuple(pictures), tuple(results), known.own, eyes.name, match))


def subject_photos(folder: Path, name: str, notes: list[str] | None = None) -> tuple[Picture, ...]:
    """A subject's photos: all in the folder or, of one of MuDI's, those whose id is `name`.

    StudioError when there are none, or no such id.
    """
    from pipelines.formats import mudi

    if not mudi.is_dataset(folder):
        return tuple(photo.image for photo in load_photos(folder, notes=notes))
    dataset = mudi.read_dataset(folder)
    if name not in dataset.phrases:
        raise StudioError(
            f"{mudi.FILE} has no subject '{printable(name)}'. It has: {printable(', '.join(dataset.phrases))}."
        )
    return tuple(photo.image for photo in mudi.photos_of(dataset) if name in photo.shows)


def read_pictures(folder: Path, notes: list[str] | None = None) -> list[Photo]:
    """The pictures to judge: all in the folder but the sheet of them all."""
    return [photo for photo in load_photos(folder, notes=notes) if photo.path.name != SHEET]


def from_toybox(pictures: Sequence[Photo]) -> bool:
    """Whether every picture says that it was painted by Toybox's base."""
    from pipelines.pictures import read_picture

    def kind(path: Path) -> Any:
        recipe: Mapping[str, Any] = read_picture(path)["attune"] or {}
        base = recipe.get("base")
        return base.get("kind") if isinstance(base, dict) else None

    return all(one.path.suffix.lower() == ".png" and kind(one.path) == "toybox" for one in pictures)
