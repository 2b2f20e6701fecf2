"""Toybox's own measurements with its own models: CLIP scores, pictures for a prompt, attention against true masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipelines.events import Snapshot
from pipelines.toybox.scenes import Scene, scene, stream
from pipelines.toybox.words import Wording, caption

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.model import Model

CLIP = Path(__file__).parents[2] / "assets" / "toybox" / "clip"
TIMES = (100, 300, 500)  # noise levels at which attention is read
THRESHOLDS = tuple(np.linspace(0.2, 0.7, 11))


@lru_cache(maxsize=1)
def load_clip(folder: Path = CLIP) -> tuple[Any, Any]:
    """Toybox's CLIPModel and tokenizer."""
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def clip_scores(images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> NDArray[np.float32]:
    """Cosines (pictures, texts) of Toybox's CLIP."""
    clip, tokenizer = load_clip()
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    vision = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    ids = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    text = clip.text_projection(clip.text_model(**ids).pooler_output)
    scores: NDArray[np.float32] = (F.normalize(vision, dim=-1) @ F.normalize(text, dim=-1).T).numpy()
    return scores


def paint(
    model: Model, prompt: str, seeds: Sequence[int], concepts: Sequence[tuple[Trained, float]] = (), steps: int = 25
) -> list[NDArray[np.uint8]]:
    """Pictures of a prompt, one a seed: DDIM and the base's own guidance, the house's defaults."""
    from pipelines.generate import Request, generate

    request = Request(prompt, seeds=tuple(seeds), steps=steps, preview_every=0)
    events = generate(model, request, concepts=concepts)
    return [event.image for event in events if isinstance(event, Snapshot) and event.image is not None]


@torch.no_grad()
def noun_maps(model: Model, one: Scene, text: str, noun: str, seed: int) -> dict[tuple[int, int], NDArray[np.float32]]:
    """Raw cross-attention of `noun` while the UNet looks at a noised true picture: per grid, the mean over layers,
    heads and TIMES."""
    from pipelines.attention.probe import Step, probe_attention
    from pipelines.attention.store import AttentionStore
    from pipelines.model import noise_scheduler
    from pipelines.tokens import find_word

    states = model.encode([text])
    pixels = torch.from_numpy(one.image.copy()).permute(2, 0, 1)[None].to(model.device, model.dtype) / 127.5 - 1
    clean = model.vae.encode(pixels).latent_dist.mean * model.vae.config.scaling_factor
    schedule: Any = noise_scheduler(model)
    store = AttentionStore({noun: find_word(states.prompts[0], noun)})
    draw = torch.Generator().manual_seed(seed)
    with probe_attention(model.unet, store) as tap:
        for index, t in enumerate(TIMES):
            noise = torch.randn(clean.shape, generator=draw).to(clean)
            when = torch.tensor([t], device=model.device)
            tap.at(Step(index, len(TIMES), t))
            model.unet(schedule.add_noise(clean, noise, when), when, encoder_hidden_states=states.states)
    grids = sorted({(site.height, site.width) for site in store.sites()})
    return {grid: store.maps(noun, site=[s.name for s in store.sites(grid=grid)])[0] for grid in grids}


def _samples(model: Model, stream_name: str, count: int) -> dict[tuple[int, int], list[NDArray[np.float32]]]:
    """Per grid: [soft map in [0, 1] at 64 px beside the true mask] for `count` toys in held-out scenes."""
    out: dict[tuple[int, int], list[NDArray[np.float32]]] = {}
    for number in range(count):
        one = scene(stream_name, 300_000 + number, count=1 + number % 2)
        said = caption(one.toys, one.background, stream(stream_name, 12, number), Wording(bare=0))
        index, _, noun, _, _ = said.said[0]
        if sum(other[2] == noun for other in said.said) > 1:
            continue  # the same word twice has no one mask
        for grid, values in noun_maps(model, one, said.text, noun, number).items():
            big = F.interpolate(torch.from_numpy(values)[None, None], (64, 64), mode="bilinear")[0, 0].numpy()
            soft = (big - big.min()) / max(float(big.max() - big.min()), 1e-9)
            out.setdefault(grid, []).append(np.stack([soft, one.masks[index].astype(np.float32)]))
    return out


def _iou(pairs: list[NDArray[np.float32]], threshold: float) -> float:
    scores = []
    for soft, mask in pairs:
        seen, true = soft > threshold, mask > 0.5
        scores.append((seen & true).sum() / max((seen | true).sum(), 1))
    return float(np.mean(scores))


def noun_attention_iou(model: Model, count: int) -> float:
    """Mean IoU of the noun's raw attention with the true mask. Grid and threshold are chosen on the tuning stream."""
    tuning = _samples(model, "tune", max(4, count // 2))
    choices = [(grid, float(t)) for grid in tuning for t in THRESHOLDS]
    grid, threshold = max(choices, key=lambda choice: _iou(tuning[choice[0]], choice[1]))
    return _iou(_samples(model, "test", count)[grid], threshold)
