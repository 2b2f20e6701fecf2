"""A training step's rows, and parts of them: what one device computes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from pipelines.sources import Size


@dataclass
class Batch:
    """This process's rows of one step: photos first, then as many class pictures when prior preservation is on."""

    latents: Tensor  # (rows, c, h, w) fp32, sampled and scaled
    noise: Tensor  # (rows, c, h, w) fp32
    timesteps: Tensor  # (rows,) int64
    captions: list[str]
    masks: Tensor | None  # (rows, 1, h, w) fp32 in [0, 1], 1 = subject; ones where there is no mask
    prior: Tensor  # (rows,) bool: class pictures
    original_sizes: list[Size] = field(default_factory=list)
    crops: list[Size] = field(default_factory=list)  # top, left
    target_sizes: list[Size] = field(default_factory=list)
    subject_masks: Tensor | None = None  # (rows, subjects, h, w) as `masks`, one each; zeros where it isn't shown
    shown: Tensor | None = None  # (rows, subjects) bool: who is in the picture; nobody in class pictures
    mixed: Tensor | None = None  # (rows,) bool: collages
    first: bool = True  # of its step's parts, and so the one that counts the step

    def rows(self, keep: Tensor) -> Batch:
        """Those where `keep` (rows,) is true."""
        count, chosen = len(keep), keep.nonzero().flatten().tolist()
        kept: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor) and len(value) == count:
                kept[one.name] = value[keep]
            elif isinstance(value, list) and len(value) == count:
                kept[one.name] = [value[row] for row in chosen]
        return replace(self, **kept)

    def parts(self, photos: int) -> Iterator[tuple[Batch, float]]:
        """The batch in parts of at most so many photos, each with its own class pictures and its share of the whole.

        The shares add up to 1, so that means over rows, weighted by them, are the whole batch's. 0 = all at once.
        """
        whole = int((~self.prior).sum())
        if not photos or photos >= whole:
            yield self, 1.0
            return
        number = torch.arange(len(self.prior), device=self.prior.device) % whole  # a class picture goes with its photo
        for start in range(0, whole, photos):
            stop = min(start + photos, whole)
            part = self.rows((number >= start) & (number < stop))
            yield replace(part, first=start == 0), (stop - start) / whole
