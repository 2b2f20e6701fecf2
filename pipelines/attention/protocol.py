"""What a probe is, and the words it shares with the attention layers: site, step, columns, edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines.errors import StudioError


@dataclass(frozen=True)
class Site:
    """One attention layer. `height` and `width` are its query grid, 0 until the size of the latents is known."""

    name: str  # the layer's path in the UNet
    place: str  # "down" | "mid" | "up"
    kind: str  # "self" | "cross"
    heads: int
    level: int = 0  # how often the latents were halved on the way here
    height: int = 0
    width: int = 0

    def on(self, size: tuple[int, int]) -> Site:
        """This site for latents of (height, width): each halving rounds up, as the UNet's padded convolutions do."""
        height, width = size
        for _ in range(self.level):
            height, width = -(-height // 2), -(-width // 2)
        return replace(self, height=height, width=width)


@dataclass(frozen=True)
class Step:
    """Where the run is. `cond` are the rows of the batch that belong to the prompt (under CFG not all of them)."""

    index: int = 0
    total: int = 0  # 0 = not known
    t: float = 0.0  # the model's timestep
    cond: slice = field(default_factory=lambda: slice(None))
    size: tuple[int, int] = (0, 0)  # latents (height, width); the tap fills it in


@dataclass
class Columns:
    """Only look: these token positions, the same for all rows, or one list (of equal length) per row; None = all keys.

    `tokens` is read at every call, so a training probe may replace it between steps. With `grad` off the columns are
    cut from the graph and cost less: all layers are then looked at together, after the UNet's forward.
    """

    tokens: Sequence[int] | Sequence[Sequence[int]] | None
    grad: bool = True
    _index: tuple[Any, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    def choose(self, weights: Tensor, sites: int = 1) -> Tensor:
        """(rows, heads, queries, keys) -> (rows, heads, queries, chosen), also of several sites' rows in turn.

        Raises StudioError for positions outside the keys and for lists that are not one per row.
        """
        if self.tokens is None:
            return weights
        index = self._placed(weights.shape[-1], weights.device)
        if index.ndim == 1:
            return weights.index_select(-1, index)
        if len(index) * sites != len(weights):
            rows = len(weights) // sites
            raise StudioError(f"Token positions for {len(index)} rows, but the batch has {rows}. Give one list each.")
        return weights.gather(-1, index.repeat(sites, 1)[:, None, None].expand(*weights.shape[:3], -1))

    def shared_index(self, keys: int, device: torch.device) -> Tensor | None:
        """The positions as a tensor where they are the same for all rows, else None. Raises StudioError as `choose`."""
        index = None if self.tokens is None else self._placed(keys, device)
        return None if index is None or index.ndim != 1 else index

    def _placed(self, keys: int, device: torch.device) -> Tensor:
        """The positions as a tensor on the device; kept, because a copy to an accelerator waits for it."""
        wanted = (repr(self.tokens), keys, device)
        if self._index is None or self._index[0] != wanted:
            index = torch.tensor(self.tokens, dtype=torch.long)
            if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= keys:
                raise StudioError(f"Token positions {self.tokens} don't exist. Choose from 0 to {keys - 1}.")
            self._index = (wanted, index.to(device))
        return self._index[1]


@dataclass(frozen=True)
class Edit:
    """Change the logits of this layer: it runs eagerly, in fp32, while the probe is on."""


class Probe(Protocol):
    """What `probe_attention` takes. `edit` is only called where `wants` gave Edit, `look` where it gave Columns."""

    def wants(self, site: Site) -> None | Columns | Edit:
        """Asked once per layer when the context opens (the grid is not known yet)."""
        ...

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        """(rows, heads, queries, keys): scaled scores of all rows in fp32, before the softmax; the same shape back."""
        ...

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        """(prompt rows, heads, queries, chosen tokens): probabilities in fp32, after all edits.

        Under gradient checkpointing a layer runs again in the backward pass, with the same `step` object.
        """
        ...


class Tap:
    """The open end of a probe: says where the run is. Without `at`, every forward of the UNet counts as a next step."""

    def __init__(self) -> None:
        self.step = Step(index=-1)
        self.sites: tuple[Site, ...] = ()  # where somebody looks or edits, in the order they run
        self.running = False  # inside the UNet's forward
        self.waiting: list[Any] = []  # looks to be computed together at its end
        self.held = 0  # bytes they keep alive
        self._told = False

    def at(self, step: Step) -> None:
        """Call before each forward. Every call is a new step, even with an equal `step`."""
        self.step, self._told = replace(step), True

    def before_forward(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: note the size of the latents about to be denoised."""
        self.running, self.waiting, self.held = True, [], 0
        sample = args[0] if args else kwargs["sample"]
        size = (int(sample.shape[-2]), int(sample.shape[-1]))
        if not self._told:
            self.step = replace(self.step, index=self.step.index + 1, size=size)
        elif self.step.size != size:
            self.step = replace(self.step, size=size)
