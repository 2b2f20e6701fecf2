"""What a run learns from: its photos with their masks, class pictures, collages."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Progress
from pipelines.methods import Stage, get_method
from pipelines.processes import Share, wait
from pipelines.run_recipe import PHOTOS, Recipe

if TYPE_CHECKING:
    from pipelines.concept import Subject
    from pipelines.data import Data
    from pipelines.events import Picture
    from pipelines.model import Model
    from pipelines.params import TrainParams
    from pipelines.photos import Photo
    from pipelines.sources import ClassPicture, Mixer
    from pipelines.workspace import Workspace

MASKS = "masks"  # in the workspace: found masks, shared by all runs


@dataclass
class Work:
    """One run under way."""

    workspace: Workspace
    model: Model
    recipe: Recipe
    params: TrainParams
    folder: Path
    share: Share
    resume: bool
    classes: Path | None = None  # class pictures that were handed in
    notes: list[str] = field(default_factory=list)  # about the photos
    photo: Picture | None = None  # stands for the concept where no sample was painted
    preview: Picture | None = None

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return self.recipe.subjects

    @property
    def stages(self) -> list[Stage]:
        return list(get_method(self.recipe.method).stages(self.params))


def gather(work: Work) -> Generator[Event, None, Data]:
    """Photos and, with prior preservation, class pictures, ready to train on."""
    from pipelines.data import prepare

    yield from map(Note, work.notes)
    copies = work.folder / PHOTOS
    count = len({Path(name).parent for name in work.recipe.files})
    photos = yield from _masked(work, read_photos(work, work.recipe.folders(copies, count)))
    _approved(work, photos)
    pictures: list[ClassPicture] = []
    class_mixer: Mixer | None = None
    if work.params.prior_weight:
        from pipelines.run_classes import class_pictures_of_run

        pictures, class_mixer = yield from class_pictures_of_run(work, mixer_of(work, "class_mixer"))
    return prepare(
        work.model,
        photos,
        work.params,
        work.subjects,
        work.recipe.seed,
        prior=pictures,
        mixer=mixer_of(work),
        class_mixer=class_mixer,
        augment=augment(work.params) if (augment := getattr(get_method(work.recipe.method), "augment", None)) else None,
    )


def mixer_of(work: Work, kind: str = "mixer") -> Mixer | None:
    """Where the method makes collages: of photos ("mixer"), of class pictures ("class_mixer")."""
    make = getattr(get_method(work.recipe.method), kind, None)
    return make(work.params, work.subjects) if make else None


def read_photos(work: Work, folders: Sequence[Path], notes: list[str] | None = None) -> list[Photo]:
    """The photos at the size they are trained at; with a folder for each subject, they show that one."""
    from pipelines.photos import load_photos

    side = work.params.resolution or work.model.native_size
    photos = []
    for number, folder in enumerate(folders):
        found = load_photos(folder, short_side=side, notes=notes)
        shows = (work.subjects[number].token.strip("<>"),) if len(folders) > 1 else ()
        photos += [replace(photo, shows=shows) for photo in found]
    small = [photo for photo in photos if min(photo.size) < side]
    if notes is not None:
        notes += [f"{photo.path.name} has only {min(photo.size)} pixels; it is enlarged." for photo in small]
    return photos


def check(work: Work, photos: Sequence[Photo]) -> None:
    """StudioError when a noun is missing or masks can't be had, before a run begins."""
    from pipelines.data import prepare

    found_later = bool(_lacking(work, photos))
    alone: dict[str, Any] = {"prior_weight": 0.0} | ({"masked_loss": False} if found_later else {})
    mixer = None if found_later else mixer_of(work)
    if not found_later:
        _approved(work, photos)
    prepare(work.model, photos, work.params.model_copy(update=alone), work.subjects, 0, mixer=mixer)


def _approved(work: Work, photos: Sequence[Photo]) -> None:
    """StudioError when the method itself can't learn from these photos with their masks."""
    approve = getattr(get_method(work.recipe.method), "check_photos", None)
    if approve:
        approve(work.params, work.subjects, photos)


def _masked(work: Work, photos: list[Photo]) -> Generator[Event, None, list[Photo]]:
    """Masks of the subjects by attention where they are needed and nobody made one; found once and kept."""
    lacking = _lacking(work, photos)
    if not lacking:
        return photos
    from pipelines.masks import with_masks

    if not work.share.main:
        wait(work.share)  # they are found by one process and read by all
    done = {}
    for photo in lacking:
        for event in with_masks(work.model, [photo], _shown(work, photo), cache=work.workspace.root / MASKS):
            if isinstance(event, Finished):
                (done[photo.path],) = event.value
            elif not isinstance(event, Progress):
                yield event
        yield Progress("masks", len(done), len(lacking))
    if work.share.main:
        wait(work.share)
        yield Note(f"Masks of {len(lacking)} photos were found by attention. Better ones can be drawn beside them.")
    return [done.get(photo.path, photo) for photo in photos]


def _lacking(work: Work, photos: Sequence[Photo]) -> list[Photo]:
    """Photos without a mask of a subject in them, where masks are needed. StudioError where words can't tell apart."""
    method = get_method(work.recipe.method)
    wanted = getattr(method, "needs_masks", lambda params: params.masked_loss)(work.params)
    if not wanted and mixer_of(work) is None:
        return []
    lacking = [
        p for p in photos if "" not in p.masks and not {s.token.strip("<>") for s in _shown(work, p)} <= p.masks.keys()
    ]
    for photo in lacking:
        nouns = [subject.noun for subject in _shown(work, photo)]
        if len(set(nouns)) < len(nouns):
            raise StudioError(
                f"{photo.path.name} shows several things called '{nouns[0]}', and their word can't tell them apart. "
                f"Draw {photo.path.stem}-masklabel-<name>.png for each."
            )
    return lacking


def _shown(work: Work, photo: Photo) -> list[Subject]:
    return [s for s in work.subjects if not photo.shows or s.token.strip("<>") in photo.shows]
