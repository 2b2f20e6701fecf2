"""A probe that remembers where words look: always the mean over the steps, and each step, layer and head if it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.attention.protocol import Columns, Site, Step
from pipelines.attention.take import DETAILS, Take
from pipelines.errors import StudioError

Maps = NDArray[np.float32]  # (rows, height, width): attention probabilities, 0-1

MEGABYTE = 2**20


class AttentionStore:
    """Cross-attention of chosen words while pictures are made; give it to `generate(probes=[store])`.

    `tokens` names what to follow: label -> positions in the prompt; several positions (sub-words, repeated words) are
    summed. `budget_mb` bounds the memory of all `pictures` together: before the first step the richest detail that
    fits is chosen, and `note` says which; the mean per layer is kept even when it alone is over. All values are the
    softmax's own probabilities in fp32 on the model's device. Rows are pictures, batch after batch.
    """

    def __init__(
        self,
        tokens: Mapping[str, Sequence[int]],
        budget_mb: float = 256,
        pictures: int = 1,
        where: Callable[[Site], bool] | None = None,
    ) -> None:
        if not tokens or not all(tokens.values()):
            raise StudioError("No words to follow. Choose at least one word of the prompt.")
        if budget_mb < 0:
            raise StudioError(f"The attention budget can't be {budget_mb} MB. Give 0 or more.")
        self.tokens = {label: list(positions) for label, positions in tokens.items()}
        self.budget = int(budget_mb * MEGABYTE)
        self.note = ""
        self.takes: list[Take] = []
        self._pictures = pictures
        self._where = where or (lambda site: True)
        self._sites: dict[str, Site] = {}
        self._chosen = sorted({position for positions in self.tokens.values() for position in positions})
        self._sum: Tensor | None = None  # (chosen positions, labels), 0 or 1; None when each label is one position
        if [[position] for position in self._chosen] != list(self.tokens.values()):
            self._sum = torch.zeros(len(self._chosen), len(self.tokens))
            for column, positions in enumerate(self.tokens.values()):
                for position in positions:
                    self._sum[self._chosen.index(position), column] = 1

    # The probe

    def wants(self, site: Site) -> Columns | None:
        if site.kind != "cross" or not self._where(site):
            return None
        self._sites[site.name] = site
        return Columns(self._chosen, grad=False)

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        return logits

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        take = self._take(site, step, len(columns))
        if take is None:
            return
        if self._sum is not None:
            self._sum = self._sum.to(columns.device)
            columns = columns @ self._sum
        take.add(site, columns, step)

    def _take(self, site: Site, step: Step, rows: int) -> Take | None:
        """Where this look belongs; None for a layer that runs again within the step (gradient checkpointing)."""
        take = self.takes[-1] if self.takes else None
        last = take.last.get(site.name) if take else None
        if last is step:
            return None
        if take is None or (last is not None and step.index <= last.index):  # the next pictures begin
            self._sites = {name: known.on(step.size) for name, known in self._sites.items()}
            take = Take(self._plan(rows, step.total))
            self.takes.append(take)
        return take

    def _plan(self, rows: int, steps: int) -> str:
        """The richest detail whose memory fits this batch's share of the budget."""
        share = min(self.budget * rows / max(self._pictures, rows), self.budget - self.nbytes)
        need = {
            name: 4 * len(self.tokens) * rows * detail.cells(self._sites.values(), steps)
            for name, detail in DETAILS.items()
        }
        fits = [name for name in DETAILS if need[name] <= share and (steps or not DETAILS[name].steps)]
        chosen = fits[0] if fits else "mean"
        self.note = f"Attention is kept for {DETAILS[chosen].words} ({need[chosen] / MEGABYTE:.2f} MB a batch)."
        if steps and chosen != "heads":
            whole = need["heads"] * max(self._pictures, rows) / rows / MEGABYTE
            self.note += f" Everything would take {whole:.2f} MB; {self.budget / MEGABYTE:.2f} MB are allowed."
        return chosen

    # What was seen

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(take.nbytes for take in self.takes)

    @property
    def detail(self) -> str:
        """The least that was kept of any batch: "heads" | "layers" | "mean heads" | "mean"; "" before the first."""
        return max((take.detail for take in self.takes), key=list(DETAILS).index, default="")

    @property
    def rows(self) -> int:
        """Pictures seen."""
        return sum(take.rows for take in self.takes)

    @property
    def steps(self) -> list[int]:
        """Step indices kept for every picture and layer."""
        kept = [set(take.steps.get(name, {})) for take in self.takes for name in take.sums]
        return sorted(set.intersection(*kept)) if kept else []

    def sites(self, place: str | None = None, grid: tuple[int, int] | None = None) -> list[Site]:
        """Layers seen, in the order they run; only those of a place ("down" ...) or a (height, width) if given."""
        seen = [site for name, site in self._sites.items() if self.takes and name in self.takes[0].sums]
        return [s for s in seen if place in (None, s.place) and grid in (None, (s.height, s.width))]

    def maps(
        self,
        label: str,
        step: int | None = None,
        site: str | Sequence[str] | None = None,
        head: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Maps:
        """(rows, height, width): where the pictures look for `label`, probabilities resampled bilinearly to `size`.

        Without `step` the mean over the steps, without `site` over all layers (each counts the same), without `head`
        over the heads; `size` (height, width) is that of the finest layer if not given. Raises StudioError for what is
        not known or was not kept.
        """
        column, sites = self._column(label), self._chosen_sites(site)
        if head is not None and len(sites) != 1:
            raise StudioError("A head belongs to one layer. Choose the layer as well.")
        size = size or max((s.height, s.width) for s in sites)
        return np.concatenate([self._resampled(take, sites, column, step, head, size) for take in self.takes])

    def _resampled(
        self, take: Take, sites: list[Site], column: int, step: int | None, head: int | None, size: tuple[int, int]
    ) -> Maps:
        """The mean over `sites`. Layers of one grid are added first: resampling is linear, so once per grid will do."""
        grids: dict[tuple[int, int], Tensor] = {}
        for site in sites:
            kept = take.at(site, step)[..., column]  # (rows, heads or 1, queries)
            flat = kept.mean(1) if head is None else self._head(kept, site, head)
            grid = (site.height, site.width)
            grids[grid] = grids[grid] + flat if grid in grids else flat
        total = sum(_resize(flat.unflatten(1, grid), size) for grid, flat in grids.items())
        assert isinstance(total, Tensor)
        return (total / len(sites)).cpu().numpy()

    def _head(self, kept: Tensor, site: Site, head: int) -> Tensor:
        if kept.shape[1] == 1 < site.heads:
            raise StudioError(f"Single heads of '{site.name}' weren't kept. Raise the attention budget to see them.")
        if not 0 <= head < site.heads:
            raise StudioError(f"'{site.name}' has no head {head}. Choose from 0 to {site.heads - 1}.")
        return kept[:, head]

    def _column(self, label: str) -> int:
        if not self.takes:
            raise StudioError("No attention was recorded. Make a picture with this store among the probes.")
        if label not in self.tokens:
            raise StudioError(f"'{label}' wasn't followed. Choose one of: {', '.join(self.tokens)}.")
        return list(self.tokens).index(label)

    def _chosen_sites(self, site: str | Sequence[str] | None) -> list[Site]:
        seen = {s.name: s for s in self.sites()}
        names = list(seen) if site is None else [site] if isinstance(site, str) else list(site)
        missing = [name for name in names if name not in seen]
        if missing or not names:
            raise StudioError(f"No layer '{', '.join(missing)}' was recorded. Choose one of: {', '.join(seen)}.")
        return [seen[name] for name in names]

    def report(self) -> dict[str, Any]:
        """What is kept, as plain JSON data."""
        return {
            "tokens": self.tokens,
            "detail": self.detail,
            "note": self.note,
            "rows": self.rows,
            "steps": self.steps,
            "sites": [asdict(site) for site in self.sites()],
            "nbytes": self.nbytes,
            "budget": self.budget,
        }

    def restore(self, sites: Sequence[Site], takes: Sequence[Take]) -> None:
        """Put back what was saved: `sites` with their grids, in order, and `takes` with tensors for each of them."""
        self._sites, self.takes = {site.name: site for site in sites}, list(takes)

    def save_npz(self, path: str | Path) -> None:
        """All that is kept, as one file; see `pipelines.attention.archive` for its layout."""
        from pipelines.attention.archive import save_npz

        save_npz(self, path)

    @classmethod
    def load_npz(cls, path: str | Path) -> AttentionStore:
        """The inverse of `save_npz`. StudioError when the file isn't one."""
        from pipelines.attention.archive import load_npz

        return load_npz(path)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows, h, w) -> (rows, height, width), bilinear; antialiased where it shrinks."""
    if tuple(maps.shape[1:]) == size:
        return maps
    shrinks = maps.shape[1] > size[0] or maps.shape[2] > size[1]
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False, antialias=shrinks)[:, 0]
