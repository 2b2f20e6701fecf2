"""Helper processes of a study: each measures the cases of some seeds and leaves their records for the main process.

Training on a processor gains little from more threads, and much from a training beside it: two processes of one thread
do 1.4 times as much as one of two.
"""

from __future__ import annotations

import os
import subprocess
import sys
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


def share_of(units: Sequence[Unit], share: tuple[int, int]) -> list[Unit]:
    """Those of helper `share[0]` of `share[1]`: all of a seed together, since its arms share what was learned."""
    seeds = sorted({unit.seed for unit in units})
    mine = set(seeds[share[0] :: share[1]])
    return [unit for unit in units if unit.seed in mine]


def helped(wish: Study, claim: str, stage: str, units: Sequence[Unit], command: Sequence[str]) -> Iterator[Event]:
    """Have what isn't recorded yet measured by helpers; what they leave undone the caller does itself.

    `command` starts one, and is followed by its share. They end with this process, and with the part's time.
    """
    todo = [unit for unit in units if not unit.record.exists()]
    count = min(wish.helpers, len({unit.seed for unit in todo}))
    if count < 2 or wish.over:
        return
    threads = str(max(1, (os.cpu_count() or 1) // count))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    around = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    started = [
        subprocess.Popen(
            [*command, "--helper", f"{stage}:{number}/{count}:{os.getpid()}"],
            env=around, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for number in range(count)
    ]  # fmt: skip
    began, before = time.monotonic(), len(units) - len(todo)
    try:
        yield from _watched(started, claim, stage, units, before, began)
    finally:
        for one in started:
            with suppress(OSError):
                one.terminate()
        for one in started:
            one.wait()
    if any(one.returncode for one in started):
        yield Note("A helper process ended early; what it left is measured here.")


def _watched(
    started: Sequence[subprocess.Popen[bytes]], claim: str, stage: str, units: Sequence[Unit], before: int, began: float
) -> Iterator[Event]:
    said = -1
    while any(one.poll() is None for one in started):
        done = sum(unit.record.exists() for unit in units)
        if done != said:
            said = done
            pace = (time.monotonic() - began) / (done - before) if done > before else None
            name = f"{claim}: search" if stage == "search" else claim
            yield Progress(name, done, len(units), eta=None if pace is None else pace * (len(units) - done))
        time.sleep(LOOK)


def command_of(folder: Path, claim: str, seeds: range, quick: bool, minutes: float) -> list[str]:
    """The command line of a helper, without its share."""
    words = [sys.executable, "-m", "pipelines", "claims", "--only", claim, "--out", str(folder.absolute())]
    words += ["--seeds", f"{seeds.start}-{seeds.stop - 1}", "--minutes", f"{minutes:.3f}"]
    return [*words, *(["--quick"] if quick else [])]
