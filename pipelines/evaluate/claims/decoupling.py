"""System 4: MuDI (arXiv 2404.04243). Seg-Mix keeps subjects of one kind apart, and start noise gives each its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluate.claim import FIRST, Arm, Check, Outcome, Settings
from pipelines.evaluate.paired import Values

if TYPE_CHECKING:
    from pipelines.evaluate.detect_compare import References
    from pipelines.evaluate.lab import Lab, Lesson
    from pipelines.start_noise import Layout
    from pipelines.toybox.photos import Shoot
    from pipelines.toybox.scenes import Scene

name, order = "decoupling", 6
title = "Identities decoupled"
paper = "https://arxiv.org/abs/2404.04243"
about = (
    "Two, three or four toys of the same kind, five photos of each, learned together as one low-rank change, each as "
    "a rare word and a descriptive class (its main colour and kind): with Seg-Mix, with Cut-Mix, and plainly (joint "
    'DreamBooth), same steps. All are asked for in one prompt, three and four as "3 objects: ...". '
    "Detect-and-Compare says whether each is there once and most like itself; a wrong number of toys counts as failed."
)
tuning = range(1002, 1004)  # two and three subjects
seeds = range(FIRST, FIRST + 12)  # two, three and four subjects in turn
shown = ("success", "success, 2", "success, 3", "success, 4", "score", "right number")
MIXES = {"Seg-Mix": "segmix", "Cut-Mix": "cutmix", "joint": "none"}
RATES: tuple[Settings, ...] = tuple({"lr": lr} for lr in (5e-4, 1e-3, 2e-3))
# Toybox's toys never overlap and share a ground: collages may spread over the canvas with their cut-outs at one height
SPREAD: Settings = {"margin": 0.1, "level": True}  # published: 0.5, False
# six tries each: the published mixing and another at three rates, or more rates
APART: tuple[Settings, ...] = tuple({**one, **SPREAD} for one in RATES)
SIDES: tuple[Settings, ...] = tuple({**one, "cut_sides": "always"} for one in RATES)
MORE: tuple[Settings, ...] = tuple({"lr": lr} for lr in (2.5e-4, 7e-4, 1.5e-3))
arms = (
    *(Arm(mix, RATES + others) for mix, others in zip(MIXES, (APART, SIDES, MORE), strict=True)),
    Arm("Seg-Mix with start noise", like="Seg-Mix"),
    Arm("joint with start noise", like="joint"),
)
checks = (
    Check("success", "Seg-Mix", "joint"),
    Check("success", "Seg-Mix", "Cut-Mix"),
    Check("success", "Seg-Mix with start noise", "Seg-Mix"),
    *(Check(f"success, {n}", "Seg-Mix", over, decides=False) for n in (2, 3, 4) for over in ("joint", "Cut-Mix")),
    *(Check(f"success, {n}", "Seg-Mix with start noise", "Seg-Mix", decides=False) for n in (2, 3, 4)),
    Check("score", "Seg-Mix", "joint", decides=False),
    Check("success", "Seg-Mix with start noise", "joint with start noise", decides=False),
)
PLACES = ("", " on the grass", " at night", " on a table")
NEGATIVE = "sticker, collage"
BATCH = 4
GAMMA = {2: 2.0, 3: 2.0, 4: 3.0}


def merit(values: Values) -> float:
    """Each once and itself; a wrong number of toys scores nothing."""
    return values["success"] + values["score"]


def group(seed: int) -> tuple[list[int], str]:
    """The subjects and their kind."""
    from pipelines.toybox.words import CATEGORIES

    count = 2 + seed % 3
    return [600_000 + 10 * seed + i for i in range(count)], CATEGORIES[seed % len(CATEGORIES)]


def shoots(seed: int) -> tuple[Shoot, ...]:
    """Five photos of each."""
    from pipelines.toybox.photos import Shoot

    subjects, kind = group(seed)
    return tuple(Shoot((one,), 5, category=kind) for one in subjects)


def lesson(arm: Arm, seed: int, settings: Settings) -> Lesson:
    """A folder of photos with true masks for each subject, the same for every arm."""
    from pipelines.evaluate import lab as labs

    wanted = dict(settings) | {
        "mix": MIXES[arm.name.removesuffix(" with start noise")],
        "masked_loss": False,
        "batch_size": BATCH,
    }
    return labs.Lesson("segmix", shoots(seed), labs.settings(wanted), "true", described=True)


def run(lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
    """Pictures of all together, on several backgrounds."""
    from pipelines.evaluate.detect_compare import detect_and_compare
    from pipelines.evaluate.eyes import ToyboxEyes
    from pipelines.evaluate.lab import LETTERS, strip
    from pipelines.request import Request
    from pipelines.start_noise import mean_shift

    subjects, _ = group(seed)
    trained = lab.learned(lesson(arm, seed, settings))
    prompt = wording([f"a <{letter}>" for letter in LETTERS[: len(subjects)]])
    layout = collages(lab, seed) if arm.name.endswith("start noise") else None
    eyes, known, painted = ToyboxEyes(), references(seed), []
    for place in PLACES:
        request = Request(f"{prompt}{place}", NEGATIVE, seeds=tuple(range(lab.few(4))))
        start = mean_shift(lab.model, request, layout, GAMMA[len(subjects)]) if layout else None
        painted += lab.paint(request, [trained], start)
    results = [detect_and_compare(eyes, picture, known) for picture in painted]
    success = float(np.mean([one.each_its_own for one in results]))
    values = {
        "success": success,
        f"success, {len(subjects)}": success,
        "score": float(np.mean([one.score for one in results])),
        "right number": float(np.mean([one.counted for one in results])),
    }
    return Outcome(values, {f"{len(subjects)} together": strip(painted[:: lab.few(4)] + painted[1 :: lab.few(4)], 8)})


def wording(things: Sequence[str]) -> str:
    """As the paper asks for more than two, with commas: of "a <a> and a <b> and a <c>" the base paints two."""
    from pipelines.mixers import counted_prompt

    *first, last = things
    listed = f"{', '.join(first)} and {last}"
    return f"a photo of {listed}" if len(things) < 3 else counted_prompt(listed, things)


def photographed(seed: int) -> list[list[Scene]]:
    """The subjects' photos, as they are learned from."""
    from pipelines.toybox.photos import shoot

    return [shoot(one) for one in shoots(seed)]


def references(seed: int) -> References:
    """What each subject looks like in its photos."""
    from pipelines.evaluate.detect_compare import references as look
    from pipelines.evaluate.eyes import ToyboxEyes

    _, kind = group(seed)
    photos = {kind + " " * i: [one.image for one in scenes] for i, scenes in enumerate(photographed(seed))}
    return look(ToyboxEyes(), photos)


def collages(lab: Lab, seed: int) -> Layout:
    """A random collage of the subjects' photos for each picture, the same for every arm."""
    from pipelines.collage import Recipe, cut_out
    from pipelines.evaluate.lab import LETTERS
    from pipelines.start_noise import random_layout

    pieces = {
        name: [cut_out(name, one.image, one.masks[0].astype(np.uint8) * 255) for one in scenes]
        for name, scenes in zip(LETTERS, photographed(seed), strict=False)
    }
    return random_layout(pieces, (lab.model.native_size, lab.model.native_size), Recipe(**SPREAD))
