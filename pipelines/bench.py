"""How much our ways cost against references, each pair measured alternately in one process on one thread."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypedDict

import torch

from pipelines.benches import bench_names, get_bench
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Progress

if TYPE_CHECKING:
    from pipelines.model import Model


class Figures(TypedDict):
    """What a bench found: the best of `runs` runs each, in seconds, and ours ÷ reference."""

    ratio: float
    ours: float
    reference: float
    runs: int


def bench(names: Sequence[str] | None = None, model: Model | None = None) -> Iterator[Event]:
    """Run the benches of those names (all), on `model` (the Toybox).

    Yields Progress and a Note for each, and Finished with {name: Figures}. Raises StudioError for an unknown name,
    before anything is measured.
    """
    benches = {name: get_bench(name) for name in (bench_names() if names is None else names)}
    if model is None:
        from pipelines.model import load_model

        model = load_model("toybox")
    found: dict[str, Figures] = {}
    for number, (name, one) in enumerate(benches.items(), start=1):
        with _one_thread():
            figures = found[name] = one.measure(model)
        yield Note(f"{name}: {figures['ratio']:.3f} times the reference")
        yield Progress("bench", number, len(benches), {"ratio": figures["ratio"]})
    yield Finished(found)


def compare(
    ours: Callable[[], object],
    reference: Callable[[], object],
    runs: int = 8,
    *,
    device: torch.device | None = None,
    clock: Callable[[], float] | None = None,
) -> Figures:
    """Run both in turn, `runs` times each after one run to warm up, and take the best of each.

    Time is the process's own CPU time, which other work on the machine hardly touches; on an accelerator, which runs
    beside the process, it is wall time with the device drained. Give `clock` for work that waits (disk, network).
    """
    if runs < 1:
        raise StudioError(f"{runs} runs measure nothing. Ask for at least 1.")
    waits = device is not None and device.type != "cpu"
    clock = clock or (time.perf_counter if waits else time.process_time)

    def timed(work: Callable[[], object]) -> float:
        _drain(device)
        start = clock()
        work()
        _drain(device)
        return clock() - start

    best = other = float("inf")
    with _no_collection():
        ours(), reference()
        for number in range(runs):
            if number % 2:  # whoever comes second finds the caches of the first: take turns at it
                other = min(other, timed(reference))
                best = min(best, timed(ours))
            else:
                best = min(best, timed(ours))
                other = min(other, timed(reference))
    return Figures(ratio=best / max(other, 1e-9), ours=best, reference=other, runs=runs)


def _drain(device: torch.device | None) -> None:
    if device is not None and device.type in ("cuda", "mps", "xpu"):
        torch.get_device_module(device).synchronize()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: figures don't depend on how many cores happen to be free."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a run."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
