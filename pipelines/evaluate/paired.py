"""Paired comparisons: the same subject, photos, seeds and budget in both arms, so only the differences count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 10_000
Values = Mapping[str, float]  # a case's measures, each a mean over its pictures; NaN = nothing to measure


@dataclass(frozen=True)
class Check:
    """What must come out of two arms: that `arm` is better than `over`, or with a `margin` that it is not worse.

    `more`: whether more of the measure is better. A check that does not decide is reported for the reader alone.
    """

    measure: str
    arm: str
    over: str
    more: bool = True
    margin: float | None = None
    decides: bool = True

    @property
    def words(self) -> str:
        """What is claimed, in words."""
        if self.margin is not None:
            return f"{self.measure}: {self.arm} not worse than {self.over} by more than {self.margin:g}"
        return f"{self.measure}: {self.arm} {'above' if self.more else 'below'} {self.over}"


@dataclass(frozen=True)
class Paired:
    """`difference` is arm minus over, with the 95 % interval of its bootstrap over `n` cases; NaN where n is 0."""

    n: int
    arm: float
    over: float
    difference: float
    low: float
    high: float

    def holds(self, check: Check) -> bool | None:
        """Whether the whole interval is on the claimed side. One case has no interval, and decides nothing: None."""
        if self.n < 2:
            return None
        worst = self.low if check.more else -self.high
        return worst > 0 if check.margin is None else worst > -check.margin

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; a number that isn't there is null."""
        return {key: round(value, 4) if np.isfinite(value) else None for key, value in asdict(self).items()}


def paired(arm: Sequence[Values], over: Sequence[Values], measure: str, seed: int = 0) -> Paired:
    """Compare two arms case by case, by an expanded percentile bootstrap over cases.

    Percentiles of few cases are too narrow (of twelve, 89 % of such intervals have the truth, not 95 %), so the tails
    are those that Student's t has for as many (Hesterberg 2015, arXiv 1411.5279, section 4.6).
    """
    from scipy.stats import norm, t

    rows = [(a.get(measure, np.nan), b.get(measure, np.nan)) for a, b in zip(arm, over, strict=True)]
    known = np.array([row for row in rows if np.isfinite(row).all()], dtype=np.float64).reshape(-1, 2)
    if not len(known):
        return Paired(0, *[float("nan")] * 5)
    differences = known[:, 0] - known[:, 1]
    chance = np.random.default_rng(seed)
    means = differences[chance.integers(0, len(differences), (DRAWS, len(differences)))].mean(1)
    n = len(known)
    tail = 100 * norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1)) if n > 1 else 0.0
    low, high = np.percentile(means, [tail, 100 - tail])
    a, b = known.mean(0)
    return Paired(n, float(a), float(b), float(differences.mean()), float(low), float(high))


def mean_of(values: Sequence[Values], measure: str) -> float:
    """Mean over cases, NaN left out; NaN when there is none."""
    known = [one[measure] for one in values if np.isfinite(one.get(measure, np.nan))]
    return float(np.mean(known)) if known else float("nan")
