"""Jobs: one worker thread owns the device; a job outlives the browser tab that asked for it. No Gradio in here.

    runner = JobRunner(workspace)
    job = runner.submit("Train my-cat", lambda: train_concept(...), kind="train", meta={...})
    for number, events in job.follow():
        ...

Work is a function that returns an iterator of events. It is called, stepped through and closed in the worker alone, so
every `with` inside it unwinds there and nothing else ever touches the model.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from typing import Any

from pipelines import (
    EventLog,
    Finished,
    JobRecord,
    StudioError,
    Workspace,
    check_id,
    history,
    living,
    new_id,
    prune,
    write_atomic,
    write_record,
)
from studio.job import Job, Work

TRACE = "error.txt"
_REMEMBERED = 30  # finished jobs kept in memory; older ones are found through history()
logger = logging.getLogger(__name__)


class JobRunner:
    """A queue and the one thread that works it off, first in, first out. `close()` ends it; so does the interpreter."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._queue: deque[Job] = deque()
        self._known: dict[str, Job] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._stack = contextlib.ExitStack()
        self._name = self._stack.enter_context(living(workspace))
        prune(workspace)
        self._thread = threading.Thread(target=self._serve, name="attune-worker", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(
        self, title: str, work: Work, *, kind: str = "job", meta: dict[str, Any] | None = None,
        job_id: str | None = None, record: bool = True,
    ) -> Job:  # fmt: skip
        """Put `work` into the queue. `meta` (plain JSON) is kept for doing it again after a restart.

        `job_id` names the folder in runs/ (default: a new one; `new_id(title)` makes one beforehand); that of an
        earlier job goes on in its folder. `record=False` when the work itself records its events there.
        StudioError while a job of that id is unfinished, or after `close`.
        """
        job_id = check_id(job_id, "job") if job_id else new_id(title)
        folder = self.workspace.runs / job_id
        entry = JobRecord(
            job_id, title, kind, "queued", created=time.time(), meta=meta or {}, runner=self._name, folder=folder
        )
        job = Job(entry, work, record, self)
        with self._wake:
            if self._closing:
                raise StudioError("Attune is shutting down. Start it again, then repeat this.")
            if job_id in self._known and not self._known[job_id].over:
                raise StudioError(f"'{self._known[job_id].title}' is already in the queue. Wait for it or stop it.")
            write_record(entry)
            self._forget()
            self._known.pop(job_id, None)
            self._known[job_id] = job
            self._queue.append(job)
            self._wake.notify_all()
        return job

    def jobs(self) -> list[Job]:
        """The jobs of this process in the order they were submitted, finished ones included."""
        with self._wake:
            return list(self._known.values())

    def active(self) -> list[Job]:
        """The running job, then the queue."""
        return [job for job in self.jobs() if not job.over]

    def job(self, job_id: str) -> Job | None:
        """The job of that id, when this process still knows it."""
        with self._wake:
            return self._known.get(job_id)

    def cancel(self, job_id: str) -> None:
        """Stop a job: a waiting one at once, the running one after its present step. Unknown ids do nothing."""
        job = self.job(job_id)
        if job is None or job.over:
            return
        job.cancel()

    def history(self) -> list[JobRecord]:
        """Earlier and present runs from disk, the newest first; unfinished ones may be submitted again."""
        return history(self.workspace)

    def close(self, timeout: float = 60.0) -> None:
        """Stop the running job cleanly, leave the waiting ones as unfinished on disk, and end the thread."""
        with self._wake:
            self._closing = True
            waiting = list(self._known.values())
            self._wake.notify_all()
        for job in waiting:
            job.cancel()
        self._thread.join(timeout)
        self._stack.close()
        atexit.unregister(self.close)

    def place(self, job: Job) -> int:
        """1 for the next in the queue, 0 for a job that isn't waiting."""
        with self._wake:
            return 1 + self._queue.index(job) if job in self._queue else 0

    def _forget(self) -> None:
        over = [job.id for job in self._known.values() if job.over]
        for job_id in over[:-_REMEMBERED]:
            del self._known[job_id]

    def drop_stopped(self) -> None:
        """Take waiting jobs that were asked to stop out of the queue."""
        with self._wake:
            gone = [job for job in self._queue if job.stop_asked]
            self._queue = deque(job for job in self._queue if not job.stop_asked)
        for job in gone:
            job.become(state="stopped", ended=time.time())

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    break
                job = self._queue.popleft()
                job.started = time.time()
            self._run(job)
        for job in list(self._queue):
            job.become(state="stopped", ended=time.time())

    def _run(self, job: Job) -> None:
        job.become(state="running")
        try:
            state, error = _work_off(job), ""
        except StudioError as problem:
            state, error = "failed", str(problem)
        except Exception as problem:  # the one place where a bug is caught: it must not take the worker with it
            state, error = "failed", _bug(job, problem)
        job.become(state=state, error=error, ended=time.time())


def _bug(job: Job, problem: Exception) -> str:
    """Keep the traceback, in memory and on disk; the sentence to show."""
    job.is_bug, job.trace = True, traceback.format_exc()
    logger.error("The job '%s' failed\n%s", job.title, job.trace)
    with contextlib.suppress(OSError, StudioError):
        write_atomic(job.record.folder / TRACE, job.trace.encode("utf-8", "replace"))
    return f"This is a bug in Attune ({type(problem).__name__}). Its details are in runs/{job.id}/{TRACE}."


def _work_off(job: Job) -> str:
    """Step through the work until it ends or a stop is asked for; the state it leaves."""
    work, job.work = job.work, None
    if work is None or job.stop_asked:
        return "stopped"
    finished = False
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(EventLog(job.record.folder)) if job.recorded else None
        events = iter(work())
        if hasattr(events, "close"):
            stack.callback(events.close)
        for event in events:
            job.take(log.append(event) if log else event)
            finished = finished or isinstance(event, Finished)
            if job.stop_asked and not finished:
                return "stopped"
    return "done"
