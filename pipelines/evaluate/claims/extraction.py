"""System 1: several subjects out of one photo keep apart when attention masks say which token is where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluate.claim import FIRST, Arm, Check, Outcome, Settings
from pipelines.evaluate.paired import Values

if TYPE_CHECKING:
    from pipelines.evaluate.lab import Lab, Lesson, Masks

name, order = "extraction", 3
title = "Many subjects from one photo"
paper = "https://arxiv.org/abs/2407.07077"
about = (
    "One photo with two toys of different kinds. Their tokens are learned together: with masks that attention finds "
    "and a pull of each token's attention onto its mask, or jointly on the whole photo without either, where every "
    "prompt names both, as the photo shows both; same steps. "
    "Each is then painted alone, and both together, where the overlap of the two tokens' attention is measured."
)
seeds = range(FIRST, FIRST + 12)
shown = ("own subject", "likeness", "overlap of maps")
RATES: tuple[Settings, ...] = tuple(
    {"lr": a, "shift_lr": b} for a, b in ((1e-3, 5e-3), (1e-3, 1e-2), (3e-3, 1e-2), (1e-3, 2e-2))
)
arms = (
    Arm("masks", RATES),
    Arm("joint", RATES),
    # why the two differ, and nothing else: how far the masks that attention finds, and the prompts, matter
    Arm("true masks", like="masks", extra=True),
    Arm("masks, all named", like="masks", extra=True),
)
checks = (
    Check("own subject", "masks", "joint"),
    Check("overlap of maps", "masks", "joint", more=False),
    Check("own subject", "true masks", "masks", decides=False),
    Check("own subject", "masks, all named", "masks", decides=False),
    Check("own subject", "masks, all named", "joint", decides=False),
)
MASKS: dict[str, Masks] = {"joint": "none", "true masks": "true"}


def merit(values: Values) -> float:
    """Each its own."""
    return values["own subject"] + values["likeness"]


def lesson(arm: Arm, seed: int, settings: Settings) -> Lesson:
    """The one photo and how it is learned."""
    from pipelines.evaluate import lab as labs
    from pipelines.toybox.photos import Shoot

    wanted = dict(settings)
    if arm.name == "joint":
        wanted |= {"attention": "off", "masked_loss": False, "schedule": "all"}  # "a photo of <a>" would not be true
    if arm.name.endswith("all named"):
        wanted |= {"schedule": "all"}
    masks = MASKS.get(arm.name, "found")
    return labs.Lesson("extract", (Shoot(tuple(labs.unlike(40 * seed, 2)), 1),), labs.settings(wanted), masks)


def run(lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
    """Pictures of each alone, and of both."""
    from pipelines.attention.heatmap import overlay
    from pipelines.evaluate.lab import is_own, likeness, share, sight, strip, unlike
    from pipelines.request import Request
    from pipelines.toybox.scenes import subject

    trained = lab.learned(lesson(arm, seed, settings))
    own, alike, pictures = [], [], {}
    pair = unlike(40 * seed, 2)
    for token, subject_seed in zip(("<a>", "<b>"), pair, strict=True):
        painted = lab.paint(Request(f"a photo of a {token}", seeds=tuple(range(lab.few(6)))), [trained])
        known, seen = lab.known(subject_seed), sight(painted)
        own += [is_own(one.surest, known, subject(subject_seed).category) for one in seen]
        alike += [float(likeness(one, known)[0]) for one in seen]
        pictures[f"{token} alone"] = strip(painted)
    request = Request("a photo of a <a> and a <b>", seeds=tuple(range(lab.few(4))))
    both, maps = lab.maps(request, [trained], ["<a>", "<b>"])
    overlap = float(np.minimum(maps[0], maps[1]).sum((1, 2)).mean())
    values = {
        "own subject": share(own),
        "likeness": float(np.mean(alike)),
        "overlap of maps": overlap,
    }
    looks = [overlay(maps[word, row], picture) for row, picture in enumerate(both[:3]) for word in (0, 1)]
    return Outcome(values, pictures | {"both": strip(both), "where <a> and <b> look, in turn": strip(looks)})
