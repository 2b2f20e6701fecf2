"""A training run from photos to the library, in a folder of its own, runs/<id>/:

run.json       the recipe: method, settings, seed, base, hashes of the photos; at the end the concept's name
photos/        copies of what is learned from, so that a run can go on when the originals are gone
events.jsonl   what was said, with samples and heat maps beside it (eventlog.py)
checkpoints/   the last two (checkpoint.py)

Photos and checkpoints are deleted once the concept is in the library.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.checkpoint import newest
from pipelines.concept import Concept, Trained
from pipelines.errors import StudioError
from pipelines.eventlog import EventLog
from pipelines.events import Event, Finished, Note, Progress, Snapshot
from pipelines.files import check_id, is_locked, lock
from pipelines.joblog import RUN_LOCK
from pipelines.methods import get_method
from pipelines.naming import AND, named_subjects
from pipelines.processes import agree, join
from pipelines.run_classes import CLASSES, check_classes, keep_classes
from pipelines.run_data import Work, check, gather, read_photos
from pipelines.run_recipe import NAME, Recipe, photo_files, read_recipe, trim_log
from pipelines.stopped import CHECKPOINTS, discard, publish, unfinished

if TYPE_CHECKING:
    from pipelines.data import Data
    from pipelines.model import Model
    from pipelines.params import TrainParams
    from pipelines.workspace import Workspace

__all__ = ["discard", "record", "train_concept", "unfinished"]

_LOGS = 32_000_000  # bytes set aside for samples, heat maps and curves


def train_concept(
    workspace: Workspace,
    model: Model,
    *,
    method: str,
    photos: Path | Sequence[Path],
    noun: str | Sequence[str],
    name: str | Sequence[str],
    params: TrainParams,
    seed: int = 0,
    masks: bool = False,
    classes: Path | None = None,
    run_id: str | None = None,
    resume: bool = False,
) -> Iterator[Event]:
    """Learn `noun` as <name> from a folder of photos; ends with Finished(Trained), as it lies in the library.

    Several nouns and names are learned together: from one folder each, or all from one folder, whose masks
    `x-masklabel-<name>.png` and captions tell them apart. `classes` is a folder of class pictures with masks in MuDI's
    form (see run_classes.py), in place of those that the base paints where prior preservation asks for some.
    The events are recorded in the run's folder. Closing the generator keeps what was learned: a checkpoint, and a
    concept whose recipe says `steps_done`. `resume` goes on with run `run_id`, else with the newest unfinished run of
    that name, from its own copies of the photos. StudioError for everything a person can put right.
    """
    params = params.model_copy(update={"masked_loss": True}) if masks else params
    folders, subjects = _several(photos), named_subjects(_several(noun), _several(name))
    if len(folders) not in (1, len(subjects)):
        raise StudioError(
            f"There are {len(folders)} folders of photos for {len(subjects)} names. Name one folder for each, or one "
            "for all."
        )
    if classes is not None and not params.prior_weight:
        raise StudioError("Class pictures count only where prior_weight is above 0. Set it to 1, or leave them out.")
    if not 0 <= seed < 2**63:
        raise StudioError(f"{seed} can't be a seed. Choose a whole number from 0 on.")
    base = {"id": model.id, "fingerprint": model.fingerprint, "kind": model.kind}
    steps = sum(stage.steps for stage in get_method(method).stages(params))
    settings = params.model_dump(mode="json")
    recipe = Recipe(AND.join(_several(name)), subjects, method, settings, seed, base, steps)
    work = Work(workspace, model, recipe, params, Path(), join(), resume, classes)
    if not work.share.main:
        work.folder, work.resume = _told(work)
        yield from (event for event in _learned(work) if isinstance(event, Finished))
        return
    work.folder, work.resume = _opened(work, folders, run_id)
    agree(f"{work.folder.name} {work.resume:d}", work.share)
    with lock(work.folder / RUN_LOCK, timeout=5), closing(_kept(work)) as events:
        yield from record(events, work.folder)


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path) else list(value)


def record(events: Iterator[Event], folder: Path) -> Iterator[Event]:
    """Pass events on, each written to folder/events.jsonl first; its pictures become files beside it."""
    with EventLog(folder) as log:
        for event in events:
            yield log.append(event)


def _opened(work: Work, photos: Sequence[Path], run_id: str | None) -> tuple[Path, bool]:
    """The run's folder, new or that of the run to go on with, and whether there is anything to go on from."""
    workspace, wanted = work.workspace, work.recipe
    if work.resume and run_id is None:
        run_id = next((run.id for run in unfinished(workspace) if run.name == wanted.name), None)
        if run_id is None:
            raise StudioError(f"There is no stopped run of '{wanted.name}'. Start one without resuming.")
    folder = workspace.runs / check_id(run_id, "run") if run_id else None
    if work.resume and folder and (folder / NAME).exists():
        if is_locked(folder / RUN_LOCK):
            raise StudioError("This run is training already, in another window or terminal. Stop it there first.")
        first, point = read_recipe(folder), newest(folder / CHECKPOINTS)
        work.recipe = replace(wanted, source=first.source, files=first.files, created=first.created)
        work.recipe.write(folder)
        trim_log(folder, {stage.name for stage in work.stages}, point.done if point else 0)
        return folder, True
    size = sum(path.stat().st_size for folder in photos for path in photo_files(folder))
    workspace.need(size + _LOGS, "this run")
    check(work, read_photos(work, photos, work.notes))
    if work.classes is not None:
        check_classes(work.classes, work.subjects)
    folder = folder or workspace.new_folder(workspace.runs, wanted.name)
    folder.mkdir(exist_ok=True)
    if work.classes is not None:
        keep_classes(work.classes, work.subjects, folder)
    work.recipe = wanted.started(folder, photos)
    return folder, False


