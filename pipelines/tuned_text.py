"""A base's text encoders twice over: as they are, and a copy that learns. The base itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.text import run_encoders

if TYPE_CHECKING:
    from pipelines.model import Model

CACHED_STATES = 64


@dataclass(frozen=True)
class Pair:
    """Text states of the same texts from both: (texts, tokens, width), fp32; SDXL's pooled text from the frozen one."""

    tuned: Tensor
    frozen: Tensor
    pooled: Tensor | None


class TunedText:
    """Frozen and learning text encoders, both fp32 (AdamW's small steps vanish in half precision)."""

    def __init__(self, model: Model) -> None:
        self._tokenizers = model.tokenizers
        self._frozen = tuple(_as_fp32(encoder) for encoder in model.text_encoders)
        self._tuned = tuple(copy.deepcopy(encoder).requires_grad_(True) for encoder in self._frozen)
        self._known: dict[tuple[str, ...], tuple[Tensor, Tensor | None]] = {}

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters of the learning copy, always in the same order."""
        return [parameter for encoder in self._tuned for parameter in encoder.parameters()]

    def states(self, texts: Sequence[str]) -> Pair:
        """Both states of each text. They are bit-identical while nothing was learned."""
        with torch.autocast(self._frozen[0].device.type, enabled=False):
            frozen, pooled = self._frozen_states(tuple(texts))
            tuned, _ = run_encoders(self._tokenizers, self._tuned, texts)
        return Pair(tuned, frozen, pooled)

    def version(self) -> int:
        """Rises with every change of the learning copy."""
        return sum(parameter._version for parameter in self.parameters())

    def mean_change(self, places: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
        """How far the states at each text's positions have moved, averaged over the texts: (positions, width)."""
        with torch.no_grad():
            pair = self.states([text for text, _ in places])
        moved = pair.tuned - pair.frozen
        return torch.stack([moved[row, list(positions)] for row, (_, positions) in enumerate(places)]).mean(0)

    def _frozen_states(self, texts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Remembered for each group of texts as a whole: another group size may round differently."""
        if texts not in self._known:
            if len(self._known) >= CACHED_STATES:
                self._known.pop(next(iter(self._known)))
            with torch.no_grad():
                self._known[texts] = run_encoders(self._tokenizers, self._frozen, texts)
        return self._known[texts]


def _as_fp32(encoder: Any) -> Any:
    """The encoder itself when it is fp32 already."""
    return encoder if encoder.dtype == torch.float32 else copy.deepcopy(encoder).float()
