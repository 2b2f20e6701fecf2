"""Chance without a global state: every draw belongs to (seed, step, sample) and is the same wherever it is made.

Draws happen on the CPU in fp32, so device, precision, the number of processes, a resume or pictures generated in
between cannot shift them.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipelines.model import Model

_schedules: WeakKeyDictionary[Model, Tensor] = WeakKeyDictionary()


def generator(*key: int | str) -> torch.Generator:
    """A private CPU generator for one purpose, as ("sample", seed, stage, step, index). Equal keys, equal draws."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def turn(count: int, position: int, *key: int | str) -> int:
    """Which of `count` things comes at `position` when they are shuffled anew for every round."""
    order = torch.randperm(count, generator=generator("order", *key, position // count))
    return int(order[position % count])


def alphas(model: Model) -> Tensor:
    """The base's alphas_cumprod, (train timesteps,) fp32 on its device."""
    known = _schedules.get(model)
    if known is None or known.device != model.device:
        from pipelines.model import noise_scheduler

        known = _schedules[model] = noise_scheduler(model).alphas_cumprod
    return known


def diffused(model: Model, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and what the base should predict from them, both (rows, c, h, w) fp32.

    x_t = sqrt(a) x + sqrt(1 - a) e (Ho et al. 2020, eq. 4); the target is e, or v = sqrt(a) e - sqrt(1 - a) x for bases
    with v-prediction (Salimans and Ho 2022, section 4).
    """
    a = alphas(model)[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    if model.prediction_type == "v_prediction":
        return noisy, a.sqrt() * noise - (1 - a).sqrt() * latents
    return noisy, noise
