"""Layers of every kind, alone in a model, and the published formula to hold them against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipelines import spectral
from pipelines.changes import Spectral
from pipelines.model import Model

IDS = torch.arange(12).reshape(2, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "square": (lambda: nn.Linear(24, 24), lambda: torch.randn(2, 9, 24)),
    "wide": (lambda: nn.Linear(48, 16), lambda: torch.randn(2, 9, 48)),
    "tall": (lambda: nn.Linear(16, 48, bias=False), lambda: torch.randn(2, 9, 16)),
    "flat input": (lambda: nn.Linear(16, 48), lambda: torch.randn(3, 16)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), lambda: torch.randn(2, 8, 7, 5)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), lambda: torch.randn(2, 8, 8, 6)),
    "tall conv": (lambda: nn.Conv2d(2, 32, 3, padding=1), lambda: torch.randn(2, 2, 7, 5)),
    "1x1": (lambda: nn.Conv2d(8, 24, 1), lambda: torch.randn(2, 8, 7, 5)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), lambda: torch.randn(2, 8, 7, 5)),
    "circular": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), lambda: torch.randn(2, 8, 7, 5)),
    "1d conv": (lambda: nn.Conv1d(8, 12, 3), lambda: torch.randn(2, 8, 9)),
    "tokens": (lambda: nn.Embedding(30, 8), lambda: IDS),
    "places": (lambda: nn.Embedding(12, 20), lambda: IDS),
    "group norm": (lambda: nn.GroupNorm(4, 8), lambda: torch.randn(2, 8, 7, 5)),
    "layer norm": (lambda: nn.LayerNorm(8), lambda: torch.randn(2, 9, 8)),
}


def bench(module: nn.Module) -> Model:
    """A model whose UNet is just one layer."""
    holder = nn.Module()
    holder.layer = module.requires_grad_(False)
    return Model("bench", "sd1", "", (), (), holder, None, {})


def shifts(module: nn.Module, size: float = 0.3, seed: int = 0) -> Spectral:
    weight = module._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(seed)
    return Spectral(nn.Parameter(size * torch.randn(spectral.rank(weight), generator=generator).to(weight.dtype)))


def naive(weight: Tensor, *parts: tuple[float, Tensor]) -> Tensor:
    """U diag(ReLU(S + sum of s d)) V^T as in the paper, in float64."""
    u, s, vh = torch.linalg.svd(spectral.as_matrix(weight).double(), full_matrices=False)
    moved = s + sum(strength * shift.double() for strength, shift in parts)
    return ((u * moved.relu()) @ vh).reshape(weight.shape).to(weight.dtype)


def with_weight(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.functional_call(module, {"weight": weight}, (x,))
