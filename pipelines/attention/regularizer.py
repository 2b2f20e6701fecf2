"""A learned token's cross-attention held to that of its category's word (AttnDreamBooth).

Paper: Pang et al., "AttnDreamBooth", NeurIPS 2024, arXiv:2406.05000, eq. 2. With m and v the mean and the unbiased
variance of a token's probabilities over all heads and positions of a layer, for a picture b, the new tokens k of n,
and the category's first token c:

    as released   R = 1/L Σ_l Σ_b 1/n Σ_k  a (m_lbk - m_lbc)^2 + z (v_lbk - v_lbc)^2
    as printed    the same with m and v over the values of all L layers together, one of each for a picture

The released sum over the batch grows with it, and differs between one batch of 8 and 8 accumulated batches of 1.
`reduction="mean"` is the mean over the pictures times 8, the published batch: equal to the released sum there, and the
same however the 8 are divided. Gradients flow through both tokens' maps, as released.

Only the columns of these tokens are kept, and only as their mean and variance: (rows, tokens) numbers a layer instead
of (rows, heads, positions, 77).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelines.attention.protocol import Columns, Site, Step
from pipelines.errors import StudioError
from pipelines.text import Tokenized, covered

Form = Literal["released", "printed"]
Reduction = Literal["mean", "sum"]
PUBLISHED_BATCH = 8


@dataclass(frozen=True)
class Moments:
    """A layer's statistics: of `count` values each, (rows, tokens) fp32."""

    mean: Tensor
    variance: Tensor  # unbiased
    count: int


def moments(columns: Tensor) -> Moments:
    """Those of (rows, heads, positions, tokens), over heads and positions; never below fp32, where the differences of
    variances (1e-6 and less) would vanish."""
    wide = columns.to(torch.promote_types(columns.dtype, torch.float32)).flatten(1, 2)  # (rows, values, tokens)
    return Moments(wide.mean(1), wide.var(1, unbiased=True), wide.shape[1])


class TokenMoments:
    """A probe for training: the moments of chosen tokens in every cross-attention layer, each layer once a forward.

    `positions` has a list for each row that is looked at, all of one length: the new tokens, then the category's.
    """

    def __init__(self, positions: Sequence[Sequence[int]]) -> None:
        self.columns = Columns(positions)
        self.seen: dict[str, Moments] = {}

    def wants(self, site: Site) -> Columns | None:
        return self.columns if site.kind == "cross" else None

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        return logits

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        found = moments(columns)  # gradient checkpointing runs a layer again, and must see the same work done
        self.seen.setdefault(site.name, found)


def map_loss(
    layers: Sequence[Moments],
    mean_weight: float,
    variance_weight: float,
    form: Form = "released",
    reduction: Reduction = "mean",
) -> Tensor:
    """R, a scalar, from the moments of every layer; the last token of each is the category's."""
    if not layers:
        raise StudioError("This base has no cross-attention to hold on to. Set the regulariser's weights to 0.")
    layers = [pooled(layers)] if form == "printed" else layers
    each = torch.stack([_difference(layer, mean_weight, variance_weight) for layer in layers]).mean(0)  # (rows,)
    return each.sum() if reduction == "sum" else PUBLISHED_BATCH * each.mean()


def pooled(layers: Sequence[Moments]) -> Moments:
    """The moments of the values of all layers together, from those of each (Chan et al. 1979)."""
    count = sum(layer.count for layer in layers)
    mean = torch.stack([layer.mean * (layer.count / count) for layer in layers]).sum(0)
    squares = torch.stack(
        [layer.variance * (layer.count - 1) + layer.count * (layer.mean - mean) ** 2 for layer in layers]
    )
    return Moments(mean, squares.sum(0) / (count - 1), count)


def _difference(layer: Moments, mean_weight: float, variance_weight: float) -> Tensor:
    """a (m_k - m_c)^2 + z (v_k - v_c)^2, averaged over the new tokens k: (rows,)."""
    means = (layer.mean[:, :-1] - layer.mean[:, -1:]) ** 2
    variances = (layer.variance[:, :-1] - layer.variance[:, -1:]) ** 2
    return (mean_weight * means + variance_weight * variances).mean(1)


def token_positions(prompt: Tokenized, token: str) -> list[int]:
    """Where `<name>` stands when it is first said: its new tokens, then the first token of its noun.

    StudioError when the prompt doesn't say it, or when it was cut off with the end of a long prompt.
    """
    span = next((span for span in prompt.spans if span.token == token), None)
    if span is None:
        raise StudioError(f"'{prompt.text[:80]}' does not name {token}. Write it into the prompt.")
    new, noun = covered(prompt, span.start, span.noun[0]), covered(prompt, *span.noun)
    if not new or not noun:
        raise StudioError(
            f"{token} was cut off: '{prompt.text[:80]}' is longer than the text encoder reads. Shorten it."
        )
    return [*new, noun[0]]
