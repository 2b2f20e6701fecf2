"""MuDI's metadata.jsonl for a folder of photos with masks, so that its own trainer and ours find them.

The first line names the subjects by a rare word and their noun, every other one a photo of one of them with its mask,
its caption with those words in it and, which readers may ignore, the `box` of the mask in the photo's pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import StudioError
from pipelines.files import write_atomic
from pipelines.formats.mudi import FILE
from pipelines.photos import load_photos

if TYPE_CHECKING:
    from pipelines.photos import Mask, Photo


@dataclass(frozen=True)
class Phrase:
    """One subject: its id, what its masks are called ("" = no name), its rare word and its noun."""

    id: str
    mask: str
    rare: str
    noun: str

    @property
    def words(self) -> str:
        """As a caption says it: "sks cat"."""
        return f"{self.rare} {self.noun}"


def phrases(nouns: Sequence[str], files: Sequence[str], rare: str) -> list[Phrase]:
    """A phrase for each noun with its masks' names, and a rare word for each from "sks hta".

    StudioError when there are not as many rare words as nouns, or one stands twice.
    """
    words = rare.split()
    if len(words) != len(nouns) or len(set(words)) < len(words):
        raise StudioError(
            f"--metadata needs a rare word for each of {len(nouns)} nouns, no two alike, as in --metadata 'sks hta'."
        )
    ids = [file or "-".join(noun.split()) for noun, file in zip(nouns, files, strict=True)]
    return [Phrase(*one) for one in zip(ids, files, words, nouns, strict=True)]


def check_metadata(folder: Path, overwrite: bool) -> None:
    """StudioError when there is a metadata file that may not be replaced."""
    if (folder / FILE).exists() and not overwrite:
        raise StudioError(f"{folder / FILE} is already there. Use --overwrite to replace it.")


def write_metadata(folder: Path, subjects: Sequence[Phrase], boxes: Mapping[str, Sequence[int]]) -> Path:
    """Every photo of `folder` with a mask of one of `subjects`, whoever made it; the file that was written.

    `boxes` are a detector's, by the mask's file; where there is none it is the mask's own. A subject without any mask
    is left out. StudioError when there is no mask at all.
    """
    rows: list[dict[str, Any]] = []
    for photo in load_photos(folder):
        rows += [_row(photo, one, boxes) for one in subjects if one.mask in photo.masks]
    shown = {row["id"] for row in rows}
    if not rows:
        raise StudioError(f"There is no mask in {folder} that {FILE} could speak of. Make masks first.")
    lines = [{"id": {one.id: one.words for one in subjects if one.id in shown}}, *rows]
    write_atomic(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return folder / FILE


def _row(photo: Photo, subject: Phrase, boxes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    from pipelines.mask_files import mask_file

    mask = mask_file(photo, subject.mask)
    texts = [_text(line, subject) for line in (photo.caption or "").splitlines() or [""]]
    return {
        "id": subject.id,
        "file_name": photo.path.name,
        "mask_path": mask,
        "text": texts if len(texts) > 1 else texts[0],
        "box": list(boxes.get(mask) or _box(photo.masks[subject.mask])),
    }


def _text(caption: str, subject: Phrase) -> str:
    """The caption with the phrase where the subject or its noun stands; a plain one where neither does."""
    if caption:
        for said in (subject.words, f"<{subject.id}>", subject.noun):
            pattern = rf"(?<![\w<]){re.escape(said)}(?![\w>])"
            text, count = re.subn(pattern, lambda _: subject.words, caption, count=1, flags=re.IGNORECASE)
            if count:
                return text
    return f"A photo of a {subject.words}"


def _box(mask: Mask) -> list[int]:
    """left, top, right, bottom of what is white; right and bottom are just outside."""
    rows, columns = np.flatnonzero((mask > 127).any(1)), np.flatnonzero((mask > 127).any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
