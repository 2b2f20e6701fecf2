"""A training step of SVDiff ÷ one of peft's LoRA (rank 4) on the same layers of the same UNet, with the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.bench import Figures, compare
from pipelines.methods import svdiff

if TYPE_CHECKING:
    from pipelines.model import Model

RANK = 4


def measure(model: Model, batch: int = 4, runs: int = 8) -> Figures:
    """Forward, backward and AdamW at the base's own size. LoRA has no form for norms, so there SVDiff does more."""
    from peft import LoraConfig, inject_adapter_in_model

    lora, ours = (replace(model, unet=copy.deepcopy(model.unet), placeholders={}) for _ in range(2))
    places = [name for name, module in model.unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=places), lora.unet)
    with svdiff.attach(ours, svdiff.Params(train_text_encoder=False), []) as adapter:
        step = training_step(ours, adapter.shifts().values(), batch)
        other = training_step(lora, (p for p in lora.unet.parameters() if p.requires_grad), batch)
        return compare(step, other, runs, device=model.device)


def training_step(model: Model, trained: Iterable[nn.Parameter], batch: int) -> Callable[[], None]:
    """One optimizer step on noise: time doesn't depend on what is learnt."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    chance = torch.Generator().manual_seed(0)
    rows, columns = model.latent_size(model.native_size, model.native_size)
    noise = torch.randn(batch, model.unet.config.in_channels, rows, columns, generator=chance)
    noise = noise.to(model.device, model.dtype)
    with torch.no_grad():
        text = model.encode(["a photo of a cat"] * batch)
    size = (model.native_size, model.native_size)
    inputs: dict[str, Any] = model.conditioning(text, [size], [(0, 0)], [size])
    times = torch.linspace(50, 950, batch, device=model.device).long()

    def step() -> None:
        optimizer.zero_grad()
        guess = model.unet(noise, times, text.states.to(model.dtype), **inputs).sample
        (guess.float() - noise.float()).pow(2).mean().backward()
        optimizer.step()

    return step
