"""What an attention store keeps of one batch of pictures, in one of four amounts of detail."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from pipelines.attention.protocol import Site, Step
from pipelines.errors import StudioError


class Detail(NamedTuple):
    """How much is kept beside the mean over the steps of every layer."""

    words: str
    steps: bool  # each step
    step_heads: bool  # each step by head
    mean_heads: bool  # the mean over the steps by head

    def cells(self, sites: Iterable[Site], steps: int) -> int:
        """Numbers per picture and label."""
        total = 0
        for site in sites:
            layers = site.heads if self.mean_heads else 1
            if self.steps:
                layers += steps * (site.heads if self.step_heads else 1)
            total += layers * site.height * site.width
        return total


DETAILS = {  # from most to least
    "heads": Detail("each step, layer and head", True, True, True),
    "layers": Detail("each step and layer, its heads averaged, and the mean over the steps by head", True, False, True),
    "mean heads": Detail("the mean over the steps by layer and head, no single steps", False, False, True),
    "mean": Detail("the mean over the steps by layer, no single steps or heads", False, False, False),
}


@dataclass
class Take:
    """What one batch of pictures left: tensors of (rows, heads or 1, queries, labels)."""

    detail: str  # a key of DETAILS
    sums: dict[str, Tensor] = field(default_factory=dict)  # by site name
    counts: dict[str, int] = field(default_factory=dict)
    steps: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # by site name, by step index
    last: dict[str, Step] = field(default_factory=dict)

    def add(self, site: Site, words: Tensor, step: Step) -> None:
        """One step of one layer, all heads of it."""
        detail, name = DETAILS[self.detail], site.name
        if detail.steps:
            kept = words if detail.step_heads else words.mean(1, keepdim=True)
            self.steps.setdefault(name, {})[step.index] = kept
        if not detail.mean_heads:
            words = words.mean(1, keepdim=True)
        if name in self.sums:
            self.sums[name].add_(words)
        else:
            self.sums[name] = words.clone()
        self.counts[name] = self.counts.get(name, 0) + 1
        self.last[name] = step

    def at(self, site: Site, step: int | None) -> Tensor:
        """One step, or the mean over all of them. StudioError for a step that isn't kept."""
        if step is None:
            return self.sums[site.name] / self.counts[site.name]
        kept = self.steps.get(site.name, {})
        if step not in kept:
            known = f"Steps 0 to {max(kept)} are." if kept else "Raise the attention budget to keep single steps."
            raise StudioError(f"Step {step} of '{site.name}' isn't kept. {known}")
        return kept[step]

    @property
    def rows(self) -> int:
        return len(next(iter(self.sums.values())))

    @property
    def nbytes(self) -> int:
        tensors = [*self.sums.values(), *(tensor for kept in self.steps.values() for tensor in kept.values())]
        return sum(tensor.nbytes for tensor in tensors)
