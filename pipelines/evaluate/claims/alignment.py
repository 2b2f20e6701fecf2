"""System 3: AttnDreamBooth (arXiv 2406.05000) learns a subject and still does what the rest of the prompt says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluate.claim import FIRST, Arm, Check, Outcome, Settings
from pipelines.evaluate.paired import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipelines.evaluate.lab import Lab, Lesson
    from pipelines.toybox.judge import Verdict

name, order = "alignment", 5
title = "Text-aligned identity"
paper = "https://arxiv.org/abs/2406.05000"
about = (
    "Five photos of a toy on one background, learned by AttnDreamBooth, textual inversion and low-rank DreamBooth with "
    "the same number of steps and photos a step. Prompts ask for other backgrounds, for a second toy, and for a second "
    "toy of a named colour; identity is the likeness of the best toy of its kind to the photos."
)
seeds = range(FIRST, FIRST + 12)
shown = ("likeness", "own subject", "alignment", "background", "second toy", "its colour")
STEPS = 300
# the three stages of AttnDreamBooth share the steps as in its release (60 : 100 : 500, with more for the first two)
STAGES = {"embedding_steps": 60, "attention_steps": 100, "steps": STEPS - 160}
# the rates of its stages: token, cross-attention, whole UNet
RATES = ((1e-2, 1e-3, 2e-4), (5e-3, 3e-4, 5e-5), (5e-3, 2e-4, 2e-5), (2e-3, 1e-3, 2e-5))
arms = (
    Arm("AttnDreamBooth", tuple(STAGES | {"embedding_lr": a, "attention_lr": b, "lr": c} for a, b, c in RATES)),
    Arm("textual inversion", tuple({"steps": STEPS, "lr": lr} for lr in (2e-3, 5e-3, 1e-2, 2e-2))),
    Arm("DreamBooth", tuple({"steps": STEPS, "lr": lr} for lr in (2.5e-4, 5e-4, 1e-3, 2e-3))),
)
METHODS = {"AttnDreamBooth": "attndreambooth", "textual inversion": "textual_inversion", "DreamBooth": "dreambooth"}
# each baseline is weak on one: an embedding alone on identity, trained weights on the rest of the prompt
checks = (
    Check("likeness", "AttnDreamBooth", "textual inversion"),
    Check("alignment", "AttnDreamBooth", "DreamBooth"),
    Check("likeness", "AttnDreamBooth", "DreamBooth", decides=False),
    Check("alignment", "AttnDreamBooth", "textual inversion", decides=False),
)
BATCH = 4


def merit(values: Values) -> float:
    """Both, alike."""
    return values["likeness"] + values["alignment"]


def lesson(arm: Arm, seed: int, settings: Settings) -> Lesson:
    """The photos and how they are learned."""
    from pipelines.evaluate import lab as labs
    from pipelines.evaluate.claims.leakage import places
    from pipelines.toybox.photos import Shoot

    wanted = dict(settings) | {"batch_size": BATCH}
    return labs.Lesson(METHODS[arm.name], (Shoot((seed,), 5, places(seed)[0]),), labs.settings(wanted))


def prompts(seed: int) -> list[tuple[str, str, str, str]]:
    """(prompt, background, second kind, its colour), "" where nothing is asked; {} is the subject."""
    from pipelines.evaluate.claims.leakage import places
    from pipelines.toybox.scenes import stream, subject
    from pipelines.toybox.words import BACKGROUNDS, CATEGORIES, COLORS

    draw, others = stream("photo", seed, 3_000_029), places(seed)[1:]
    kinds = [str(kind) for kind in draw.permutation([kind for kind in CATEGORIES if kind != subject(seed).category])]
    colors = [str(color) for color in draw.permutation(list(COLORS))]
    named = [(f"a photo of a {{}} {BACKGROUNDS[place]}", place, "", "") for place in others[:3]]
    beside = [(f"a photo of a {{}} and a {kind}", "", kind, "") for kind in kinds[:2]]
    coloured = [
        (f"a photo of a {{}} and a {color} {kind} {BACKGROUNDS[place]}", place, kind, color)
        for color, kind, place in zip(colors, kinds[2:5], others[3:6], strict=False)
    ]
    return named + beside + coloured


def run(lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
    """All prompts."""
    from pipelines.evaluate.lab import looks, share, sight, strip
    from pipelines.request import Request
    from pipelines.toybox.scenes import subject

    trained = lab.learned(lesson(arm, seed, settings))
    count, known, kind = lab.few(3), lab.known(seed), subject(seed).category
    like, own, pictures = [], [], []
    hits: dict[str, list[bool]] = {"background": [], "second toy": [], "its colour": []}
    for text, place, second, color in prompts(seed):
        painted = lab.paint(Request(text.replace("{}", "<a>"), seeds=tuple(range(count))), [trained])
        pictures.append(painted[0])
        for seen in sight(painted):
            likest = _likest(seen, known, kind)
            like.append(likest[0])
            own.append(likest[1])
            if place:
                hits["background"].append(seen.background == place)
            if second:
                found = [toy for toy in seen.toys if toy.category == second]
                hits["second toy"].append(bool(found))
                if color:
                    hits["its colour"].append(any(toy.colors[0] == color for toy in found))
    shares = {key: share(values) for key, values in hits.items()}
    values = {
        "likeness": float(np.mean(like)),
        "own subject": share(own),
        "alignment": float(np.mean([*shares.values()])),
    }
    shown = {"backgrounds, a second toy, its colour": strip(pictures, 8)}
    beside = next(text for text, _, second, _ in prompts(seed) if second).replace("{}", "<a>")
    return Outcome(values | shares, shown | {"where <a> looks": looks(lab, Request(beside), [trained], ["<a>"])})


def _likest(seen: Verdict, known: NDArray[np.float32], kind: str) -> tuple[float, bool]:
    """The best likeness of a toy of the subject's kind (of any, where there is none), and whether it is the own one."""
    from pipelines.evaluate.lab import is_own

    toys = [toy for toy in seen.toys if toy.category == kind]
    if not toys:
        return max([float(known[0] @ toy.identity) for toy in seen.toys], default=-1.0), False
    best = max(toys, key=lambda toy: float(known[0] @ toy.identity))
    return float(known[0] @ best.identity), is_own(best, known, kind)
