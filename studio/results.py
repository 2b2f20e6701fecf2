"""The pictures that were made, as pages show them: one by one, newest first, found by ids that may be forged."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines import Result, StudioError, Workspace, atlas, list_results
from studio.parts.cards import Card
from studio.parts.pictures import thumbnail
from studio.parts.scrubber import payload

ATLAS_PIXELS = 6_000_000  # about 2 MB of PNG: scrubbing needs no server, so it all goes to the browser at once


@dataclass(frozen=True)
class Painted:
    """One picture of a result."""

    result: Result
    number: int  # in the result, from 0

    @property
    def id(self) -> str:
        return f"{self.result.id}/{self.number}"

    @property
    def about(self) -> dict[str, Any]:
        """{"file", "seed", "width", "height", "attention"?}"""
        return dict(self.result.pictures[self.number])

    @property
    def path(self) -> Path:
        return self.result.paths[self.number]

    @property
    def words(self) -> list[str]:
        """Those whose attention was kept."""
        return list(self.about.get("attention", {}).get("overlays", {}))


def results_sign(workspace: Workspace) -> Hashable:
    """Another value whenever a picture came or went."""
    records = workspace.results.glob("*/result.json")
    return tuple(sorted((record.parent.name, record.stat().st_mtime_ns) for record in records))


def pictures(workspace: Workspace) -> list[Painted]:
    """Every picture, the newest result first."""
    return _pictures(workspace, results_sign(workspace))


@lru_cache(maxsize=4)
def _pictures(workspace: Workspace, _sign: Hashable) -> list[Painted]:
    found: list[Result] = list_results(workspace)
    return [Painted(result, number) for result in found for number in range(len(result.pictures))]


def find(workspace: Workspace, id: str) -> Painted | None:
    """The picture of that id; None when there is none."""
    return next((each for each in pictures(workspace) if each.id == id), None)


def demand(workspace: Workspace, id: str) -> Painted:
    """The same, or a StudioError."""
    found = find(workspace, id)
    if found is None:
        raise StudioError("This picture is not there any more. Choose another.")
    return found


def picture_cards(painted: Sequence[Painted]) -> list[Card]:
    """A card each."""
    return [
        Card(
            id=each.id,
            text=each.result.prompt,
            image=thumbnail(each.path),
            badge="attention" if each.words else "",
        )
        for each in painted
    ]


def attention_payload(painted: Painted, word: str) -> str:
    """What the scrubber shows of a word in a picture; StudioError when its file is gone."""
    kept = painted.about["attention"]
    file = painted.result.folder / kept["file"]
    if not file.is_file():
        raise StudioError("The attention of this picture is not there any more. Make the picture again.")
    return _payload(painted.path, file, int(kept["row"]), word, tuple(painted.words))


@lru_cache(maxsize=8)
def _payload(picture: Path, file: Path, row: int, word: str, words: tuple[str, ...]) -> str:
    from pipelines import load_npz  # late: it brings torch

    store = load_npz(file)
    sheet, index = atlas(store, word, row, ATLAS_PIXELS)
    return payload(thumbnail(picture, 1024), words, sheet, index, store.detail == "heads")
