"""System 2: Cones 2 (arXiv 2305.19327). A painted layout puts learned subjects in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluate.claim import FIRST, Arm, Check, Outcome, Settings
from pipelines.evaluate.paired import Values

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.evaluate.lab import Lab
    from pipelines.toybox.judge import Verdict

name, order = "layout", 4
title = "Layout guidance"
paper = "https://arxiv.org/abs/2305.19327"
about = (
    "Two toys of different kinds, each learned as a residual embedding from five photos of its own. Both are asked for "
    "in one prompt, with a box for each (left and right, then the other way round), and without a layout. A picture is "
    "right when each is found in its half and is most like its own photos among ten toys of its kind."
)
seeds = range(FIRST, FIRST + 12)
shown = ("each in its region", "both there as themselves", "both kinds there", "bytes a concept")
BOXES = ((0.04, 0.3, 0.48, 0.95), (0.52, 0.3, 0.96, 0.95))  # the lower part of the left and of the right half
PLACES = ("on the grass", "in the snow", "at night", "on a table")
# Cones 2's weight of guidance; without a layout the same number of tries goes to how strictly the prompt is followed
arms = (
    Arm("guided", tuple({"strength": s, "guidance": 5.0} for s in (0.04, 0.08, 0.2))),
    Arm("without", tuple({"guidance": g} for g in (4.0, 5.0, 7.5))),
)
checks = (
    Check("each in its region", "guided", "without"),
    Check("both there as themselves", "guided", "without"),
    Check("both kinds there", "guided", "without", decides=False),
)


def merit(values: Values) -> float:
    """Where it was to be, or at least there."""
    return values["each in its region"] + values["both there as themselves"] + 0.1 * values["both kinds there"]


def residuals(lab: Lab, seeds: Sequence[int]) -> list[Trained]:
    """A residual concept for each subject, <a>, <b> ..."""
    from pipelines.evaluate.lab import Lesson
    from pipelines.toybox.photos import Shoot

    return [lab.learned(Lesson("residual", (Shoot((seed,), 5),), first=i)) for i, seed in enumerate(seeds)]


def run(lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
    """Both orders, on several backgrounds."""
    from pipelines.evaluate.lab import boxed, looks, share, sight, strip, unlike
    from pipelines.request import Request
    from pipelines.toybox.scenes import subject

    subjects = unlike(40 * seed, 2)
    concepts = residuals(lab, subjects)
    painted, wanted = [], []
    for number, place in enumerate(PLACES):
        halves = (0, 1) if number % 2 == 0 else (1, 0)  # which half is whose
        layout = boxed(lab, [BOXES[side] for side in halves], settings["strength"]) if arm.name == "guided" else None
        prompt = f"a photo of a <a> and a <b> {place}"
        request = Request(prompt, seeds=tuple(range(lab.few(4))), guidance=settings["guidance"], layout=layout)
        painted += lab.paint(request, concepts)
        wanted += [halves] * lab.few(4)
    seen = sight(painted)
    known = [(lab.known(one), subject(one).category) for one in subjects]
    half = lab.model.native_size / 2
    values = {
        "each in its region": share([_right(one, known, sides, half) for one, sides in zip(seen, wanted, strict=True)]),
        "both there as themselves": share([_right(one, known, None, half) for one in seen]),
        "both kinds there": share([_kinds(one, subjects) for one in seen]),
        "bytes a concept": float(np.mean([_bytes(one) for one in concepts])),
    }
    pictures = {"a left of b, then right of it": strip(painted[:: lab.few(4)] + painted[1 :: lab.few(4)], 8)}
    last = replace(request, seeds=(0, 1))
    return Outcome(values, pictures | {"where <a> and <b> look, in turn": looks(lab, last, concepts, ["<a>", "<b>"])})


def _right(seen: Verdict, known: Sequence[Any], sides: Sequence[int] | None, half: float) -> bool:
    from pipelines.evaluate.lab import centre, is_own

    def there(number: int) -> bool:
        return any(
            is_own(toy, *known[number]) and (sides is None or (centre(toy)[0] >= half) == bool(sides[number]))
            for toy in seen.toys
        )

    return there(0) and there(1)


def _kinds(seen: Verdict, subjects: Sequence[int]) -> bool:
    from pipelines.toybox.scenes import subject

    return {subject(one).category for one in subjects} <= {toy.category for toy in seen.toys}


def _bytes(concept: Trained) -> int:
    return sum(one.numel() * one.element_size() for one in concept.tensors.values())
