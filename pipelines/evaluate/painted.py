"""Pictures that were painted before, by the prompt each was painted from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.evaluate.protocol import Shown, subject_mask
from pipelines.files import printable
from pipelines.photos import load_photos
from pipelines.pictures import read_picture
from pipelines.sheet import SHEET

if TYPE_CHECKING:
    from pipelines.concept import Subject
    from pipelines.photos import Photo


def read_shown(folder: Path, subject: Subject, notes: list[str] | None = None) -> list[Shown]:
    """The pictures of `folder` by prompt, in the order of their files, with the masks that lie beside them.

    A prompt is what the picture itself says (ours, or A1111's text), else the caption beside it, x.txt. The subject
    stands there as its <token> or as {}. A picture that doesn't name it once is left out, which `notes` say.
    StudioError when none is left.
    """
    found: dict[str, list[Photo]] = {}
    for photo in load_photos(folder, notes=notes):
        if photo.path.name == SHEET:
            continue
        prompt = _prompt(photo).replace(subject.token, "{}")
        if prompt.count("{}") == 1:
            found.setdefault(prompt, []).append(photo)
        elif notes is not None:
            notes.append(f"{photo.path.name} is left out: its prompt doesn't say {subject.token} once.")
    if not found:
        raise StudioError(
            f"No picture in '{printable(folder)}' says that it was painted from a prompt with {subject.token}. Choose "
            "pictures made with it, or write the prompt beside each, as x.txt with {} for the subject."
        )
    return [_shown(prompt, photos) for prompt, photos in found.items()]


def _shown(prompt: str, photos: Sequence[Photo]) -> Shown:
    return Shown(prompt, tuple(one.image for one in photos), tuple(subject_mask(one) for one in photos))


def _prompt(photo: Photo) -> str:
    """As a reader would say it: one line, single spaces."""
    said = ""
    if photo.path.suffix.lower() == ".png":
        said = str(read_picture(photo.path)["request"].get("prompt") or "")
    return re.sub(r"\s+", " ", said or photo.caption or "").strip()
