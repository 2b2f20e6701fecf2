"""The artefact that training leaves behind."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """One learned thing: `token` is what a person types, `noun` the ordinary word for its kind."""

    token: str  # "<my-dog>"
    noun: str  # "dog"


@dataclass(frozen=True)
class Concept:
    """The description of a concept (concept.json); its tensors lie beside it in weights.safetensors."""

    name: str
    subjects: tuple[Subject, ...]
    method: str
    base_model: dict[str, str]  # {"id": ..., "fingerprint": ...}; fingerprint "" = unknown (an imported original file)
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    created: float = field(default_factory=time.time)
    recipe: dict[str, Any] = field(default_factory=dict)  # run, photo hashes, steps_done if stopped
    format: Literal[1] = 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, the inverse of `from_json`."""
        return asdict(self) | {"subjects": [asdict(subject) for subject in self.subjects]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Concept:
        """Raises TypeError or KeyError on foreign fields; the library turns that into a StudioError."""
        return cls(**(data | {"subjects": tuple(Subject(**subject) for subject in data["subjects"])}))


@dataclass(frozen=True)
class Trained:
    """A concept together with its tensors: what `train` finishes with and what `generate` takes."""

    concept: Concept
    tensors: dict[str, Tensor]
