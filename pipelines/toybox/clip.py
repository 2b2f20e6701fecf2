"""Toybox's CLIP: pictures and captions in one space; its text tower then becomes the base model's frozen text encoder.

Beside the contrastive loss, small heads (thrown away afterwards) read each toy's colour and pattern off its noun's
hidden state. That makes the text tower bind attributes to nouns, which the UNet would otherwise learn slowly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from pipelines.events import Event
from pipelines.toybox.dataset import Scenes
from pipelines.toybox.fitting import Fit, Losses, Plan
from pipelines.toybox.tokenizer import LENGTH
from pipelines.toybox.words import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS, TRUTHFUL, Caption, Wording

PLAN = Plan("clip", steps=1000, lr=1e-3, batch=96, average=0.998)
# Then the text tower stays as it is (the base model is trained on it) and the rest learns on.
SHARPEN = Plan("clip_vision", steps=1100, lr=1e-3, batch=128, average=0.998)
WIDTH = 128
_COLORS, _BACKGROUNDS = [None, *COLORS], [None, *BACKGROUNDS]
_PATTERNS = [None, *PATTERNS]


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Untrained: text 3 layers, vision 4 layers, both of width 128."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


class _Reader(nn.Module):
    """CLIP with the heads that are only there while it learns."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.category = nn.Linear(WIDTH, len(CATEGORIES))
        self.color = nn.Linear(WIDTH, len(_COLORS))
        self.pattern = nn.Linear(WIDTH, len(_PATTERNS))
        self.background = nn.Linear(WIDTH, len(_BACKGROUNDS))


def tokenize(tokenizer: CLIPTokenizer, captions: list[Caption]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Ids (n, longest), the end token's position (n,), and per caption the last position of each noun it said."""
    out = tokenizer([c.text for c in captions], padding="longest", truncation=True, return_offsets_mapping=True)
    ids = torch.tensor(out["input_ids"])
    ends = torch.tensor([sum(mask) - 1 for mask in out["attention_mask"]])
    nouns = []
    for caption, offsets in zip(captions, out["offset_mapping"], strict=True):
        by_end = {stop: i for i, (start, stop) in enumerate(offsets) if stop > start}
        nouns.append([by_end[span[1]] for _, span, *_ in caption.said])
    return ids, ends, nouns


def _reading(reader: _Reader, hidden: Tensor, ends: Tensor, nouns: list[list[int]], captions: list[Caption]) -> Tensor:
    """Cross-entropy of what the noun's state says of its toy, and the end token's of the background."""
    rows = torch.tensor([row for row, places in enumerate(nouns) for _ in places])
    states = hidden[rows, torch.tensor([place for places in nouns for place in places])]
    said = [item for caption in captions for item in caption.said]
    category = torch.tensor([CATEGORIES.index(noun) for _, _, noun, _, _ in said])
    color = torch.tensor([_COLORS.index(named) for *_, named, _ in said])
    pattern = torch.tensor([_PATTERNS.index(named) for *_, named in said])
    background = torch.tensor([_BACKGROUNDS.index(caption.background) for caption in captions])
    loss = F.cross_entropy(reader.category(states), category) + F.cross_entropy(reader.color(states), color)
    loss = loss + F.cross_entropy(reader.pattern(states), pattern)
    end_states = hidden[torch.arange(len(captions)), ends]
    return loss + F.cross_entropy(reader.background(end_states), background)


def _losses(reader: _Reader, tokenizer: CLIPTokenizer, scenes: Scenes, rng: np.random.Generator, batch: int) -> Losses:
    rows = rng.integers(0, scenes.count, batch)
    captions = scenes.captions(rows, rng, TRUTHFUL if rng.random() < 0.3 else Wording())
    ids, ends, nouns = tokenize(tokenizer, captions)
    text = reader.clip.text_model(input_ids=ids)
    return {
        "contrast": _contrast(reader.clip, text.pooler_output, scenes.pictures(rows)),
        "reading": 0.3 * _reading(reader, text.last_hidden_state.float(), ends, nouns, captions),
    }


def _contrast(clip: Any, text: Tensor, pictures: Tensor) -> Tensor:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021)."""
    vision = clip.vision_model(pixel_values=pictures)
    a = F.normalize(clip.text_projection(text).float(), dim=-1)
    b = F.normalize(clip.visual_projection(vision.pooler_output).float(), dim=-1)
    logits = a @ b.T * clip.logit_scale.exp().clamp(max=100)
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(tokenizer: CLIPTokenizer, scenes: Scenes, folder: Path, plan: Plan = PLAN) -> Iterator[Event]:
    """Trains or goes on; the state lies in `folder`."""
    torch.manual_seed(12)
    reader = _Reader(new_clip(tokenizer))
    yield from Fit(reader, plan, folder).run(lambda rng, batch: _losses(reader, tokenizer, scenes, rng, batch))


def read_clip(tokenizer: CLIPTokenizer, folder: Path, plan: Plan = PLAN) -> Any:
    """The averaged weights of the first part."""
    reader = _Reader(new_clip(tokenizer))
    Fit(reader, plan, folder).use_mean()
    return reader.clip.eval()


def _sharpening(clip: Any, folder: Path, plan: Plan) -> Fit:
    clip.text_model.requires_grad_(False)
    return Fit(clip, plan, folder)


def sharpen_clip(
    tokenizer: CLIPTokenizer, scenes: Scenes, folder: Path, plans: tuple[Plan, Plan] = (PLAN, SHARPEN)
) -> Iterator[Event]:
    """The second part: all but the text tower."""
    clip = read_clip(tokenizer, folder, plans[0])

    def losses(rng: np.random.Generator, batch: int) -> Losses:
        rows = rng.integers(0, scenes.count, batch)
        captions = scenes.captions(rows, rng, TRUTHFUL if rng.random() < 0.3 else Wording())
        with torch.no_grad():
            text = clip.text_model(input_ids=tokenize(tokenizer, captions)[0]).pooler_output
        return {"contrast": _contrast(clip, text, scenes.pictures(rows))}

    yield from _sharpening(clip, folder, plans[1]).run(losses)


def trained_clip(tokenizer: CLIPTokenizer, folder: Path, plans: tuple[Plan, Plan] = (PLAN, SHARPEN)) -> Any:
    """The averaged weights so far, of the second part where it has begun."""
    clip = read_clip(tokenizer, folder, plans[0])
    if (folder / f"{plans[1].name}.safetensors").exists():
        _sharpening(clip, folder, plans[1]).use_mean()
    return clip.eval()
