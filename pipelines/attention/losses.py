"""What pulls a word's attention onto its subject: Earth Mover's Distance or squared error, and tokens held together.

`emd` (ConceptExpress, Hao et al. 2024, section 3.3) moves attention n to the mask m at the least cost <P, C>, with C
the distance between cells divided by the grid's diagonal. Entropy makes that smooth (Cuturi 2013):

    OT(m, n) = min over P with marginals m, n of <P, C> + e KL(P | m n')  = <f, m> + <g, n>
    f_i = -e LSE_j(ln n_j + (g_j - C_ij) / e),   g_j = -e LSE_i(ln m_i + (f_i - C_ij) / e)      (Sinkhorn, log domain)
    emd = OT(m, n) - OT(m, m) / 2 - OT(n, n) / 2                                               (Feydy et al. 2019)

and its gradient in n is g(m, n) - g(n, n): zero where the maps are equal, and a different one for each mask. The forks
of ConceptExpress return a gradient that doesn't depend on the mask at all; and without the last two terms the least
loss is not at equal maps. `mse` is Break-A-Scene's (Avrahami et al. 2023): the mask against attention / its maximum.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = 0.02  # e: in units of the grid's diagonal
ROUNDS = 40
EMPTY = 1e-8


def emd(attention: Tensor, masks: Tensor, blur: float = BLUR, rounds: int = ROUNDS) -> Tensor:
    """How far `attention` is from `masks`, both (maps, h, w) >= 0 and brought to sum 1 here: (maps,), 0 = equal.

    In grid diagonals. The gradient reaches `attention` alone. A map of zeros counts as uniform.
    """
    height, width = attention.shape[1:]
    share, target = _distribution(attention), _distribution(masks.to(attention).detach())
    with torch.no_grad():
        device = torch.device("cpu") if share.device.type == "mps" else share.device  # which has no fp64
        f, g, own_f, own_g = _potentials(
            target.to(device), share.to(device), _cost(height, width).to(device), blur, rounds
        )
        value = ((f - own_f) * target.to(f)).sum(1) + ((g - own_g) * share.to(g)).sum(1)
        pull = (g - own_g).to(share)
    return value.to(share) + ((share - share.detach()) * pull).sum(1)  # the value, with the dual's gradient


def mse(attention: Tensor, masks: Tensor) -> Tensor:
    """Mean over cells of (mask - attention / its greatest value)^2: (maps, h, w) twice -> (maps,)."""
    peak = attention.flatten(1).amax(1).clamp(min=EMPTY)[:, None, None]
    return ((attention / peak - masks.to(attention)) ** 2).mean((1, 2))


def on_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """(..., h, w) -> (..., *grid), area-averaged: small subjects don't fall between the cells."""
    flat = masks.reshape(-1, 1, *masks.shape[-2:])
    return F.interpolate(flat, grid, mode="area").reshape(*masks.shape[:-2], *grid)


def contrast(rows: Tensor, groups: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020) on `rows` (tokens, width), L2-normalised here: a scalar.

    `groups` (tokens,) tell which belong together; 0 when there is just one.
    """
    if len(groups.unique()) < 2:
        return rows.sum() * 0
    unit = F.normalize(rows, dim=1)
    alone = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    likeness = (unit @ unit.T / temperature).masked_fill(alone, -torch.inf)
    logs = (likeness - likeness.logsumexp(1, keepdim=True)).masked_fill(alone, 0)
    same = (groups[:, None] == groups[None]) & ~alone
    return -((logs * same).sum(1) / same.sum(1).clamp(min=1)).mean()


@lru_cache(maxsize=8)
def _cost(height: int, width: int) -> Tensor:
    """(cells, cells) fp64: distance between cell centres over the grid's diagonal."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1).double()
    return torch.cdist(places, places) / max(1.0, ((height - 1) ** 2 + (width - 1) ** 2) ** 0.5)


def _distribution(maps: Tensor) -> Tensor:
    """(maps, h, w) -> (maps, cells) that sum to 1, nowhere 0."""
    flat = maps.flatten(1)
    flat = flat / flat.sum(1, keepdim=True).clamp(min=EMPTY) + EMPTY
    return flat / flat.sum(1, keepdim=True)


def _potentials(left: Tensor, right: Tensor, cost: Tensor, blur: float, rounds: int) -> tuple[Tensor, ...]:
    """f of `left` and g of `right`, and each one's potential against itself: four of (maps, cells), fp64.

    All move half-way at once, so that equal maps give equal potentials after any number of rounds.
    """
    logs = torch.stack([right.double(), left.double(), left.double(), right.double()]).log()
    found = torch.zeros_like(logs)  # f, g, left's own, right's own
    kernel, last = cost, 0.0
    for e in _blurs(blur, rounds):
        if e != last:
            kernel, last = (-cost / e).exp(), e
        found = (found + _answers(logs, found, kernel, e)) / 2
    return tuple(_answers(logs, found, kernel, last))


def _answers(logs: Tensor, found: Tensor, kernel: Tensor, e: float) -> Tensor:
    """The best potentials, given those of the other sides: -e LSE_j(log weight_j + (potential_j - cost_ij) / e).

    As a product with the symmetric `kernel` exp(-cost / e), which fp64 holds for any blur above 0.005.
    """
    other = logs + found[[1, 0, 2, 3]] / e
    top = other.amax(-1, keepdim=True)
    return -e * (top + ((other - top).exp() @ kernel).log())


def _blurs(blur: float, rounds: int) -> list[float]:
    """From 1 down to `blur` in the first half of the rounds, then constant: large moves first takes fewer rounds."""
    half = max(1, rounds // 2)
    return [max(blur, blur ** (step / half)) for step in range(1, rounds + 1)]
