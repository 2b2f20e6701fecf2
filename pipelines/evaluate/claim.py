"""What a claim is: a paper's headline, and how to measure it on Toybox. One file in `claims/` is one claim."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import StudioError
from pipelines.evaluate import claims
from pipelines.evaluate.paired import Check, Values

if TYPE_CHECKING:
    from pipelines.evaluate.lab import Lab
    from pipelines.events import Picture

Settings = Mapping[str, Any]
FIRST = 3000  # first reporting seed; tuning and the gates use others
TUNING = range(1000, 1002)  # seeds on which settings are chosen

__all__ = ["FIRST", "TUNING", "Arm", "Check", "Claim", "Outcome", "claim_names", "get_claim"]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison. `grid` are the settings tried for it on tuning seeds, () = nothing to choose.

    `like` names an arm whose choice it takes over, so that what differs between the two is the claim alone.
    A quick run leaves out those that are `extra`, and what is checked of them.
    """

    name: str
    grid: tuple[Settings, ...] = ()
    like: str = ""
    extra: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one arm did in one case: its measures, and a few pictures to show, by caption."""

    values: Values
    pictures: Mapping[str, Picture] = field(default_factory=dict)


class Claim(Protocol):
    """A module of `claims/`. `name` is its file's name; the command's order is `order`."""

    name: str
    order: int
    title: str
    paper: str
    about: str  # what is done, in a paragraph
    seeds: range  # reporting seeds, one case each
    arms: Sequence[Arm]
    checks: Sequence[Check]
    shown: Sequence[str]  # measures in the table of arms

    def merit(self, values: Values) -> float:
        """What the search makes as large as it can; the same for every arm."""
        ...

    def run(self, lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
        """One case."""
        ...


def claim_names() -> list[str]:
    """All claims, in the order of the systems."""
    return [claim.name for claim in _all()]


def get_claim(name: str) -> Claim:
    """StudioError for a name that isn't there."""
    for claim in _all():
        if claim.name == name:
            return claim
    raise StudioError(f"There is no claim '{name}'. Choose one of: {', '.join(claim_names())}.")


def _all() -> list[Claim]:
    return sorted(_modules(), key=lambda claim: claim.order)


def _modules() -> Iterator[Any]:
    for found in pkgutil.iter_modules(claims.__path__):
        yield importlib.import_module(f"{claims.__name__}.{found.name}")
