"""A probe for training: where each row's words look, with gradients."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pipelines.attention.probe import Columns, Site, Step


class Follow:
    """Maps of some words, the mean over heads and over the layers `names`, which are all of one grid.

    `positions` has one list of token positions per row of the batch, all of one length.
    """

    def __init__(self, positions: Sequence[Sequence[int]], names: Collection[str]) -> None:
        self._positions = positions
        self._names = names
        self._seen: dict[str, Tensor] = {}  # by layer: (rows, queries, words)
        self._grid = (0, 0)

    def wants(self, site: Site) -> Columns | None:
        return Columns(self._positions, grad=True) if site.name in self._names else None

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        return logits

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        self._seen[site.name] = columns.mean(1)
        self._grid = (site.height, site.width)

    def maps(self) -> Tensor:
        """(rows, words, h, w): probabilities of the last forward."""
        return torch.stack(list(self._seen.values())).mean(0).transpose(1, 2).unflatten(2, self._grid)
