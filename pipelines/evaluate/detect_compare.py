"""Detect-and-Compare: are all subjects in a picture, each once and with its own identity?

Paper: Jang et al. 2024 (MuDI), arXiv 2404.04243, section 4.3 and figure 14. The N boxes that a detector finds are
compared with the subjects' photos, and the photos with each other:

    S_DC[i, j] = mean over photos of j of cos(box i, photo)
    S_GT[i, j] = mean over pairs of photos of i and j of cos       (the diagonal has each photo with itself, too)
    score = 1 - |S_DC - S_GT|

Each column in turn takes the unused row with the largest S_DC, as in the released code; `match="best"` takes the
assignment with the largest sum (Hungarian). Another number of boxes than N is a count error: score 0, counted apart,
since "one is missing" and "they are mixed up" are different failings. The norm: the released code and the figure's
numbers use the spectral one, the paper writes the squared Frobenius one; all three are here, and a result says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.evaluate.eyes import Eyes
    from pipelines.evaluate.sights import Box
    from pipelines.events import Picture

Matrix = NDArray[np.float64]
Norm = Literal["spectral", "fro", "fro2"]
Match = Literal["greedy", "best"]
NORMS: tuple[Norm, ...] = ("spectral", "fro", "fro2")


@dataclass(frozen=True)
class References:
    """The subjects' photos as the embedder sees them: what to look for, and S_GT."""

    queries: tuple[str, ...]  # what the detector is asked for, one a subject
    features: tuple[Matrix, ...]  # (photos, width) of unit length, by subject
    own: Matrix  # (subjects, subjects): S_GT


@dataclass(frozen=True)
class Comparison:
    """What was found in one picture. `rows[j]` is the number of the box that stands for subject j; none on a count
    error. `boxes` are all that were found, in pixels."""

    score: float
    count: int
    wanted: int
    norm: Norm
    similar: Matrix | None = None  # (subjects, subjects): S_DC, rows in the subjects' order
    rows: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()

    @property
    def counted(self) -> bool:
        """Whether as many boxes were found as there are subjects."""
        return self.count == self.wanted

    @property
    def each_its_own(self) -> bool:
        """Whether all are there and every box is most like its own subject."""
        if self.similar is None:
            return False
        return bool((self.similar.argmax(axis=1) == np.arange(self.wanted)).all())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        similar = None if self.similar is None else np.round(self.similar, 4).tolist()
        known = {"score": round(self.score, 4), "count": self.count, "wanted": self.wanted, "norm": self.norm}
        boxes = [[round(value, 1) for value in box] for box in self.boxes]
        return known | {"each_its_own": self.each_its_own, "similar": similar, "boxes": boxes, "rows": list(self.rows)}


def references(
    eyes: Eyes, photos: Mapping[str, Sequence[Picture]], queries: Mapping[str, str] | None = None
) -> References:
    """The subjects with their photos, whole. StudioError when one has none.

    A detector is asked for what `queries` say, by the photos' keys, or else for the keys themselves; there two subjects
    of one kind need keys that differ, and "cat" and "cat " are asked for alike.
    """
    empty = [query for query, pictures in photos.items() if not len(pictures)]
    if empty or not photos:
        raise StudioError(f"There are no photos of {', '.join(empty) or 'any subject'} to compare with. Add some.")
    features = tuple(_unit(eyes.embed([(picture, None) for picture in pictures])) for pictures in photos.values())
    asked = tuple((queries or {}).get(key, key).strip() for key in photos)
    return References(asked, features, own_similarity(features))


def detect_and_compare(
    eyes: Eyes, picture: Picture, known: References, *, norm: Norm = "spectral", match: Match = "greedy"
) -> Comparison:
    """The comparison of one picture with the subjects' photos."""
    boxes = eyes.find(picture, known.queries)
    wanted = len(known.queries)
    if len(boxes) != wanted:
        return Comparison(0.0, len(boxes), wanted, norm, boxes=tuple(boxes))
    seen = _unit(eyes.embed([(picture, box) for box in boxes]))
    similar = similarity(seen, known.features)
    rows = matched(similar, match)
    similar = similar[list(rows)]
    return Comparison(score(similar, known.own, norm), len(boxes), wanted, norm, similar, rows, tuple(boxes))


def summary(results: Sequence[Comparison]) -> dict[str, Any]:
    """Means over pictures, with what was miscounted apart.

    "score" has count errors as 0, as the paper does; "score_counted" leaves them out; "success" is the share in which
    every subject is there once and most like itself.
    """
    if not results:
        raise StudioError("There are no pictures to judge. Make some first.")
    counted = [one.score for one in results if one.counted]
    return {
        "n": len(results),
        "norm": results[0].norm,
        "score": float(np.mean([one.score for one in results])),
        "score_counted": float(np.mean(counted)) if counted else None,
        "count_errors": float(np.mean([not one.counted for one in results])),
        "too_few": float(np.mean([one.count < one.wanted for one in results])),
        "too_many": float(np.mean([one.count > one.wanted for one in results])),
        "success": float(np.mean([one.each_its_own for one in results])),
    }


def own_similarity(features: Sequence[Matrix]) -> Matrix:
    """S_GT of the subjects' features, (photos, width) each of unit length."""
    return np.array([[float((one @ other.T).mean()) for other in features] for one in features])


def similarity(seen: Matrix, features: Sequence[Matrix]) -> Matrix:
    """S_DC of boxes' features (boxes, width), rows in the boxes' order."""
    return np.stack([(seen @ one.T).mean(axis=1) for one in features], axis=1)


def matched(similar: Matrix, match: Match = "greedy") -> tuple[int, ...]:
    """The row that stands for each column."""
    if match == "best":
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(-similar)
        return tuple(int(row) for row in rows[np.argsort(columns)])
    left, chosen = list(range(len(similar))), []
    for column in similar.T:
        best = max(left, key=lambda row: float(column[row]))
        left.remove(best)
        chosen.append(best)
    return tuple(chosen)


def score(similar: Matrix, own: Matrix, norm: Norm = "spectral") -> float:
    """1 - |S_DC - S_GT|: 1 is perfect; it may be negative. `norm`: the largest singular value, or Frobenius's, or its
    square. StudioError for another norm."""
    if norm not in NORMS:
        raise StudioError(f"There is no norm '{norm}'. Choose one of: {', '.join(NORMS)}.")
    away = np.asarray(similar, dtype=np.float64) - np.asarray(own, dtype=np.float64)
    if norm == "spectral":
        return 1 - float(np.linalg.norm(away, 2))
    frobenius = float(np.linalg.norm(away, "fro"))
    return 1 - (frobenius if norm == "fro" else frobenius**2)


def _unit(features: NDArray[Any]) -> Matrix:
    wide = np.asarray(features, dtype=np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.maximum(length, 1e-12)
