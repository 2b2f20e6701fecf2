"""The benches: one file in this folder each, found by looking. A module is one when it has `measure(model)`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.bench import Figures
    from pipelines.model import Model


class Bench(Protocol):
    """A comparison of two ways to get something done; the file's name is the bench's."""

    def measure(self, model: Model) -> Figures:
        """Time both with `pipelines.bench.compare`, on one thread; the model is left as it was."""
        ...


def bench_names() -> list[str]:
    """Every bench file in this folder, by name, without importing any."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def get_bench(name: str) -> Bench:
    """The bench of that name; StudioError with the known ones otherwise."""
    if name not in bench_names():
        raise StudioError(f"There is no bench '{name}'. Choose from: {', '.join(bench_names())}.")
    module: Any = importlib.import_module(f"{__name__}.{name}")
    found: Bench = module
    return found
