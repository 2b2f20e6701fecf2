"""The jobs that tabs submit: what was asked for as plain data, and the generator that does it in the worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines import Event, Finished, JobRecord, StudioError, Wish, discard, get_method, new_id
from studio.jobs import Job
from studio.session import Studio

RARE_WORDS = ("sks", "olis", "hta", "ukj", "pll", "ohwx")  # as many as a form has things
EXAMPLE = "example"  # stands for the bundled photos where a photo set is named


@dataclass(frozen=True)
class Training:
    """A wish to learn a subject. It is stored with the run, so that an unfinished one can go on after a restart."""

    photos: str  # id of a photo set, or EXAMPLE
    noun: str
    name: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    base: str = "toybox"
    classes: str = ""  # id of a set of class pictures, "" = the base paints them
    more: Sequence[dict[str, str]] = ()  # further things: {"photos" ("" = the same), "noun", "name"}

    def things(self) -> list[dict[str, str]]:
        """All that is to be learned, each with its own photo set."""
        first = {"photos": self.photos, "noun": self.noun, "name": self.name}
        return [first, *(one | {"photos": one["photos"] or self.photos} for one in self.more)]


def with_rare_words(studio: Studio, wish: Training) -> tuple[Training, str]:
    """The wish with a rare word for each thing where its method needs them, and a sentence when some were added.

    Those that the photo sets bring (MuDI's do) go before ours.
    """
    written = wish.params.get("rare_word")
    things = wish.things()
    if not written or len(things) == 1 or len(written.split()) >= len(things):
        return wish, ""
    sets = [{} if one["photos"] == EXAMPLE else studio.datasets.about(one["photos"]) for one in things]
    own = [about.get("rare", "") for about in sets]
    spare = [word for word in dict.fromkeys((*written.split(), *RARE_WORDS)) if word not in own]
    words = " ".join(word or spare.pop(0) for word in own)
    return replace(wish, params=wish.params | {"rare_word": words}), f" Rare words: {words}."


def photo_folder(studio: Studio, photos: str) -> Path:
    """The folder behind a photo set's id; StudioError when it is gone."""
    if photos == EXAMPLE:
        if not studio.example.is_dir():
            raise StudioError("The example photos are missing from this copy of Attune. Upload photos of your own.")
        return studio.example
    return studio.datasets.folder(photos)


def start_training(studio: Studio, wish: Training, run: str = "", resume: bool = False) -> Job:
    """Queue a training run; `run` and `resume` take up an earlier one. StudioError if it can't start at all."""
    things = wish.things()
    sets = list(dict.fromkeys(one["photos"] for one in things))
    if len(sets) > 1:
        sets = [one["photos"] for one in things]
    for photos in sets:
        photo_folder(studio, photos)
    classes = studio.datasets.folder(wish.classes) if wish.classes else None
    title = " and ".join(one["name"] for one in things)
    params = get_method(wish.method).Params(**wish.params)
    if wish.classes and not params.prior_weight:
        raise StudioError(
            "The chosen class pictures count only where prior_weight is above 0. Set it to 1 under Advanced, or choose "
            "'Painted by the base' under Class pictures."
        )
    run = run or new_id(wish.name)

    def work() -> Iterator[Event]:
        from pipelines import train_concept  # late: the engine takes seconds to import

        if studio.base.where != wish.base:
            yield from studio.base.change(wish.base, last=False)
        model = yield from studio.base.ready()
        yield from train_concept(
            studio.workspace,
            model,
            method=wish.method,
            photos=[photo_folder(studio, photos) for photos in sets],
            noun=[one["noun"] for one in things],
            name=[one["name"] for one in things],
            params=params,
            seed=wish.seed,
            masks=bool(params.masked_loss),
            classes=classes,
            run_id=run,
            resume=resume,
        )

    return studio.jobs.submit(f"Train {title}"[:80], work, kind="train", meta=asdict(wish), job_id=run, record=False)


def resume_training(studio: Studio, run: str) -> Job:
    """Queue an unfinished run again, from its newest checkpoint, with the settings it had."""
    try:
        wish = Training(**_waiting_run(studio, run).meta)
    except TypeError as error:
        raise StudioError(
            "This run was started elsewhere. Go on with it on the command line: train ... --resume."
        ) from error
    return start_training(studio, wish, run, resume=True)


def discard_training(studio: Studio, run: str) -> str:
    """Delete an unfinished run with the concept that was kept of it; gives its title."""
    record = _waiting_run(studio, run)
    discard(studio.workspace, record.id)
    return str(record.title)


def _waiting_run(studio: Studio, run: str) -> JobRecord:
    """The record of a run that can be taken up; StudioError when there is none of that id."""
    for record in studio.jobs.history():
        if record.id == run and record.kind == "train" and record.unfinished:
            return record
    raise StudioError("This run is not waiting to be resumed any more. Reload the page.")


def waiting(ahead: int) -> str:
    """A word about the jobs that come first; it stays true when they are done."""
    return f" Queued behind {ahead} other {'job' if ahead == 1 else 'jobs'}." if ahead else ""


def start_change_of_base(studio: Studio, where: str) -> Job:
    """Queue the loading of another base."""
    title = "Toybox" if where == "toybox" else where
    return studio.jobs.submit(f"Load {title}"[:80], lambda: studio.base.change(where), kind="base")


def start_warming(studio: Studio) -> None:
    """Load the base when the first page opens, so that words can be split and the first job starts at once."""
    if studio.base.model is None and not studio.base.error and not studio.jobs.active():

        def work() -> Iterator[Event]:
            yield from studio.base.ready()

        studio.jobs.submit(f"Load {studio.base.title}"[:80], work, kind="warm", record=False)


def start_pictures(studio: Studio, request: Any, concepts: list[tuple[str, float]], words: tuple[str, ...]) -> Job:
    """Queue pictures. `concepts` are names in the library with strengths, `words` those whose attention is kept."""

    def work() -> Iterator[Event]:
        from pipelines import make_pictures

        model = yield from studio.base.ready()
        trained = [(studio.library.load(name), strength) for name, strength in concepts]
        yield from make_pictures(studio.workspace, model, request, trained, attention=words)

    return studio.jobs.submit(f"Paint “{request.prompt[:70]}”", work, kind="generate")


def start_masks(
    studio: Studio,
    photos: str,
    nouns: Sequence[str],
    names: Sequence[str],
    overwrite: bool,
    detector: str = "",
    segmenter: str = "",
) -> Job:
    """Queue the finding of masks by attention for a photo set; without nouns, of everything that stands out.

    With a `detector` ("toybox", or an OWLv2 by Hub id or folder) its boxes are cut out by Segment Anything, from the
    checkpoint `segmenter`, "" = Toybox's own. A mask that a person made is kept unless `overwrite`. StudioError for
    words that can't be looked for.
    """
    if detector and not nouns:
        raise StudioError("A detector looks for words. Say what the photos show.")
    wish = Wish(
        folder=studio.datasets.folder(photos),
        nouns=tuple(nouns),
        names=tuple(names) if len(nouns) > 1 else (),
        overwrite=overwrite,
        cache=studio.workspace.root / "masks",
    )
    wish.check()

    def detected() -> Iterator[Event]:
        from pipelines import Finder, load_segmenter, segmented_masks
        from pipelines import detector as find

        device = "cpu" if studio.base.model is None else str(studio.base.model.device)
        finder = Finder(find(detector, device=device))
        yield from segmented_masks(load_segmenter(segmenter, device), wish, finder=finder)

    def work() -> Iterator[Event]:
        from pipelines import discovered_masks, noun_masks

        model = yield from studio.base.ready()
        yield from (noun_masks if wish.nouns else discovered_masks)(model, wish)

    title = f"Find {' and '.join(nouns)} in the photos" if nouns else "Find things in the photos"
    return studio.jobs.submit(title[:80], detected if detector else work, kind="masks", record=False)


def start_outline(studio: Studio, image: Any, at: Sequence[float], where: str) -> Job:
    """Queue one question to the segmenter: what is at a point (x, y) or in a box of `image`. Ends with its mask."""
    if studio.jobs.active():
        raise StudioError(
            "Something else is running, and a click would wait for it. Paint the mask, or try again later."
        )

    def work() -> Iterator[Event]:
        from pipelines import load_segmenter

        device = "cpu" if studio.base.model is None else str(studio.base.model.device)
        segmenter = load_segmenter(where, device)
        segmenter.look(image)
        yield Finished(segmenter.click([(at[0], at[1])]) if len(at) == 2 else segmenter.box(at))

    return studio.jobs.submit("Find an outline", work, kind="outline", record=False)
