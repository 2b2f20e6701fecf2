"""One job: what a page may know of it, and what the worker tells it. No Gradio in here."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

from pipelines import Event, JobRecord, Progress, StudioError, write_record
from studio.kept import Kept

Work = Callable[[], Iterable[Event]]
logger = logging.getLogger(__name__)


class Queue(Protocol):
    """What a job asks of the runner it waits in."""

    def place(self, job: Job) -> int: ...

    def drop_stopped(self) -> None: ...


class Job:
    """One piece of work and what became of it. Read it from any thread; only the runner changes it.

    `state` is queued, running, done, failed or stopped. `error` is a sentence for the person; for a bug (`is_bug`) the
    full `trace` is beside it.
    """

    def __init__(self, record: JobRecord, work: Work, recorded: bool, queue: Queue) -> None:
        self.record = record
        self.is_bug = False
        self.trace = ""
        self.started: float | None = None
        self.work: Work | None = work  # the worker takes it, so that what it holds is let go with it
        self.recorded = recorded
        self._queue = queue
        self._kept = Kept()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._progress: tuple[Progress, float] | None = None  # the latest and when it came
        self._stage_start: tuple[Progress, float] | None = None

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def title(self) -> str:
        return self.record.title

    @property
    def kind(self) -> str:
        return self.record.kind

    @property
    def meta(self) -> dict[str, Any]:
        return self.record.meta

    @property
    def state(self) -> str:
        return self.record.state

    @property
    def error(self) -> str:
        return self.record.error

    @property
    def over(self) -> bool:
        """Nothing more will happen."""
        return self.state not in ("queued", "running")

    @property
    def stopping(self) -> bool:
        """A stop was asked for and has not come through yet."""
        return self._stop.is_set() and not self.over

    @property
    def stop_asked(self) -> bool:
        return self._stop.is_set()

    @property
    def place(self) -> int:
        """1 for the next in the queue; 0 when running or over."""
        return self._queue.place(self)

    @property
    def events(self) -> list[Event]:
        """All events still kept, in order."""
        return self.since(0)[1]

    @property
    def eta(self) -> float | None:
        """Seconds to the end of the present stage: the work's own word, else by the pace so far; None when unknown."""
        if self.state != "running" or self._progress is None or self._stage_start is None:
            return None
        (latest, at), (first, began) = self._progress, self._stage_start
        if latest.eta is not None:
            return max(0.0, latest.eta - (time.monotonic() - at))
        if latest.step <= first.step:
            return None
        pace = (at - began) / (latest.step - first.step)
        return max(0.0, pace * (latest.total - latest.step) - (time.monotonic() - at))

    def since(self, number: int) -> tuple[int, list[Event]]:
        """The number of the newest event, and the events after `number`. Returns at once."""
        with self._changed:
            return self._kept.count, self._kept.since(number)

    def follow(self, since: int = 0, every: float = 0.2) -> Iterator[tuple[int, list[Event]]]:
        """What `since` gives, again and again, at most every `every` seconds, until the job is over.

        Giving up following changes nothing for the job.
        """
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._has_news, since))
                over = self.over
            newest, events = self.since(since)
            if events:
                yield newest, events
            since = newest
            if over:
                return
            time.sleep(every)

    def _has_news(self, since: int) -> bool:
        return self._kept.count > since or self.over

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False when `timeout` seconds passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.over, timeout)

    def cancel(self) -> None:
        """Ask for a stop: at once while waiting, else between two events; what was done so far stays."""
        self._stop.set()
        self._queue.drop_stopped()

    def take(self, event: Event) -> None:
        now = time.monotonic()
        with self._changed:
            if isinstance(event, Progress):
                if self._stage_start is None or self._stage_start[0].stage != event.stage:
                    self._stage_start = (event, now)
                self._progress = (event, now)
            self._kept.add(event)
            self._changed.notify_all()

    def become(self, **changes: Any) -> None:
        """A new state, on disk first. A disk that can't take it must not stop the worker."""
        record = dataclasses.replace(self.record, **changes)
        try:
            write_record(record)
        except (OSError, StudioError) as error:
            logger.warning("The state of '%s' could not be written: %s", self.id, error)
        with self._changed:
            self.record = record
            self._changed.notify_all()
