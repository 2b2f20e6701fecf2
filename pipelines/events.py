"""What long work says while it runs. Training and generation are generators of these, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # (height, width, 3), 0-255


@dataclass(frozen=True)
class Progress:
    """One step is done. `values` are the curves to draw (loss, norms ...)."""

    stage: str
    step: int
    total: int
    values: dict[str, float] = field(default_factory=dict)
    eta: float | None = None  # seconds


@dataclass(frozen=True)
class Preview:
    """A rough picture of unfinished work."""

    image: Picture
    index: int = 0  # which picture of the request
    step: int = 0
    total: int = 0


@dataclass(frozen=True)
class Heatmap:
    """Where one word looks, laid over `image` where there is one."""

    token: str
    values: NDArray[np.float32]  # (height, width), >= 0, not normalised
    image: Picture | None = None
    step: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Something worth keeping: a finished picture, a training sample, a checkpoint."""

    kind: str  # "picture" | "regions" | "sample" | "checkpoint" ...
    image: Picture | None = None
    path: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """One sentence for the person: something was decided, cut or left out."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of work that ended by itself."""

    value: Any = None


Event = Progress | Preview | Heatmap | Snapshot | Note | Finished
