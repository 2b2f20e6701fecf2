"""Helper processes of a study: each takes what no other has and leaves the records for the main process.

Training on a processor gains little from more threads, and much from a training beside it: two processes of one thread
do 1.4 times as much as one of two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.events import Event, Note, Progress

if TYPE_CHECKING:
    from pipelines.evaluate.study import Study, Unit

ROOT = Path(__file__).parents[2]
MOST = 8  # processes: each holds the models
LOOK = 1.0  # seconds between two looks at how far they are


def usual_helpers(device: str) -> int:
    """Processes to measure with: one for each core, and one alone where there is an accelerator."""
    return min(MOST, os.cpu_count() or 1) if device == "cpu" else 1


def portions(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    """What one helper does at a time: a claim's seed with all its arms, since these share what was learned."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(f"{unit.claim}-{unit.seed}", []).append(unit)
    return found


def taken(units: Sequence[Unit], place: Path) -> Iterator[Unit]:
    """The units of one portion after another that no other helper has taken; `place` is the folder where they agree."""
    for name, portion in portions(units).items():
        try:
            (place / name).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from portion


def helped(wish: Study, name: str, stage: str, units: Sequence[Unit], command: Sequence[str]) -> Iterator[Event]:
    """Have what isn't recorded yet measured by helpers; what they leave undone the caller does itself.

    `command` starts one, and is followed by its part. They end with this process, and with the part's time.
    """
    todo = [unit for unit in units if not unit.record.exists()]
    count = min(wish.helpers, len(portions(todo)))
    if count < 2 or wish.over:
        return
    threads = str(max(1, (os.cpu_count() or 1) // count))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    around = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as place:
        started = [
            subprocess.Popen(
                [*command, "--helper", f"{stage}:{os.getpid()}:{place}"],
                env=around, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for _ in range(count)
        ]  # fmt: skip
        began, before = time.monotonic(), len(units) - len(todo)
        try:
            yield from _watched(started, name, stage, units, before, began)
        finally:
            for one in started:
                with suppress(OSError):
                    one.terminate()
            for one in started:
                one.wait()
    if any(one.returncode for one in started):
        yield Note("A helper process ended early; what it left is measured here.")


def _watched(
    started: Sequence[subprocess.Popen[bytes]], what: str, stage: str, units: Sequence[Unit], before: int, began: float
) -> Iterator[Event]:
    name = f"{what}: search" if stage == "search" else what
    while any(one.poll() is None for one in started):
        done = sum(unit.record.exists() for unit in units)
        pace = (time.monotonic() - began) / (done - before) if done > before else None
        eta = None if pace is None else pace * (len(units) - done)
        yield Progress(name, done, len(units), eta=eta)  # also when nothing is new: here a run can be stopped
        time.sleep(LOOK)


def command_of(folder: Path, wish: Study, claims: Sequence[str], quick: bool) -> list[str]:
    """The command line of a helper, without its part."""
    words = [sys.executable, "-m", "pipelines", "claims", "--out", str(folder.absolute())]
    words += [word for name in claims for word in ("--only", name)]
    words += ["--seeds", f"{wish.seeds.start}-{wish.seeds.stop - 1}"] if wish.seeds is not None else []
    return [*words, "--minutes", f"{wish.left:.3f}", *(["--quick"] if quick else [])]
