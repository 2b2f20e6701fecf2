"""System 1: refining a noun's attention (iSeg, arXiv 2409.03209) gives better masks than the attention itself."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluate.claim import FIRST, Arm, Check, Outcome, Settings
from pipelines.evaluate.paired import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipelines.evaluate.lab import Lab
    from pipelines.events import Picture
    from pipelines.toybox.scenes import Scene

name, order = "masks", 1
title = "Refined masks"
paper = "https://arxiv.org/abs/2409.03209"
about = (
    "In pictures with known masks, one with a single toy and one with two for each seed, the nouns' raw attention and "
    "the refined masks of the same base are compared with the true ones. Both arms chose noise level and threshold, "
    "and the refined one its rounds, among equally many settings on other scenes."
)
seeds = range(FIRST, FIRST + 120)
tuning = range(1000, 1016)
quick = 10
shown = ("IoU", "IoU, one toy", "IoU, two toys")
arms = (
    Arm("raw", tuple({"timestep": t, "threshold": b} for t, b in product((150, 300, 450), (0.3, 0.45, 0.6, 0.75)))),
    Arm(
        "refined",
        tuple({"timestep": t, "threshold": b, "steps": n} for t, b, n in product((150, 300), (0.0, 0.3, 0.5), (1, 2))),
    ),
)
checks = (
    Check("IoU", "refined", "raw"),
    Check("IoU, one toy", "refined", "raw", decides=False),
    Check("IoU, two toys", "refined", "raw", decides=False),
)


def merit(values: Values) -> float:
    """The mean of both kinds of scenes."""
    return values["IoU"]


def run(lab: Lab, arm: Arm, seed: int, settings: Settings) -> Outcome:
    """Both scenes of a seed."""
    from pipelines.masks import mask_params, noun_masks

    refine = arm.name == "refined"
    params = mask_params(lab.model.kind, refine=refine).model_copy(update=dict(settings))
    found: dict[str, float] = {}
    pictures = {}
    for count, word in ((1, "one toy"), (2, "two toys")):
        one = _scene(seed, count)
        nouns = [toy["category"] for toy in one.toys]
        masks = noun_masks(lab.model, one.image, nouns, refine=refine, params=params)
        binary = [masks[noun].binary() for noun in nouns]
        found[f"IoU, {word}"] = float(np.mean([_iou(a, b) for a, b in zip(binary, one.masks, strict=True)]))
        pictures[word] = _shown(one.image, binary)
    return Outcome({"IoU": float(np.mean(list(found.values()))), **found}, pictures)


def _scene(seed: int, count: int) -> Scene:
    """A held-out scene whose toys have different nouns; tuning seeds are of another stream."""
    from pipelines.toybox.scenes import scene

    stream = "tune" if seed in tuning else "test"
    drawn = (scene(stream, 700_000 + 100 * seed + 10 * count + i, count) for i in range(10))
    return next(
        one for one in drawn if len({toy["category"] for toy in one.toys}) == count and all(map(np.any, one.masks))
    )


def _iou(mask: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    return float((mask & true).sum() / max(int((mask | true).sum()), 1))


def _shown(image: Picture, masks: list[NDArray[np.bool_]]) -> Picture:
    """The picture with each mask in a colour of its own."""
    out = image.astype(np.float32)
    for mask, tint in zip(masks, ((255, 40, 160), (40, 200, 255)), strict=False):
        out[mask] = 0.45 * out[mask] + 0.55 * np.array(tint, np.float32)
    return out.round().astype(np.uint8)
