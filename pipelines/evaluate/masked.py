"""What an evaluation compares with: the subject's photos, and masks that were painted or that attention finds."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Progress
from pipelines.files import name_key, printable
from pipelines.masks import refined_masks
from pipelines.photos import Photo

if TYPE_CHECKING:
    from pipelines.concept import Concept, Subject
    from pipelines.evaluate.protocol import Shown
    from pipelines.model import Model
    from pipelines.photos import Mask

Both = tuple[list[Photo], list["Shown"]]


def subject_of(concept: Concept, name: str = "") -> tuple[Subject, list[Note]]:
    """The subject to measure, by its <token> or name, else the first; of several a Note says which.

    StudioError when the concept has no such subject.
    """
    wanted = name_key(name.strip("<>"))
    found = [one for one in concept.subjects if not name or name_key(one.token.strip("<>")) == wanted]
    if not found:
        known = ", ".join(one.token for one in concept.subjects)
        raise StudioError(f"'{printable(concept.name)}' has no subject '{printable(name)}'. It has {known}.")
    others = [one.token for one in concept.subjects if one != found[0]]
    said = f"Of '{printable(concept.name)}' {found[0].token} alone is measured, not {', '.join(others)}."
    return found[0], [Note(said)] if others else []


def photos_of(photos: Sequence[Photo], subject: Subject) -> list[Photo]:
    """The photos that show the subject, each with its own mask alone; one without a name is its, too.

    StudioError when there are none.
    """
    name = subject.token.strip("<>")
    shown = [photo for photo in photos if not photo.shows or name in photo.shows]
    if not shown:
        raise StudioError("There are no photos to compare with. Name the folder the concept was learned from.")
    return [
        replace(photo, masks={name: photo.masks[name]}) if name in photo.masks and len(photo.masks) > 1 else photo
        for photo in shown
    ]


def with_found_masks(
    model: Model, photos: Sequence[Photo], shown: Sequence[Shown], noun: str
) -> Generator[Event, None, Both]:
    """The same photos and pictures with a mask each; nothing may be attached to `model`.

    Where the noun isn't found there is an empty mask, which a Note says; such a picture isn't measured.
    """
    pictures = [replace(one, masks=one.masks or (None,) * len(one.pictures)) for one in shown]
    bare = [
        Photo(Path(f"{one.prompt}, picture {number}"), picture)
        for one in pictures
        for number, (picture, mask) in enumerate(zip(one.pictures, one.masks, strict=True), start=1)
        if mask is None
    ]
    missing = [photo for photo in photos if not photo.masks]
    if missing or bare:
        yield Note("Masks come from the base's own attention where none were painted.")
    masks = iter((yield from _refined(model, [*missing, *bare], noun)))
    found = [photo if photo.masks else replace(photo, masks={"": next(masks)}) for photo in photos]
    own = [replace(one, masks=tuple(next(masks) if mask is None else mask for mask in one.masks)) for one in pictures]
    return found, own


def _refined(model: Model, photos: Sequence[Photo], noun: str) -> Generator[Event, None, list[Mask]]:
    found: list[Mask] = []
    for event in refined_masks(model, photos, [noun]):
        if isinstance(event, Finished):
            found = [masks[noun].picture() for masks in event.value]
        elif isinstance(event, Progress | Note):
            yield event
    return found
