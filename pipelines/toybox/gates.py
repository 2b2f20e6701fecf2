"""What the shipped models must reach, measured on scenes and prompts that training never saw.

Thresholds that a measurement needs are chosen on the "tune" stream, figures come from the "test" stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.events import Event, Finished, Progress
from pipelines.toybox.judge import Found, Verdict, look
from pipelines.toybox.scenes import Scene, compose, place, scene, stream, subject
from pipelines.toybox.toys import Toy, random_toy
from pipelines.toybox.words import BACKGROUNDS, CATEGORIES, TRUTHFUL, Wording, caption

if TYPE_CHECKING:
    from pipelines.model import Model

Values = dict[str, float]
Measure = Callable[["Model", float], Values]  # the share of the full sample -> values


@dataclass(frozen=True)
class Gate:
    """One figure: `higher` says in which direction it is better."""

    name: str
    must: float
    aim: float
    higher: bool = True

    def reached(self, value: float, bound: float) -> bool:
        return value >= bound if self.higher else value <= bound

    def verdict(self, value: float) -> dict[str, Any]:
        return {
            "value": round(value, 4),
            "must": self.must,
            "aim": self.aim,
            "passed": self.reached(value, self.must),
            "aim_reached": self.reached(value, self.aim),
        }


SMALLEST = 30  # visible pixels of a toy that the segmenter is asked for: what is hidden nearly whole is no target

GATES = (
    Gate("vae_psnr_db", 30, 33),
    Gate("judge_category", 0.98, 0.99),
    Gate("judge_color", 0.95, 0.98),
    Gate("judge_pattern", 0.95, 0.97),
    Gate("judge_background", 0.99, 0.99),
    Gate("judge_vae_category_loss", 0.02, 0.01, higher=False),
    Gate("judge_vae_color_loss", 0.02, 0.01, higher=False),
    Gate("judge_vae_pattern_loss", 0.02, 0.01, higher=False),
    Gate("judge_vae_background_loss", 0.02, 0.01, higher=False),
    Gate("judge_count", 0.95, 0.98),
    Gate("judge_identity", 0.90, 0.95),
    Gate("judge_identity_vae", 0.85, 0.92),
    Gate("clip_retrieval", 0.70, 0.85),
    Gate("base_category", 0.90, 0.97),
    Gate("base_color", 0.85, 0.95),
    Gate("base_background", 0.95, 0.98),
    Gate("base_two_toys", 0.60, 0.80),
    Gate("attention_iou", 0.45, 0.60),
    Gate("segmenter_click", 0.85, 0.92),
    Gate("segmenter_box", 0.92, 0.96),
    Gate("picture_seconds", 3.0, 1.5, higher=False),
)


def through_vae(model: Model, images: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """What the autoencoder makes of pictures (its posterior's mean)."""
    out = []
    with torch.no_grad():
        for start in range(0, len(images), 32):
            batch = torch.from_numpy(np.stack(images[start : start + 32])).permute(0, 3, 1, 2)
            latents = model.vae.encode(batch.to(model.device, model.dtype) / 127.5 - 1).latent_dist.mean
            decoded = (model.vae.decode(latents).sample.float().clamp(-1, 1) + 1) * 127.5
            out += list(decoded.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return out


def verdicts(images: list[NDArray[np.uint8]]) -> list[Verdict]:
    """The judge on many pictures, in batches."""
    return [verdict for start in range(0, len(images), 64) for verdict in look(images[start : start + 64])]


def overlap(a: Any, b: Any) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return float(both / union) if union > 0 else 0.0


def match(truth: dict[str, Any], found: tuple[Found, ...]) -> Found | None:
    """The found toy that lies on a true one, if any."""
    best = max(found, key=lambda toy: overlap(truth["box"], toy.box), default=None)
    return best if best is not None and overlap(truth["box"], best.box) > 0.3 else None


def _accuracy(scenes: list[Scene], seen: list[Verdict]) -> Values:
    """Over all true toys: a missed toy counts as wrong in everything."""
    hits: dict[str, list[bool]] = {"category": [], "color": [], "pattern": []}
    for one, verdict in zip(scenes, seen, strict=True):
        for toy in one.toys:
            found = match(toy, verdict.toys)
            hits["category"].append(found is not None and found.category == toy["category"])
            hits["color"].append(found is not None and found.colors[0] == toy["colors"][0])
            hits["pattern"].append(found is not None and found.pattern == toy["pattern"])
    right = [one.background == verdict.background for one, verdict in zip(scenes, seen, strict=True)]
    return {name: float(np.mean(values)) for name, values in hits.items()} | {"background": float(np.mean(right))}


def measure_vae_and_judge(model: Model, share: float) -> Values:
    """PSNR of reconstructions, and the judge's reading of true and of reconstructed pictures."""
    scenes = [scene("test", seed) for seed in range(max(8, int(1000 * share)))]
    images = [one.image for one in scenes]
    rebuilt = through_vae(model, images)
    errors = [float(np.mean((a.astype(float) - b) ** 2)) for a, b in zip(images, rebuilt, strict=True)]
    true, vae = _accuracy(scenes, verdicts(images)), _accuracy(scenes, verdicts(rebuilt))
    values = {f"judge_{name}": value for name, value in true.items()}
    values |= {f"judge_vae_{name}_loss": true[name] - vae[name] for name in true}
    counted = [scene("test", 100_000 + seed, count=1 + seed % 4) for seed in range(max(8, int(600 * share)))]
    right = [len(v.toys) == len(s.toys) for s, v in zip(counted, verdicts([s.image for s in counted]), strict=True)]
    psnr = np.mean([10 * np.log10(255**2 / max(error, 1e-9)) for error in errors])
    return values | {"vae_psnr_db": float(psnr), "judge_count": float(np.mean(right))}


def portrait(toy: Toy, rng: np.random.Generator) -> Scene:
    """A toy alone on some background."""
    return compose(place([toy], rng), str(rng.choice(list(BACKGROUNDS))), rng)


def _identities(images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """(n, 64): the largest found toy's identity; zeros where nothing was found."""

    def size(toy: Found) -> int:
        x0, y0, x1, y1 = toy.box
        return (x1 - x0) * (y1 - y0)

    best = [max(verdict.toys, key=size, default=None) for verdict in verdicts(images)]
    return np.stack([toy.identity if toy else np.zeros(64, np.float32) for toy in best])


def measure_identity(model: Model, share: float) -> Values:
    """One photo against one of each of 20 unseen subjects of its category: how often the own one is nearest."""
    hits: dict[str, list[float]] = {"judge_identity": [], "judge_identity_vae": []}
    for number, category in enumerate(CATEGORIES[: max(2, int(len(CATEGORIES) * share))]):
        toys = [subject(50_000 + 100 * number + i, category) for i in range(20)]
        known = _identities([portrait(toy, stream("test", 7, number, i)).image for i, toy in enumerate(toys)])
        asked = [portrait(toy, stream("test", 8, number, i)).image for i, toy in enumerate(toys)]
        for name, images in (("judge_identity", asked), ("judge_identity_vae", through_vae(model, asked))):
            nearest = (_identities(images) @ known.T).argmax(1)
            hits[name].append(float(np.mean(nearest == np.arange(20))))
    return {name: float(np.mean(values)) for name, values in hits.items()}


def measure_clip(model: Model, share: float) -> Values:
    """Which of 100 unseen captions belongs to a picture; captions as in training, attributes dropped."""
    from pipelines.toybox.evaluation import clip_scores

    hits = []
    for block in range(max(1, int(10 * share))):
        scenes = [scene("test", 200_000 + 100 * block + i) for i in range(100)]
        rng = stream("test", 9, block)
        texts = [caption(s.toys, s.background, rng, Wording()).text for s in scenes]
        scores = clip_scores([s.image for s in scenes], texts)
        hits.append(float((scores.argmax(1) == np.arange(100)).mean()))
    return {"clip_retrieval": float(np.mean(hits))}


def _paint(model: Model, prompts: list[str], seed: int) -> list[NDArray[np.uint8]]:
    from pipelines.toybox.evaluation import paint

    return [paint(model, prompt, (seed + i,))[0] for i, prompt in enumerate(prompts)]


def measure_base(model: Model, share: float) -> Values:
    """One toy, and two toys of different category, as asked; 25 DDIM steps with guidance."""
    rng, asked = stream("test", 10), []
    for _ in range(max(4, int(200 * share))):
        toy, background = random_toy(rng), str(rng.choice(list(BACKGROUNDS)))
        fake = toy.truth() | {"box": [0, 0, 1, 1]}
        asked.append((toy, background, caption([fake], background, rng, TRUTHFUL).text))
    began = time.monotonic()
    images = _paint(model, [text for *_, text in asked], 1)
    seconds = (time.monotonic() - began) / len(images)
    hits: dict[str, list[bool]] = {"category": [], "color": [], "background": []}
    for (toy, background, _), verdict in zip(asked, verdicts(images), strict=True):
        best = verdict.surest
        hits["category"].append(best is not None and best.category == toy.category)
        hits["color"].append(best is not None and best.colors[0] == toy.colors[0])
        hits["background"].append(verdict.background == background)
    values = {f"base_{name}": float(np.mean(found)) for name, found in hits.items()}
    return values | {"base_two_toys": _two_toys(model, share), "picture_seconds": seconds}


def _two_toys(model: Model, share: float) -> float:
    """Both present, each with its own colour."""
    rng, pairs, texts = stream("test", 11), [], []
    for _ in range(max(4, int(120 * share))):
        a, b = (str(c) for c in rng.choice(CATEGORIES, 2, replace=False))
        toys = [random_toy(rng, a), random_toy(rng, b)]
        fakes = [toy.truth() | {"box": [32 * i, 0, 32 * i + 1, 1]} for i, toy in enumerate(toys)]
        pairs.append(toys)
        texts.append(caption(fakes, str(rng.choice(list(BACKGROUNDS))), rng, TRUTHFUL).text)
    hits = []
    for toys, verdict in zip(pairs, verdicts(_paint(model, texts, 5001)), strict=True):
        seen = [(found.category, found.colors[0]) for found in verdict.toys]
        hits.append(all((toy.category, toy.colors[0]) in seen for toy in toys))
    return float(np.mean(hits))


def measure_attention(model: Model, share: float) -> Values:
    """The noun's raw cross-attention on noised true scenes against the true mask, at one fixed threshold."""
    from pipelines.toybox.evaluation import noun_attention_iou

    return {"attention_iou": noun_attention_iou(model, max(4, int(200 * share)))}


def measure_segmenter(model: Model | None, share: float) -> Values:
    """Mean IoU with what is visible of every held-out toy, from one click inside it and from its box."""
    from pipelines.segmenter import load_segmenter
    from pipelines.toybox.segmenter import box_of, click_on

    segmenter, rng = load_segmenter(), stream("test", 13)
    found: dict[str, list[float]] = {"segmenter_click": [], "segmenter_box": []}
    for seed in range(max(4, int(300 * share))):
        one = scene("test", 500_000 + seed)
        segmenter.look(one.image)
        for mask in one.masks:
            if mask.sum() < SMALLEST:
                continue
            answers = segmenter.click([click_on(mask, rng)]), segmenter.box(box_of(mask))
            for name, answer in zip(found, answers, strict=True):
                seen = answer > 0
                found[name].append(float((seen & mask).sum() / (seen | mask).sum()))
    return {name: float(np.mean(values)) for name, values in found.items()}


MEASURES: tuple[Measure, ...] = (
    measure_vae_and_judge,
    measure_identity,
    measure_clip,
    measure_base,
    measure_attention,
    measure_segmenter,
)


def gates(model: Model | None = None, share: float = 1.0) -> Iterator[Event]:
    """Measure everything; ends with Finished({"gates": ..., "passed", "aims"}). `share` < 1 takes smaller samples."""
    from pipelines.model import load_model

    model = model or load_model("toybox")
    values: Values = {}
    for number, measure in enumerate(MEASURES, start=1):
        values |= measure(model, share)
        yield Progress(measure.__name__.removeprefix("measure_"), number, len(MEASURES), dict(values))
    report = {gate.name: gate.verdict(values[gate.name]) for gate in GATES}
    passed = sum(entry["passed"] for entry in report.values())
    aims = sum(entry["aim_reached"] for entry in report.values())
    summary = {"passed": passed == len(GATES), "must": f"{passed} of {len(GATES)}", "aims": f"{aims} of {len(GATES)}"}
    yield Finished({"gates": report, **summary})
