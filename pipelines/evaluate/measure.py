"""Measurements as one piece of work each, with a report on disk: what the app starts and shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.evaluate.detect_compare import Match, Norm
    from pipelines.model import Model


@dataclass(frozen=True)
class Report:
    """What came out: a table (its head first), pictures with captions, what it was measured with, and all of it as
    files in `folder`."""

    title: str
    table: tuple[tuple[str, ...], ...]
    pictures: tuple[tuple[str, Path], ...]
    said: str
    folder: Path


@dataclass(frozen=True)
class Measured:
    """Who should be in a picture: a name, the noun that a detector is asked for, and a folder of photos."""

    name: str
    noun: str
    photos: Path


@dataclass(frozen=True)
class Likeness:
    """What is painted to measure a concept, and by what it is measured. `prompts` have {} for the subject, () = the
    protocol's; `clip` and `dino` are Hub ids or folders, "" = Toybox's CLIP and no DINO."""

    images: int = 4
    steps: int = 50
    prompts: tuple[str, ...] = ()
    masked: bool = False
    clip: str = ""
    dino: str = ""


@dataclass(frozen=True)
class Identities:
    """How pictures are looked at, as `compare` takes it. Without a detector Toybox's judge looks."""

    detector: str = ""
    embedder: str = ""
    threshold: float = 0.4
    norm: Norm = "spectral"
    match: Match = "greedy"

    def check(self) -> None:
        """StudioError for a threshold that nothing can reach."""
        if not 0 <= self.threshold <= 1:
            raise StudioError(f"A threshold of {self.threshold:g} is out of range. Choose 0 to 1; 0.4 is usual.")


def measure_likeness(
    model: Model, concept: tuple[Trained, float], photos: Path, folder: Path, wish: Likeness
) -> Iterator[Event]:
    """Textual Inversion's protocol for one concept at a strength, see `protocol`; ends with Finished(Report).

    StudioError for models that can't be loaded and for photos that can't be read, before anything is painted.
    """
    from pipelines.evaluate import report
    from pipelines.evaluate.encoders import loaded_looks
    from pipelines.evaluate.prompts import default_prompts
    from pipelines.evaluate.protocol import Wish, evaluate
    from pipelines.photos import load_photos

    notes: list[str] = []
    known = load_photos(photos, short_side=model.native_size, notes=notes)
    yield from map(Note, notes)
    looks = loaded_looks(model.kind, wish.clip, wish.dino, str(model.device))
    prompts = wish.prompts or default_prompts(model.kind)
    asked = Wish(prompts, images=wish.images, steps=wish.steps, masked=wish.masked)
    for event in evaluate(model, concept, known, asked, *looks):
        if not isinstance(event, Finished):
            yield event
            continue
        found = event.value
        report.write_report(folder, [found])
        head = ("prompt", *(report.TITLES.get(key, key) for key in found.measures))
        rows = [(line.prompt, *(str(line.figures[key]) for key in found.measures)) for line in report.lines([found])]
        shown = [(row.prompt, folder / "pictures" / f"0-{number}-0.png") for number, row in enumerate(found.rows)]
        said = (
            f"{wish.images} pictures of each prompt, {wish.steps} steps, {len(known)} photos; measured with "
            f"{', '.join(found.looks.values())}."
        )
        yield Finished(Report(found.name, (head, *rows), tuple(shown), said, folder))


def measure_identities(
    pictures: Sequence[Path], subjects: Sequence[Measured], folder: Path, wish: Identities, device: str = "cpu"
) -> Iterator[Event]:
    """Detect-and-Compare over the pictures, see `comparison`; ends with Finished(Report).

    StudioError for pictures that Toybox's judge can't know, where it is to look.
    """
    wish.check()
    from pipelines.evaluate import compare_report
    from pipelines.evaluate.comparison import Known, compare, from_toybox, subject_photos
    from pipelines.evaluate.eyes import eyes
    from pipelines.photos import load_photo

    painted = [load_photo(path, {}) for path in pictures]
    if not wish.detector and (wish.embedder or not from_toybox(painted)):
        raise StudioError(
            "Toybox's judge knows only its own world. Name a detector and an embedder, such as "
            "google/owlv2-base-patch16-ensemble and facebook/dinov2-base."
        )
    known = [Known(one.name, one.noun, subject_photos(one.photos, one.name)) for one in subjects]
    seer = eyes(wish.detector or "toybox", wish.embedder, threshold=wish.threshold, device=device)
    for event in compare(seer, painted, known, norm=wish.norm, match=wish.match):
        if not isinstance(event, Finished):
            yield event
            continue
        found = event.value
        compare_report.write_report(folder, found)
        rows = [(name, str(one), str(one.count)) for name, one in compare_report.figures(found).items()]
        shown = [
            (compare_report.caption(found, number), folder / "pictures" / f"{number:04d}.png")
            for number in range(len(painted))
        ]
        head = ("Detect-and-Compare", "mean [95 % interval]", "pictures")
        title = " and ".join(found.names)
        yield Finished(Report(title, (head, *rows), tuple(shown), compare_report.measured(found), folder))
