"""Measuring from the page: how well a concept is learned, and who is in pictures that were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipelines import Event, StudioError, new_id
from studio.jobs import Job
from studio.results import demand, pictures
from studio.session import Studio
from studio.work import EXAMPLE, photo_folder

if TYPE_CHECKING:
    from pipelines import Identities, Likeness

KIND = "measure"
REPORTS = "reports"  # in the workspace


def photo_choices(studio: Studio) -> list[tuple[str, str]]:
    """(title, id) of the photo sets that a measurement can compare with."""
    own = [(each.title, each.id) for each in studio.datasets.all()]
    return own + ([("The example's photos", EXAMPLE)] if studio.example.is_dir() else [])


def start_likeness(
    studio: Studio, concept: str | None, sets: Sequence[str], wish: Likeness, strength: float = 1.0
) -> Job:
    """Queue Textual Inversion's protocol for a concept at a strength."""
    if not concept:
        raise StudioError("Choose the concept to measure.")
    if len(sets) != 1:
        raise StudioError("Choose one photo set: the photos that the concept was learned from.")
    photos, folder = photo_folder(studio, sets[0]), _folder(studio, concept)

    def work() -> Iterator[Event]:
        from pipelines import measure_likeness

        model = yield from studio.base.ready()
        trained = studio.library.load(concept)
        yield from measure_likeness(model, (trained, strength), photos, folder, wish)

    at = "" if strength == 1 else f" at {strength:g}"
    return studio.jobs.submit(f"Measure {concept}"[: 80 - len(at)] + at, work, kind=KIND, record=False)


def start_identities(studio: Studio, picture: str, sets: Sequence[str], wish: Identities) -> Job:
    """Queue Detect-and-Compare for the pictures made together with `picture` ("" = the newest)."""
    wish.check()
    newest = next(iter(pictures(studio.workspace)), None)
    if not picture and newest is None:
        raise StudioError("There are no pictures yet. Make some that show your concepts.")
    result = demand(studio.workspace, picture or newest.id).result  # type: ignore[union-attr]
    subjects = _subjects(studio, [one["name"] for one in result.recipe.get("concepts", [])], sets)
    folder = _folder(studio, result.id)

    def work() -> Iterator[Event]:
        from pipelines import measure_identities

        device = "cpu" if studio.base.model is None else str(studio.base.model.device)
        yield from measure_identities(result.paths, subjects, folder, wish, device)

    return studio.jobs.submit(f"Look who is in “{result.prompt[:50]}”", work, kind=KIND, record=False)


def _subjects(studio: Studio, concepts: Sequence[str], sets: Sequence[str]) -> list[Any]:
    """The concepts' subjects, each with the photo set of its name, or else the set that stands in its place."""
    from pipelines import Measured

    known = [one for concept in studio.library.concepts() if concept.name in concepts for one in concept.subjects]
    names = [one.token.strip("<>") for one in known]
    if not known:
        raise StudioError(
            "These pictures were made without a concept that is in the library, so there is nobody in them."
        )
    if len(sets) != len(known):
        raise StudioError(f"The pictures should show {', '.join(names)}. Choose the photo set of each, in that order.")
    own = {_shows(studio, one): one for one in sets}
    rest = [one for one in sets if _shows(studio, one) not in names]
    found = []
    for subject, name in zip(known, names, strict=True):
        dataset = own.get(name) or rest.pop(0)
        found.append(Measured(name, subject.noun, photo_folder(studio, dataset)))
    return found


def _shows(studio: Studio, dataset: str) -> str:
    return "" if dataset == EXAMPLE else str(studio.datasets.about(dataset).get("name", ""))


def _folder(studio: Studio, title: str) -> Any:
    return studio.workspace.root / REPORTS / new_id(title)
