"""The jobs that tabs submit: what was asked for as plain data, and the generator that does it in the worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines import Event, Finished, JobRecord, StudioError, Wish, discard, get_method, new_id, presets
from studio.class_pictures import called_alike
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
    """The wish with a rare word for each thing where its method needs them, and a sentence when some were changed.

    Those that the photo sets bring (MuDI's do) go before a preset's and ours, as on the command line; what a person
    wrote stays as far as it reaches.
    """
    written = str(wish.params.get("rare_word") or "")
    things, words = wish.things(), written.split()
    brought = [about(studio, one["photos"]).get("rare", "") for one in things]
    own = [word if word not in brought[:at] else "" for at, word in enumerate(brought)]
    usual = any(own) and written in _usual_words(studio, wish.method)
    if not words or (len(words) >= len(things) and not usual):
        return wish, ""
    spare = [word for word in dict.fromkeys((*words, *RARE_WORDS)) if word not in own]
    chosen = " ".join(word or spare.pop(0) for word in own)
    return replace(wish, params=wish.params | {"rare_word": chosen}), f" Rare words: {chosen}."


def _usual_words(studio: Studio, method: str) -> list[str]:
    """The rare words of a method's presets: nobody wrote them for these photos."""
    return [getattr(each.params, "rare_word", "") for each in presets(method, studio.presets)]


def photo_folder(studio: Studio, photos: str) -> Path:
    """The folder behind a photo set's id; StudioError when it is gone."""
    if photos == EXAMPLE:
        if not studio.example.is_dir():
            raise StudioError("The example photos are missing from this copy of Attune. Upload photos of your own.")
        return studio.example
    return studio.datasets.folder(photos)


def about(studio: Studio, photos: str) -> dict[str, Any]:
    """What a photo set says it shows, see `Datasets.about`."""
    return {} if photos == EXAMPLE else studio.datasets.about(photos)


def start_training(studio: Studio, wish: Training, run: str = "", resume: bool = False) -> Job:
    """Queue a training run; `run` and `resume` take up an earlier one. StudioError if it can't start at all."""
    things = wish.things()
    sets = list(dict.fromkeys(one["photos"] for one in things))
    if len(sets) > 1:
        sets = [one["photos"] for one in things]
    for photos in sets:
        photo_folder(studio, photos)
    ids = {str(about(studio, one["photos"]).get("id", "")): one["name"] for one in things}
    classes = called_alike(studio, wish.classes, ids) if wish.classes else None
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


@dataclass(frozen=True)
class Look:
    """How masks are found: by attention, grey where it is unsure when `soft`, with some of `MaskParams` as KEY=VALUE;
    or by a `detector` ("toybox", or an OWLv2 by Hub id or folder), whose boxes, made larger by `margin`, are cut out by
    Segment Anything, from the checkpoint `segmenter`, "" = Toybox's own."""

    soft: bool = False
    settings: tuple[str, ...] = ()
    detector: str = ""
    segmenter: str = ""
    sure: float = 0.2
    margin: float = 0.05


def start_masks(
    studio: Studio, photos: str, nouns: Sequence[str], names: Sequence[str], overwrite: bool, look: Look | None = None
) -> Job:
    """Queue the finding of masks for a photo set; without nouns, of everything that stands out.

    A mask that a person made is kept unless `overwrite`. StudioError for words that can't be looked for and for
    settings that make no sense.
    """
    look = look or Look()
    if look.detector and not nouns:
        raise StudioError("A detector looks for words. Say what the photos show.")
    if not 0 <= look.sure <= 1:
        raise StudioError(f"A threshold of {look.sure:g} is out of range. Choose 0 to 1; 0.2 is usual.")
    if not 0 <= look.margin <= 0.5:
        raise StudioError(f"A box can't be made larger by {look.margin:g} of the photo. Choose 0 to 0.5.")
    by_word = bool(nouns) and not look.detector
    wish = Wish(
        folder=studio.datasets.folder(photos),
        nouns=tuple(nouns),
        names=tuple(names) if len(nouns) > 1 else (),
        overwrite=overwrite,
        soft=look.soft and by_word,
        settings=look.settings if by_word else (),
        cache=studio.workspace.root / "masks",
    )
    wish.check()

    def detected() -> Iterator[Event]:
        from pipelines import Finder, check_segmenter, load_segmenter, segmented_masks
        from pipelines import detector as find

        check_segmenter(look.segmenter, detector=look.detector)
        device = "cpu" if studio.base.model is None else str(studio.base.model.device)
        finder = Finder(find(look.detector, threshold=look.sure, device=device), look.margin)
        yield from segmented_masks(load_segmenter(look.segmenter, device), wish, finder=finder)

    def work() -> Iterator[Event]:
        from pipelines import discovered_masks, noun_masks

        model = yield from studio.base.ready()
        yield from (noun_masks if wish.nouns else discovered_masks)(model, wish)

    title = f"Find {' and '.join(nouns)} in the photos" if nouns else "Find things in the photos"
    return studio.jobs.submit(title[:80], detected if look.detector else work, kind="masks", record=False)


def start_outline(studio: Studio, image: Any, at: Sequence[float], where: str, attention: bool = False) -> Job:
    """Queue one question: what is at a point (x, y) or in a box of `image`? Ends with its mask. Segment Anything
    answers, from the checkpoint `where`, or the base's own attention."""
    if studio.jobs.active():
        raise StudioError(
            "Something else is running, and a click would wait for it. Paint the mask, or try again later."
        )

    def work() -> Iterator[Event]:
        from pipelines import check_segmenter, load_segmenter

        check_segmenter(where, base=studio.base.where)
        device = "cpu" if studio.base.model is None else str(studio.base.model.device)
        segmenter = load_segmenter(where, device)
        segmenter.look(image)
        yield Finished(segmenter.click([(at[0], at[1])]) if len(at) == 2 else segmenter.box(at))

    def attended() -> Iterator[Event]:
        from pipelines import Marking, marked_mask

        model = yield from studio.base.ready()
        left, top, *rest = at
        marking = Marking(box=(left, top, rest[0], rest[1])) if rest else Marking(clicks=((left, top),))
        yield Finished(marked_mask(model, image, marking))

    return studio.jobs.submit("Find an outline", attended if attention else work, kind="outline", record=False)
