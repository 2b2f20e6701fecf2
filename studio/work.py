"""The jobs that tabs submit: what was asked for as plain data, and the generator that does it in the worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines import Event, JobRecord, StudioError, discard, get_method, new_id
from studio.jobs import Job
from studio.session import Studio

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


def photo_folder(studio: Studio, photos: str) -> Path:
    """The folder behind a photo set's id; StudioError when it is gone."""
    if photos == EXAMPLE:
        if not studio.example.is_dir():
            raise StudioError("The example photos are missing from this copy of Attune. Upload photos of your own.")
        return studio.example
    return studio.datasets.folder(photos)


def start_training(studio: Studio, wish: Training, run: str = "", resume: bool = False) -> Job:
    """Queue a training run; `run` and `resume` take up an earlier one. StudioError if it can't start at all."""
    photo_folder(studio, wish.photos)
    params = get_method(wish.method).Params(**wish.params)
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
            photos=photo_folder(studio, wish.photos),
            noun=wish.noun,
            name=wish.name,
            params=params,
            seed=wish.seed,
            masks=bool(params.masked_loss),
            run_id=run,
            resume=resume,
        )

    return studio.jobs.submit(f"Train {wish.name}", work, kind="train", meta=asdict(wish), job_id=run, record=False)


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
    """A word about the jobs that come first."""
    return f" {ahead} {'job is' if ahead == 1 else 'jobs are'} ahead of it." if ahead else ""


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
