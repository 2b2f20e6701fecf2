"""Draws events on a terminal, and stops between two of them when asked to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from pipelines.events import Event, Finished, Note, Progress, Snapshot

QUIET = 10.0  # seconds between two lines of progress where nothing can be drawn over (a log, a pipe)
BAR = 24


class Stopped(Exception):
    """The person asked to stop; the work was closed in order. The message says what is kept and how to go on."""


@dataclass
class Terminal:
    """Where a command speaks: results on `out`, everything said meanwhile on `err`."""

    as_json: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    quiet: bool = field(default_factory=lambda: os.environ.get("RANK", "0") != "0")  # one of several processes speaks
    last: Progress | None = None
    kept: list[str] = field(default_factory=list)  # files the work has finished
    _started: dict[str, tuple[float, int]] = field(default_factory=dict)  # stage -> when and at which step first seen
    _spoken: float = 0.0
    _drawn: bool = False

    def result(self, data: Any, *lines: str) -> None:
        """The outcome: `data` under --json, else the lines."""
        text = json.dumps(data, ensure_ascii=False) if self.as_json else "\n".join(lines)
        if text and not self.quiet:
            self.out.write(text + "\n")
            self.out.flush()

    def say(self, text: str) -> None:
        """One line on the error stream, below whatever was drawn there."""
        if not self.quiet:
            self._line(text)

    def fail(self, message: str, prefix: str = "") -> None:
        """How it ended when it did not end well."""
        if self.as_json:
            self.out.write(json.dumps({"error": message}, ensure_ascii=False) + "\n")
        else:
            self._line(prefix + message)

    def _line(self, text: str) -> None:
        self.err.write(("\n" if self._drawn else "") + text + "\n")
        self.err.flush()
        self._drawn = False

    def watch(self, events: Iterator[Event]) -> Any:
        """Run the work, drawing it; the value it finished with. Raises Stopped after Ctrl-C or SIGTERM closed it."""
        finished: Finished | None = None
        with closing(_generator(events)) as work, _stop_asked(self) as stop:
            for event in work:  # to the very end: work may tidy up after it has said Finished
                self.show(event)
                finished = event if isinstance(event, Finished) else finished
                if stop.is_set() and finished is None:
                    raise Stopped("Stopped.")
        return finished.value if finished else None

    def show(self, event: Event) -> None:
        """Draw one event; pictures and heat maps are for the app."""
        if self.quiet:
            return
        if isinstance(event, Progress):
            self.last = event
            self._progress(event)
        elif isinstance(event, Note):
            self.say(event.text)
        elif isinstance(event, Snapshot) and event.path:
            if event.kind != "regions":  # shown before a picture is painted, but no picture
                self.kept.append(event.path)
            self.say(f"{event.kind}: {event.path}")

    def _progress(self, event: Progress) -> None:
        done = event.step >= event.total
        if self.err.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.err.write("\r" + self._bar(event)[:width].ljust(width) + ("\n" if done else ""))
            self._drawn = not done
        elif done or time.monotonic() - self._spoken >= QUIET:
            self.err.write(self._bar(event) + "\n")
            self._spoken = time.monotonic()
        self.err.flush()

    def _bar(self, event: Progress) -> str:
        filled = BAR * event.step // max(event.total, 1)
        values = "".join(f"  {name} {value:.4g}" for name, value in event.values.items())
        left = self._left(event)
        eta = "" if left is None or event.step >= event.total else f"  {duration(left)} left"
        return f"{event.stage} {'█' * filled}{'░' * (BAR - filled)} {event.step}/{event.total}{eta}{values}"

    def _left(self, event: Progress) -> float | None:
        """Seconds to the end of the stage: the work's own estimate, else from its pace so far."""
        started, first = self._started.setdefault(event.stage, (time.monotonic(), event.step))
        if event.eta is not None:
            return event.eta
        if event.step <= first:
            return None
        return (time.monotonic() - started) / (event.step - first) * (event.total - event.step)


def duration(seconds: float) -> str:
    """`42 s`, `3:05 min` or `2:10 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _generator(events: Iterator[Event]) -> Generator[Event, None, None]:
    return events if isinstance(events, Generator) else (event for event in events)


@contextmanager
def _stop_asked(terminal: Terminal) -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event, so that the work ends between two steps; the next ends it at once."""
    stop = threading.Event()

    def ask(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        terminal.say("Stopping after this step and keeping what is done; press Ctrl-C again to stop at once.")

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
