"""Where a training run is, and how it goes onto the disk and on from there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.errors import StudioError
from pipelines.events import Event, Note, Snapshot
from pipelines.processes import Share

if TYPE_CHECKING:
    from pipelines.methods import Adapter, Method, Stage
    from pipelines.model import Model


@dataclass
class Run:
    """One training run: what takes part in it, and how far it is. Without `checkpoints` nothing is written."""

    model: Model
    method: Method
    adapter: Adapter
    stages: Sequence[Stage]
    share: Share
    checkpoints: Checkpoints | None
    stage: int = 0  # index of the stage under way
    step: int = 0  # steps done in it
    optimizer: Optimizer = field(init=False)  # of the stage under way
    _resumed: dict[str, Tensor] = field(default_factory=dict)  # optimizer state to take over
    _begun: tuple[float, int] = (0.0, 0)  # when the clock was started, and the steps done by then

    @property
    def done(self) -> int:
        """Steps done in all stages together."""
        return sum(stage.steps for stage in self.stages[: self.stage]) + self.step

    @property
    def eta(self) -> float | None:
        """Seconds left at the pace so far."""
        started, before = self._begun
        left = sum(stage.steps for stage in self.stages) - self.done
        return (time.monotonic() - started) / (self.done - before) * left if self.done > before else None

    def restored(self, resume: bool) -> Iterator[Event]:
        """Take up the newest checkpoint, and make sure there is room for new ones."""
        notes: list[str] = []
        point = self.checkpoints.latest(notes) if self.checkpoints and resume else None
        trainable = self._trainable()
        if point:
            self.stage, self.step, self._resumed = point.stage, point.step, point.part("optimizer")
            values = point.part("trainable")
            with torch.no_grad():
                for name, parameter in trainable.items():
                    parameter.copy_(values[name])
        if self.checkpoints and self.share.main:  # AdamW keeps two more numbers for each trained one
            self.checkpoints.need(3 * sum(p.numel() * p.element_size() for p in trainable.values()))
        self._begun = time.monotonic(), self.done
        yield from map(Note, notes)
        if resume:
            yield Note(f"Going on after step {self.done}." if point else "No checkpoint yet: starting at step 1.")

    def stages_left(self) -> Iterator[Stage]:
        """The stages from the present one on, each with its own optimizer; only a resumed one starts midway."""
        for number in range(self.stage, len(self.stages)):
            self.step = self.step if number == self.stage else 0
            self.stage = number
            self.optimizer = self._optimizer(self.stages[number])
            yield self.stages[number]

    def saved(self) -> Iterator[Event]:
        """Write a checkpoint. A full disk is told, and training goes on with the one before."""
        if self.checkpoints is None or not self.share.main:
            return
        try:
            path = self._save(self.checkpoints)
        except (StudioError, OSError) as error:
            yield Note(f"No checkpoint at step {self.done}, training goes on. {error}")
            return
        yield Snapshot("checkpoint", path=str(path), info={"step": self.done})

    @contextmanager
    def saved_on_close(self) -> Iterator[None]:
        """Save when the generator around this block is closed, which only happens between two steps."""
        try:
            yield
        except GeneratorExit:
            if self.checkpoints is not None and self.share.main:
                self._save(self.checkpoints)
            raise

    def _optimizer(self, stage: Stage) -> Optimizer:
        """AdamW over the adapter's groups (Loshchilov and Hutter 2019), with its moments when resumed."""
        optimizer = AdamW(self.adapter.param_groups(stage), weight_decay=stage.weight_decay)
        if self._resumed:
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in self._resumed.items():
                number, _, key = name.partition("/")
                state.setdefault(int(number), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            self._resumed = {}
        return optimizer

    def _save(self, checkpoints: Checkpoints) -> Path:
        tensors = {f"trainable/{name}": value.detach().cpu() for name, value in self._trainable().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": value for key, value in state.items()}
        tensors |= {f"adapter/{name}": value for name, value in self.adapter.tensors().items()}
        return checkpoints.save(Checkpoint(self.stage, self.step, self.done, tensors))

    def _trainable(self) -> dict[str, Tensor]:
        """Every parameter that any stage trains, numbered in the order of the stages' groups."""
        groups = [group for stage in self.stages for group in self.adapter.param_groups(stage)]
        found = {id(parameter): parameter for group in groups for parameter in group["params"]}
        return {str(number): parameter for number, parameter in enumerate(found.values())}
