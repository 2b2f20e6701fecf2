"""Trains the judge on true scenes, made worse in the ways that generated pictures are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.events import Event
from pipelines.toybox.dataset import Scenes
from pipelines.toybox.fitting import Fit, Losses, Plan
from pipelines.toybox.judge import ATTRIBUTES, STRIDE, Judge, crop
from pipelines.toybox.scenes import PROPS, SIZE, Scene, compose, place, stream
from pipelines.toybox.toys import Toy, random_toy
from pipelines.toybox.words import BACKGROUNDS, CATEGORIES

PLAN = Plan("judge", steps=6500, lr=2e-3, batch=32, average=0.998, half=False)
GROUP, PHOTOS = 12, 2  # toys of one category in an identity batch, photos of each
TEMPERATURE = 0.1


def photo_with(toy: Toy, rng: np.random.Generator) -> Scene:
    """One photo of a toy, sometimes with company; it is the first of the scene's toys by `subject_seed` 0."""
    others = [random_toy(rng) for _ in range(int(rng.choice((0, 1, 3), p=(0.6, 0.25, 0.15))))]
    seeds: list[int | None] = [0, *([None] * len(others))]
    return compose(place([toy, *others], rng, seeds), str(rng.choice(list(BACKGROUNDS))), rng)


def spoil(pictures: Tensor, vae: Any, rng: np.random.Generator) -> Tensor:
    """Blur, noise, colour drift, and what the VAE (with disturbed latents) makes of some of the pictures."""
    out = pictures.clone()
    for i in range(len(out)):
        if rng.random() < 0.3:
            sigma = float(rng.uniform(0.3, 1.0))
            blurred = cv2.GaussianBlur(out[i].permute(1, 2, 0).numpy(), (0, 0), sigma)
            out[i] = torch.from_numpy(blurred).permute(2, 0, 1)
    if vae is not None:
        some = torch.from_numpy(rng.permutation(len(out))[: len(out) // 2])
        with torch.no_grad():
            latents = vae.encode(out[some]).latent_dist.mean
            loud = rng.uniform(0, 0.15, (len(some), 1, 1, 1)) * (rng.random((len(some), 1, 1, 1)) < 0.5)
            loudness = torch.from_numpy(loud.astype(np.float32))
            noise = torch.from_numpy(rng.standard_normal(tuple(latents.shape), np.float32))
            out[some] = vae.decode(latents + latents.std() * loudness * noise).sample.clamp(-1, 1)
    drift = torch.from_numpy(rng.normal(0, 0.03, (len(out), 3, 1, 1)).astype(np.float32))
    grain = torch.from_numpy(rng.standard_normal(tuple(out.shape), np.float32))
    return (out + drift + 0.02 * grain).clamp(-1, 1)


def targets(truth: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Centre map (1 + props, 16, 16) of soft peaks, box map (4, 16, 16) in cells, and where boxes count (16, 16)."""
    cells = SIZE // STRIDE
    centre, box = torch.zeros(1 + len(PROPS), cells, cells), torch.zeros(4, cells, cells)
    weight = torch.zeros(cells, cells)
    items = [(0, toy["box"]) for toy in truth["toys"]]
    if truth["prop"]:
        items.append((1 + PROPS.index(truth["prop"]), truth["prop_box"]))
    y, x = torch.meshgrid(torch.arange(cells) + 0.5, torch.arange(cells) + 0.5, indexing="ij")
    for channel, (x0, y0, x1, y1) in ((c, [v / STRIDE for v in b]) for c, b in items):
        middle = (min(int((x0 + x1) / 2), cells - 1), min(int((y0 + y1) / 2), cells - 1))
        distance = (x - middle[0] - 0.5) ** 2 + (y - middle[1] - 0.5) ** 2
        centre[channel] = torch.maximum(centre[channel], torch.exp(-distance / 1.2))
        if channel == 0:
            near = distance < 2.1
            box[:, near] = torch.stack([x - x0, y - y0, x1 - x, y1 - y])[:, near]
            weight[near] = 1
    return centre, box.clamp_min(0), weight


def _finding(judge: Judge, scenes: Scenes, vae: Any, rng: np.random.Generator, batch: int) -> Losses:
    rows = rng.integers(0, scenes.count, batch)
    truths = [scenes.truths[row] for row in rows]
    pictures = spoil(scenes.pictures(rows), vae, rng)
    centres, boxes, backgrounds = judge.finder(pictures)
    centre, box, weight = (torch.stack(parts) for parts in zip(*map(targets, truths), strict=True))
    chance = centres.sigmoid()
    hit = centre > 0.99
    miss = (1 - centre) ** 4 * chance**2 * F.softplus(centres)
    focal = torch.where(hit, (1 - chance) ** 2 * F.softplus(-centres), miss).sum() / hit.sum()
    apart = ((boxes - box).abs() * weight[:, None]).sum() / (4 * weight.sum())
    names = list(BACKGROUNDS)
    stage = F.cross_entropy(backgrounds, torch.tensor([names.index(t["background"]) for t in truths]))
    crops, toys = _crops(pictures, truths, rng)
    answers, _ = judge.reader(crops)
    reading = sum(F.cross_entropy(answers[name], _answers(toys, name)) for name in ATTRIBUTES)
    return {"centre": focal, "box": apart, "background": stage, "reading": torch.as_tensor(reading)}


def _crops(pictures: Tensor, truths: list[dict], rng: np.random.Generator) -> tuple[Tensor, list[dict]]:
    """Every toy's crop, its box shaken a little as the finder would."""
    crops, toys = [], []
    for picture, truth in zip(pictures, truths, strict=True):
        for toy in truth["toys"]:
            crops.append(crop(picture, [v + float(rng.uniform(-1.2, 1.2)) for v in toy["box"]]))
            toys.append(toy)
    return torch.stack(crops), toys


def _answers(toys: list[dict], name: str) -> Tensor:
    """Right answers; the colour of an accent that isn't there is "none"."""

    def answer(toy: dict) -> str:
        if name in ("color", "second"):
            return str(toy["colors"][name == "second"])
        return "none" if name == "accent_color" and toy["accent"] == "none" else str(toy[name])

    return torch.tensor([ATTRIBUTES[name].index(answer(toy)) for toy in toys])


def _identity(judge: Judge, vae: Any, rng: np.random.Generator, step: int) -> Tensor:
    """Supervised contrast among toys of one category: photos of the same one attract."""
    draw = stream("train", 999_983, step)
    category = str(draw.choice(CATEGORIES))
    scenes = [
        photo_with(toy, draw) for toy in [random_toy(draw, category) for _ in range(GROUP)] for _ in range(PHOTOS)
    ]
    pictures = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    pictures = spoil(pictures, vae, rng)
    boxes = [next(t["box"] for t in s.toys if t["subject_seed"] == 0) for s in scenes]
    shaken = [[v + float(rng.uniform(-1.2, 1.2)) for v in box] for box in boxes]
    _, identities = judge.reader(torch.stack([crop(p, b) for p, b in zip(pictures, shaken, strict=True)]))
    alike = identities @ identities.T / TEMPERATURE
    alike = alike.masked_fill(torch.eye(len(alike), dtype=torch.bool), -1e4)
    owner = torch.arange(GROUP).repeat_interleave(PHOTOS)
    same = (owner[:, None] == owner[None]) & ~torch.eye(len(alike), dtype=torch.bool)
    return -(alike.log_softmax(1) * same).sum(1).div(same.sum(1)).mean()


def train_judge(scenes: Scenes, vae: Any, folder: Path, plan: Plan = PLAN) -> Iterator[Event]:
    """Trains or goes on; the state lies in `folder`."""
    torch.manual_seed(14)
    judge = Judge()
    fit = Fit(judge, plan, folder)

    def losses(rng: np.random.Generator, batch: int) -> Losses:
        parts = _finding(judge, scenes, vae, rng, batch)
        return parts | {"identity": _identity(judge, vae, rng, fit.step)}

    yield from fit.run(losses)


def trained_judge(folder: Path, plan: Plan = PLAN) -> Judge:
    """The averaged weights so far."""
    judge = Judge()
    Fit(judge, plan, folder).use_mean()
    return judge.eval()
