"""System 1: SVDiff (arXiv 2303.11305) trained inside masks learns the subject alone, not where it was photographed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluate.claim import FIRST, Arm, Check, Outcome, Settings
from pipelines.evaluate.paired import Values

if TYPE_CHECKING:
    from pipelines.evaluate.lab import Lab, Lesson, Masks
    from pipelines.toybox.judge import Verdict

name, order = "leakage", 2
title = "No background leakage"
paper = "https://arxiv.org/abs/2303.11305"
about = (
    "Five photos of a toy, all on one background and beside one unnamed thing. SVDiff learns it plainly, inside masks "
    "found by attention, and inside the true masks as the ceiling; the first two also with prior preservation. "
    "Pictures are asked for without naming a background, and on others by name. Leaked: the photos' background, or "
    "their thing."
)
seeds = range(FIRST, FIRST + 12)
shown = (
    "leaked, unnamed background",
    "leaked, other background named",
    "likeness",
    "asked background",
    "background's clearness",
)
PRIOR = {"prior_weight": 1.0, "prior_count": 16}
tuning = range(1000, 1004)
RATES: tuple[Settings, ...] = tuple({"lr": lr} for lr in (2.5e-3, 5e-3, 1e-2, 2e-2))
# what is left of the loss outside the mask keeps backgrounds clean, and lets the photos' own one in
MASKED: tuple[Settings, ...] = tuple({"lr": lr, "background_weight": b} for lr in (5e-3, 1e-2) for b in (0.01, 0.03))
MASKS: dict[str, Masks] = {"plain": "none", "refined": "found", "true": "true"}
arms = (
    Arm("base"),
    *(Arm(kind, RATES if kind == "plain" else MASKED, extra=kind == "true") for kind in MASKS),
    *(Arm(f"{kind} with prior", like=kind, extra=True) for kind in ("plain", "refined")),
)
checks = (
    *(
        check
        for suffix in ("", " with prior")
        for check in (
            Check("leaked, unnamed background", f"refined{suffix}", f"plain{suffix}", more=False),
            Check("leaked, other background named", f"refined{suffix}", f"plain{suffix}", more=False, margin=0.05),
            Check("likeness", f"refined{suffix}", f"plain{suffix}", margin=0.03),
            Check("background's clearness", f"refined{suffix}", "base", margin=0.05),
        )
    ),
    Check("leaked, unnamed background", "true", "plain", more=False, decides=False),
)


def merit(values: Values) -> float:
    """Like the subject, and nothing of where it stood."""
    leaked = (values["leaked, unnamed background"] + values["leaked, other background named"]) / 2
    return values["likeness"] - leaked


def lesson(arm: Arm, seed: int, settings: Settings) -> Lesson:
    """The photos and how they are learned."""
    from pipelines.evaluate import lab as labs
    from pipelines.toybox.photos import Shoot

    kind, _, prior = arm.name.partition(" with ")
    wanted = dict(settings) | (PRIOR if prior else {})
    return labs.Lesson("svdiff", (Shoot((seed,), 5, places(seed)[0], prop=True),), labs.settings(wanted), MASKS[kind])


def places(seed: int) -> list[str]:
    """Where the photos are taken, and then the other backgrounds."""
    from pipelines.toybox.scenes import stream
    from pipelines.toybox.words import BACKGROUNDS

    return [str(b) for b in stream("photo", seed, 3_000_017).permutation([b for b in BACKGROUNDS if b != "simple"])]


def run(lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
    """Pictures of one subject."""
    from pipelines.evaluate.lab import likeness, share, sight, strip
    from pipelines.request import Request
    from pipelines.toybox.photos import Shoot, shoot
    from pipelines.toybox.scenes import subject
    from pipelines.toybox.words import BACKGROUNDS

    home, *others = places(seed)
    prop = shoot(Shoot((seed,), 1, home, prop=True))[0].prop
    concepts = [] if arm.name == "base" else [lab.learned(lesson(arm, seed, settings))]
    words = f"a {subject(seed).category}" if arm.name == "base" else "a <a>"
    unnamed = lab.paint(Request(f"a photo of {words}", seeds=tuple(range(lab.few(8)))), concepts)
    asked = [b for b in others[:4] for _ in range(2)]
    request = Request("", seeds=(100, 101))
    named = [
        image
        for b in others[:4]
        for image in lab.paint(replace(request, prompt=f"a photo of {words} {BACKGROUNDS[b]}"), concepts)
    ]
    known = lab.known(seed, background=home)
    free, told = sight(unnamed), sight(named)
    values = {
        "leaked, unnamed background": share([_leaked(one, home, prop) for one in free]),
        "leaked, other background named": share([_leaked(one, home, prop) for one in told]),
        "likeness": float(np.mean([likeness(one, known)[0] for one in [*free, *told]])),
        "asked background": share([one.background == b for one, b in zip(told, asked, strict=True)]),
        "background's clearness": float(np.mean([one.background_score for one in [*free, *told]])),
    }
    return Outcome(values, {"no background named": strip(unnamed), "other backgrounds": strip(named[::2])})


def _leaked(seen: Verdict, home: str, prop: str | None) -> bool:
    return seen.background == home or prop in [kind for kind, _ in seen.props]
