"""What is known of every job after its process is gone: `runs/<id>/job.json` beside the recorded events.

Who is still alive is told by a lock, not by a process id: a runner holds `runs/.runner-<hex>.lock` as long as it lives,
and the operating system lets go of it even after `kill -9`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines import files
from pipelines.errors import StudioError
from pipelines.eventlog import LOG_NAME, read_events
from pipelines.events import Event, Finished
from pipelines.intake import read_json
from pipelines.workspace import Workspace

State = Literal["queued", "running", "done", "failed", "stopped", "interrupted"]
RECORD_NAME = "job.json"
RUN_LOCK = ".lock"  # held in a run's folder by whoever trains there without a runner (the command line)
_RUNNER = ".runner-"
_YOUNG = 60.0  # seconds
_KEPT = 100  # records of jobs other than trainings
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobRecord:
    """One earlier or present job as the disk knows it. "interrupted": its process died before the end."""

    id: str
    title: str
    kind: str = "job"  # "train", "generate" ...
    state: State = "interrupted"
    error: str = ""
    created: float = 0.0  # seconds since the epoch
    ended: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # what the submitter needs to do it again
    runner: str = ""
    folder: Path = Path()  # not written

    @property
    def unfinished(self) -> bool:
        """Stopped on the way, so that it may be taken up again."""
        return self.state in ("stopped", "interrupted", "failed")

    def events(self) -> Iterator[Event]:
        """What the job said, from disk."""
        return read_events(self.folder)


def write_record(record: JobRecord) -> None:
    """Write job.json into the record's folder, which is made when missing."""
    record.folder.mkdir(parents=True, exist_ok=True)
    data = {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if item.name != "folder"}
    files.write_json(record.folder / RECORD_NAME, data)


def history(workspace: Workspace) -> list[JobRecord]:
    """Every run on disk, the newest first, also those of other processes and of the command line."""
    alive: dict[str, bool] = {}
    records = []
    for folder in workspace.runs.iterdir():
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
            with contextlib.suppress(StudioError):  # a broken record of one run must not hide the others
                records.append(_read(folder, alive))
    return sorted(records, key=lambda record: record.created, reverse=True)


def prune(workspace: Workspace) -> None:
    """Delete the records of old jobs that are over, but never those of trainings, which can be taken up again."""
    over = [record for record in history(workspace) if record.state in ("done", "failed", "stopped", "interrupted")]
    for record in [record for record in over if record.kind != "train"][_KEPT:]:
        shutil.rmtree(record.folder, ignore_errors=True)


@contextlib.contextmanager
def living(workspace: Workspace) -> Iterator[str]:
    """The name of a new runner, known to other processes as alive until the block ends or the process dies."""
    for old in workspace.runs.glob(f"{_RUNNER}*.lock"):
        with contextlib.suppress(FileNotFoundError):  # another process cleans up, too
            young = time.time() - old.stat().st_mtime < _YOUNG  # its owner may be about to lock it
            if not young and not files.is_locked(old):
                old.unlink()
    name = secrets.token_hex(8)
    path = _runner_lock(workspace.runs, name)
    with files.lock(path):
        yield name
    path.unlink(missing_ok=True)


def _runner_lock(runs: Path, name: str) -> Path:
    return runs / f"{_RUNNER}{name}.lock"


def _read(folder: Path, alive: dict[str, bool]) -> JobRecord:
    if not (folder / RECORD_NAME).exists():
        return _guess(folder)
    data = read_json(folder / RECORD_NAME)
    try:
        record = JobRecord(**data, folder=folder)
    except TypeError as error:
        raise StudioError(f"The record of the run '{folder.name}' is broken. Delete {folder}.") from error
    if record.state in ("queued", "running"):
        known = record.runner and files.check_id(record.runner, "runner")
        if known not in alive:
            alive[known] = bool(known) and files.is_locked(_runner_lock(folder.parent, known))
        if not alive[known]:
            return dataclasses.replace(record, state="interrupted")
    return record


def _guess(folder: Path) -> JobRecord:
    """A run that no runner started: its log says whether it came to its end."""
    log = folder / LOG_NAME
    stamp = (log if log.exists() else folder).stat().st_mtime
    state: State = "interrupted"
    if files.is_locked(folder / RUN_LOCK):
        state = "running"
    elif any(isinstance(event, Finished) for event in read_events(folder)):
        state = "done"
    return JobRecord(folder.name, folder.name, "train", state, created=stamp, folder=folder)
