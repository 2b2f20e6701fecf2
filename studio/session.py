"""Studio: what every tab is handed. One per process; no globals."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import Library, Workspace
from studio.base import Base
from studio.datasets import Datasets
from studio.jobs import Job, JobRunner
from studio.render import View, fold

MOST_COPIES = 40
PASSING = (
    "warm",
    "base",
    "generate",
    "open",
    "masks",
    "classes",
    "outline",
    "measure",
)  # kinds of jobs whose record is of no use after a restart
EXAMPLE = Path(__file__).parent.parent / "assets" / "example"


@dataclass
class _Watched:
    """A job's view so far, and up to which event."""

    view: View = field(default_factory=View)
    seen: int = 0


class Studio:
    """The base, the library, the jobs and the workspace, and what may be shown of them."""

    def __init__(
        self, workspace: Workspace, base: str = "toybox", example: Path = EXAMPLE, example_base: str = "toybox"
    ) -> None:
        self.workspace = workspace
        self.library = Library(workspace)
        self.jobs = JobRunner(workspace)
        self.base = Base(base)
        self.datasets = Datasets(workspace)
        self.example, self.example_base = example, example_base
        self._views: dict[str, _Watched] = {}
        self._lock = threading.Lock()
        self.tidy()
        self._copies = Path(tempfile.mkdtemp(prefix="attune-shown-"))

    def tidy(self) -> None:
        """Forget the logs of earlier jobs that leave nothing to go on with: their pictures are results by now."""
        for record in self.jobs.history():
            if record.kind in PASSING and record.state not in ("queued", "running"):
                shutil.rmtree(record.folder, ignore_errors=True)

    def close(self) -> None:
        """Stop the running job cleanly and remove the copies that were shown."""
        self.jobs.close()
        shutil.rmtree(self._copies, ignore_errors=True)

    def view(self, job: Job) -> View:
        """What a page shows of `job` now. All pages share one fold; it only reads events that are new."""
        with self._lock:
            for gone in self._views.keys() - {known.id for known in self.jobs.jobs()}:
                del self._views[gone]
            watched = self._views.setdefault(job.id, _Watched())
            number, events = job.since(watched.seen)
            watched.view, watched.seen = fold(watched.view, events), number
            return watched.view

    def latest(self, kind: str) -> Job | None:
        """The job of that kind to show: the running one, else the newest one that has begun, else the next in line."""
        of_kind = [job for job in self.jobs.jobs() if job.kind == kind]
        begun = [job for job in of_kind if job.state != "queued"]
        running = [job for job in begun if not job.over]
        found = running or begun[-1:] or of_kind[:1]
        return found[0] if found else None

    def library_sign(self) -> Hashable:
        """Another value whenever a concept came, went or was changed, also by another process."""
        records = self.workspace.concepts.glob("*/concept.json")
        return tuple(sorted((record.parent.name, record.stat().st_mtime_ns) for record in records))

    @property
    def presets(self) -> Path:
        """Where a person's own presets lie; the folder need not be there."""
        return self.workspace.root / "presets"

    def presets_sign(self) -> Hashable:
        """Another value whenever one of a person's own presets came, went or was changed."""
        return tuple(sorted((path.name, path.stat().st_mtime_ns) for path in self.presets.glob("*.toml")))

    def scratch(self) -> Path:
        """A new folder outside the workspace for a file that a page may have; the oldest of many is removed."""
        with self._lock:
            folders = sorted(self._copies.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
            for old in folders[: -MOST_COPIES + 1]:
                shutil.rmtree(old, ignore_errors=True)
            return Path(tempfile.mkdtemp(dir=self._copies))

    def shown(self, path: Path) -> str:
        """A copy of one file, fit for Gradio: the workspace itself is never served."""
        return str(shutil.copyfile(path, self.scratch() / path.name))