def _told(work: Work) -> tuple[Path, bool]:
    """What the main process opened."""
    name, resume = agree("", work.share).split()
    folder = work.workspace.runs / name
    work.recipe = read_recipe(folder)
    return folder, resume == "1"


def _kept(work: Work) -> Generator[Event, None, None]:
    """The run; what it has learned goes into the library at its end, and when it is closed before."""
    try:
        yield from _learned(work)
    except GeneratorExit:
        point = newest(work.folder / CHECKPOINTS)
        if point is not None and point.done:
            facts = {"steps_done": point.done, "steps": work.recipe.steps}
            _published(work, Trained(_concept(work, facts), point.part("adapter")))
        raise


def _learned(work: Work) -> Iterator[Event]:
    from pipelines.train import train

    data = yield from gather(work)
    work.photo = data.sources[0].image
    method, checkpoints = get_method(work.recipe.method), work.folder / CHECKPOINTS
    run = train(
        work.model, method, data, work.params, seed=work.recipe.seed, checkpoint=checkpoints, resume=work.resume
    )
    trained: Trained | None = None
    with closing(run) as events:
        for event in events:
            if isinstance(event, Finished):
                trained = event.value
                continue
            yield event
            if isinstance(event, Progress):
                yield from _look(work, data, event)
    assert trained is not None
    trained = Trained(_concept(work, {}), trained.tensors)
    if work.share.main:
        concept = _published(work, trained)
        work.recipe.finished(work.folder, concept.name)
        shutil.rmtree(work.folder / CLASSES, ignore_errors=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
        yield from map(Note, _renaming(work.recipe, concept))
        trained = Trained(concept, trained.tensors)
    yield Finished(trained)


def _renaming(recipe: Recipe, concept: Concept) -> list[str]:
    """A sentence for a name that was taken, and for each word that was: a concept may clash by either alone."""
    told = []
    if concept.name != recipe.name:
        told.append(f"The library has a '{recipe.name}' already: this one is called '{concept.name}'.")
    for wanted, given in zip(recipe.subjects, concept.subjects, strict=True):
        if wanted.token != given.token:
            told.append(
                f"{wanted.token} belongs to another concept already: in a prompt, write {given.token} for this."
            )
    return told


def _look(work: Work, data: Data, event: Progress) -> Iterator[Event]:
    """A sample now and then, and at the end; only where files are written."""
    every = work.params.sample_every
    last = event.step == event.total
    if not every or not work.share.main or (event.step % every and not last):
        return
    from pipelines.samples import look

    try:
        for seen in look(work.model, data, event.step):
            work.preview = seen.image if isinstance(seen, Snapshot) else work.preview
            yield seen
    except StudioError as error:
        yield Note(f"No sample at step {event.step}: {error}")


def _concept(work: Work, facts: dict[str, int]) -> Concept:
    recipe = work.recipe
    origin = {"run": work.folder.name, "photos": recipe.files} | facts
    return Concept(recipe.name, recipe.subjects, recipe.method, recipe.base, recipe.params, recipe.seed, recipe=origin)


def _published(work: Work, trained: Trained) -> Concept:
    """Into the library, with the newest sample as its picture, else a photo."""
    preview = work.preview
    if preview is None and (samples := sorted(work.folder.glob("sample-*.png"))):  # of the run before a resume
        with Image.open(samples[-1], formats=["PNG"]) as image:
            preview = np.asarray(image.convert("RGB"))
    return publish(work.workspace, work.folder, trained, work.photo if preview is None else preview)
