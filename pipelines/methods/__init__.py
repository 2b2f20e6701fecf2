"""The methods: one file in this folder each, found by looking. No base class, only these Protocols."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.concept import Subject
from pipelines.errors import StudioError

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.batch import Batch
    from pipelines.model import Model
    from pipelines.params import TrainParams


@dataclass(frozen=True)
class Stage:
    """One phase of training with its own optimizer."""

    name: str
    steps: int
    batch_size: int = 1
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0


class Adapter(Protocol):
    """A method's change to a model; the same object trains and generates."""

    strength: float  # 0 == the base model, bit for bit

    def param_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """Optimizer groups: {"params": [...], "lr": ...}. Asked for again and again: the same parameters each time."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: detached CPU copies, fp32."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; StudioError when names or shapes don't fit this model."""
        ...

    def bake(self) -> None:
        """Fix the change for inference (fold weight deltas in once); undone when the context closes."""
        ...


class Method(Protocol):
    """A way to learn subjects. A module of this folder is one when it has these names."""

    name: str  # == the file's name == the preset folder's name
    title: str
    paper: str
    Params: type[TrainParams]

    def stages(self, params: Any) -> Sequence[Stage]: ...

    def attach(self, model: Model, params: Any, subjects: Sequence[Subject]) -> AbstractContextManager[Adapter]: ...

    def loss(self, model: Model, adapter: Adapter, batch: Batch, stage: Stage) -> dict[str, Tensor]: ...


def method_names() -> list[str]:
    """Every method file in this folder, by name, without importing any."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def get_method(name: str) -> Method:
    """The method of that name; StudioError with the known ones otherwise."""
    if name not in method_names():
        raise StudioError(f"There is no method '{name}'. Choose one of: {', '.join(method_names())}.")
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module
