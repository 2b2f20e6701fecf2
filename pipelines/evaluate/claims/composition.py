"""All systems: concepts of four methods in one picture, each where it was painted and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluate.claim import FIRST, Arm, Check, Outcome, Settings
from pipelines.evaluate.paired import Values

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.evaluate.lab import Lab
    from pipelines.toybox.judge import Found, Verdict

name, order = "composition", 7
title = "Composition across methods"
paper = "https://arxiv.org/abs/2510.23515"
about = (
    "Four toys of different kinds, each learned by another method (SVDiff, residual, low-rank DreamBooth, textual "
    "inversion), in one picture with a quarter for each. The changes of weights act in their own quarter alone "
    "(routed), and the layout leads the words; without, all four act everywhere. Counted: toys found in their quarter "
    "that are most like their own photos among ten of their kind, of four."
)
seeds = range(FIRST, FIRST + 6)
shown = ("in place as themselves", "there as themselves", "kinds in place", "all four right")
METHODS = ("svdiff", "residual", "dreambooth", "textual_inversion")
CELLS = ((0.0, 0.1, 0.5, 0.62), (0.5, 0.1, 1.0, 0.62), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0))
arms = (
    Arm("layout", tuple({"strength": s, "guidance": 5.0} for s in (0.04, 0.08, 0.2))),
    Arm("without", tuple({"guidance": g} for g in (4.0, 5.0, 7.5))),
)
checks = (
    Check("in place as themselves", "layout", "without"),
    Check("there as themselves", "layout", "without"),
    Check("kinds in place", "layout", "without", decides=False),
)


def merit(values: Values) -> float:
    """In its place, or at least there."""
    return values["in place as themselves"] + values["there as themselves"] + 0.1 * values["kinds in place"]


def concepts_of(lab: Lab, subjects: Sequence[int]) -> list[Trained]:
    """One concept a method, <a> to <d>, with the presets of this base."""
    from pipelines.evaluate.lab import Lesson
    from pipelines.toybox.photos import Shoot

    pairs = zip(METHODS, subjects, strict=True)
    return [lab.learned(Lesson(method, (Shoot((one,), 5),), first=i)) for i, (method, one) in enumerate(pairs)]


def run(lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
    """Several pictures of all four."""
    from pipelines.evaluate.lab import boxed, sight, strip, unlike
    from pipelines.request import Request

    subjects = unlike(40 * seed, len(METHODS))
    concepts = concepts_of(lab, subjects)
    layout = boxed(lab, CELLS, settings["strength"]) if arm.name == "layout" else None
    painted = []
    for place in (" on the grass", " on a table"):
        prompt = f"a photo of a <a>, a <b>, a <c> and a <d>{place}"
        request = Request(prompt, seeds=tuple(range(lab.few(6))), guidance=settings["guidance"], layout=layout)
        painted += lab.paint(request, concepts)
    known = [lab.known(one) for one in subjects]
    rows = np.array([_counted(lab, seen, known, subjects) for seen in sight(painted)], dtype=np.float64)
    placed, there, kinds = rows.mean(0)
    values = {
        "in place as themselves": float(placed),
        "there as themselves": float(there),
        "kinds in place": float(kinds),
        "all four right": float((rows[:, 0] == 1).mean()),
    }
    return Outcome(values, {"four methods": strip(painted[:4] + painted[-4:], 8)})


def _counted(lab: Lab, seen: Verdict, known: Sequence[Any], subjects: Sequence[int]) -> tuple[float, float, float]:
    """Of the four: in place as themselves, anywhere as themselves, a toy of the kind in place."""
    from pipelines.evaluate.lab import is_own
    from pipelines.toybox.scenes import subject

    placed = there = kinds = 0
    for number, one in enumerate(subjects):
        own = [toy for toy in seen.toys if is_own(toy, known[number], subject(one).category)]
        there += bool(own)
        placed += any(_in_cell(lab, toy, number) for toy in own)
        kinds += any(toy.category == subject(one).category and _in_cell(lab, toy, number) for toy in seen.toys)
    return placed / len(subjects), there / len(subjects), kinds / len(subjects)


def _in_cell(lab: Lab, toy: Found, number: int) -> bool:
    from pipelines.evaluate.lab import centre

    left, top, right, bottom = (value * lab.model.native_size for value in CELLS[number])
    x, y = centre(toy)
    return left <= x < right and top <= y < bottom
