"""One small training loop for every Toybox model: warm-up, cosine decay, averaged weights, checkpoints that resume."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.events import Progress

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What to do with a model. `average` is the decay of the running mean of the weights (0 = none)."""

    name: str
    steps: int
    lr: float
    batch: int
    warmup: int = 100
    weight_decay: float = 1e-2
    average: float = 0.999
    half: bool = True  # bf16 autocast
    save_seconds: float = 120.0
    cooldown: float = 1.0  # share of the steps over which the learning rate falls to nothing


def rate(plan: Plan, step: int) -> float:
    """Learning rate at `step`: warm-up, flat, then a half cosine."""
    start = plan.steps * (1 - plan.cooldown)
    fall = min(1.0, max(0.0, (step - start) / max(1.0, plan.steps - start)))
    return plan.lr * min(1.0, (step + 1) / plan.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))


class Fit:
    """Trains `model` by `losses(rng, batch size)`; its state is one file under `folder`, written every few minutes."""

    def __init__(self, model: nn.Module, plan: Plan, folder: Path) -> None:
        self.model, self.plan, self.path = model, plan, folder / f"{plan.name}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=plan.lr, betas=(0.9, 0.98), weight_decay=plan.weight_decay, foreach=True
        )
        self.step = 0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = load_file(self.path)
        self.step = int(state["step"])
        for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
            p.data.copy_(state[f"p.{name}"])
            self.mean[i].copy_(state[f"mean.{name}"])
            moments = {key: state[f"{key}.{name}"].clone() for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}

    def save(self) -> None:
        """One file, published by rename."""
        state: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for name, p, mean in zip(self.names, self.params, self.mean, strict=True):
            moments = self.optimizer.state.get(p) or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state |= {f"p.{name}": p.detach(), f"mean.{name}": mean}
            state |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        save_file({key: value.contiguous() for key, value in state.items()}, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def use_mean(self) -> None:
        """Puts the averaged weights into the model."""
        for p, mean in zip(self.params, self.mean, strict=True):
            p.data.copy_(mean)

    def run(self, losses: Callable[[np.random.Generator, int], Losses]) -> Iterator[Progress]:
        """Steps until the plan is done; the batch of a step depends on its number alone."""
        plan, saved, began, first = self.plan, time.monotonic(), time.monotonic(), self.step
        while self.step < plan.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = rate(plan, self.step)
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.half):
                parts = losses(np.random.default_rng([self.step, plan.steps]), plan.batch)
            torch.stack([part.float() for part in parts.values()]).sum().backward()
            nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            keep = min(plan.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.params], 1 - keep)
            if time.monotonic() - saved > plan.save_seconds or self.step == plan.steps:
                self.save()
                saved = time.monotonic()
            pace = (time.monotonic() - began) / (self.step - first)
            values = {name: float(part.detach()) for name, part in parts.items()}
            yield Progress(plan.name, self.step, plan.steps, values, pace * (plan.steps - self.step))
