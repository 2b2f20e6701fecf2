"""A noun's attention spread over the thing it means: iterative refinement by self-attention, without training.

Method: iSeg (Sun et al. 2024, arXiv 2409.03209). A is one layer's self-attention (cells, cells) with queries in rows, X
has a column for each noun (cells, nouns), l is the entropy weight:

    A[:, k] <- A[:, k] / max_q A[q, k]                         each key counts alike
    A <- max(0, A + l (1 + ln A)), 0 where A is 0              one step down the entropy: weak links go
    P = A with rows that sum to 1
    X <- (X - min X) / sum(X - min X);   N times: X <- P X, normalised again

`entropy` is the released code's number e; it takes log10 where the paper has ln, so l = e / ln 10. Entries below a
point A*(e) become exactly 0 (0.0713 at e = 0.1). Departures, all where the code divides 0 by 0: a column without any
difference becomes uniform, a key that nobody looks at stays 0, and a cell that is left without links keeps itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-12
FLAT = 1e-5  # differences below this share of the greatest value are rounding, not attention


def normalised(columns: Tensor) -> Tensor:
    """(cells, nouns) -> each column from 0 up and with sum 1; a constant column becomes uniform."""
    low, high = columns.amin(0, keepdim=True), columns.amax(0, keepdim=True)
    raised = columns - low
    total = raised.sum(dim=0, keepdim=True)
    return torch.where(_differs(low, high), raised / total.clamp(min=SMALLEST), 1 / len(columns))


def transition(attention: Tensor, entropy: float) -> Tensor:
    """Ent-Self: self-attention (cells, cells) >= 0 as a sharpened matrix P whose rows sum to 1.

    `entropy` is e above; 0 leaves only the division by each key's greatest value.
    """
    peak = attention.max(dim=0, keepdim=True).values
    links = torch.where(peak > SMALLEST, attention / peak.clamp(min=SMALLEST), 0)
    logs = torch.log(links.clamp(min=torch.finfo(links.dtype).tiny))
    links = torch.where(links > 0, links + entropy * (1 + logs) / math.log(10), 0).clamp(min=0)
    total = links.sum(dim=1, keepdim=True)
    alone = torch.eye(len(links), dtype=links.dtype, device=links.device)
    return torch.where(total > SMALLEST, links / total.clamp(min=SMALLEST), alone)


def refined(columns: Tensor, links: Tensor, steps: int) -> Tensor:
    """`columns` (cells, nouns) after `steps` rounds along `links` (cells, cells); normalised also when `steps` is 0."""
    columns = normalised(columns)
    for _ in range(steps):
        columns = normalised(links @ columns)
    return columns


def boosted(states: Tensor, positions: Sequence[int], weight: float) -> Tensor:
    """Cat-Cross: text states (rows, tokens, width), after the final norm, times `weight` at the nouns' tokens."""
    factor = states.new_ones(states.shape[1], 1)
    factor[list(positions)] = weight
    return states * factor


def smoothed(columns: Tensor, grid: tuple[int, int], side: int, rounds: int = 20) -> Tensor:
    """Cluster smoothing (in the released code alone): each cell takes the mean of the cells that read alike.

    k-means over the cells' token vectors (cells, tokens) >= 0 with the symmetric KL divergence, begun at side x side
    cells spread evenly over `grid` (height, width). A cluster that loses its last cell stays as it was.
    """
    height, width = grid
    rows = torch.linspace(0, height - 1, min(side, height)).round().long()
    across = torch.linspace(0, width - 1, min(side, width)).round().long()
    centres = columns[(rows[:, None] * width + across[None]).flatten().to(columns.device)]
    for _ in range(rounds):
        nearest = symmetric_kl(columns, centres).argmin(dim=1)
        member = torch.nn.functional.one_hot(nearest, len(centres)).to(columns)
        count = member.sum(0)[:, None]
        moved = torch.where(count > 0, member.T @ columns / count.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres[symmetric_kl(columns, centres).argmin(dim=1)]


def symmetric_kl(left: Tensor, right: Tensor, floor: float = 1e-5) -> Tensor:
    """(a, n) and (b, n) >= 0 -> (a, b): 1/2 sum (p - q)(ln p - ln q) of every pair, `floor` added to all values."""
    left, right = left + floor, right + floor
    log_left, log_right = left.log(), right.log()
    own = (left * log_left).sum(1)[:, None] + (right * log_right).sum(1)[None]
    return ((own - left @ log_right.T - log_left @ right.T) / 2).clamp(min=0)


def scaled(columns: Tensor) -> Tensor:
    """(..., cells) -> each row from 0 to 1; all 0 where there is no difference."""
    low, high = columns.amin(-1, keepdim=True), columns.amax(-1, keepdim=True)
    return torch.where(_differs(low, high), (columns - low) / (high - low).clamp(min=SMALLEST), 0)


def shares(scores: Tensor, threshold: float = 0.0) -> Tensor:
    """Competition: scores (nouns, ...) in [0, 1] -> (nouns + 1, ...), the background last; they sum to 1 everywhere.

    The background scores `threshold`, or (1 - max)^2 when that is 0 (iSeg's rule; one noun then wins above 0.382). The
    greatest share is the greatest score, so that the argmax of these is the hard mask.
    """
    best = scores.amax(0, keepdim=True)
    background = torch.full_like(best, threshold) if threshold else (1 - best) ** 2
    both = torch.cat([scores, background])
    return both / both.sum(0, keepdim=True).clamp(min=SMALLEST)


def _differs(low: Tensor, high: Tensor) -> Tensor:
    return high - low > torch.maximum(FLAT * high.abs(), high.new_tensor(SMALLEST))
