"""run.json, what a training run is made of, and the copies of its photos beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.eventlog import LOG_NAME
from pipelines.files import spare_disk, write_atomic, write_json
from pipelines.intake import read_json
from pipelines.photos import SUFFIXES

NAME = "run.json"
PHOTOS = "photos"


@dataclass(frozen=True)
class Recipe:
    """Everything a run's result follows from. `concept` is its name in the library once the run has finished."""

    name: str
    subjects: tuple[Subject, ...]
    method: str
    params: dict[str, Any]
    seed: int
    base: dict[str, str]  # id, fingerprint, kind
    steps: int  # of all stages together
    source: str = ""  # the folder or folders the photos came from
    files: dict[str, str] = field(default_factory=dict)  # file name -> sha256
    created: float = field(default_factory=time.time)
    concept: str = ""

    def folders(self, photos: Path, count: int) -> list[Path]:
        """Where the photos of each of `count` folders are copied to, under `photos`."""
        names = [subject.token.strip("<>") for subject in self.subjects]
        return [photos] if count == 1 else [photos / name for name in names]

    def started(self, folder: Path, photos: Sequence[Path]) -> Recipe:
        """Copy the photos with their masks and captions into `folder` and write run.json last: then the run exists."""
        hashes = {}
        for source, copies in zip(photos, self.folders(folder / PHOTOS, len(photos)), strict=True):
            copies.mkdir(exist_ok=True, parents=True)
            for path in photo_files(source):
                with spare_disk(copies / path.name, path.stat().st_size):
                    shutil.copyfile(path, copies / path.name)
                name = (copies / path.name).relative_to(folder / PHOTOS).as_posix()
                hashes[name] = hashlib.sha256((copies / path.name).read_bytes()).hexdigest()
        made = replace(self, source=", ".join(str(path.absolute()) for path in photos), files=hashes)
        made.write(folder)
        return made

    def finished(self, folder: Path, concept: str) -> None:
        """The concept is in the library: what only a resume would need is deleted."""
        replace(self, concept=concept).write(folder)
        shutil.rmtree(folder / PHOTOS, ignore_errors=True)

    def write(self, folder: Path) -> None:
        """Atomically; StudioError when the disk is full."""
        write_json(folder / NAME, asdict(self))


def read_recipe(folder: Path) -> Recipe:
    """The recipe of an earlier run; StudioError when it is missing or broken."""
    data = read_json(folder / NAME)
    try:
        return Recipe(**(data | {"subjects": tuple(Subject(**subject) for subject in data["subjects"])}))
    except (TypeError, KeyError) as error:
        raise StudioError(f"The recipe of the run '{folder.name}' is broken. Start a new run.") from error


def photo_files(folder: Path) -> list[Path]:
    """The photos, masks and captions of a data folder. StudioError when there is no such folder."""
    if not folder.is_dir():
        raise StudioError(f"There is no folder '{folder}'. Name the folder that holds the photos.")
    found = (path for path in folder.iterdir() if path.suffix.lower() in (*SUFFIXES, ".txt") and path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def trim_log(folder: Path, stages: set[str], done: int) -> None:
    """Forget what the log says after training step number `done`, since those steps are about to be made again."""
    path = folder / LOG_NAME
    if not path.exists():
        return
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill
            break
        step = event.get("event") == "Progress" and event.get("stage") in stages
        if step and not done:
            break
        done -= step
        kept.append(line)
    write_atomic(path, b"".join(kept))
