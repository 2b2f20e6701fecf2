"""Toybox's segmenter: Segment Anything (Kirillov et al. 2023, arXiv 2304.02643) at small size, trained on true masks.

The same classes as the published checkpoints, so that `SamPredictor` and everything above it drive both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.events import Event
from pipelines.toybox.fitting import Fit, Losses, Plan
from pipelines.toybox.scenes import SIZE, Scene, scene

PLAN = Plan("segmenter", steps=1700, lr=1e-3, batch=12, average=0.998, half=False)
PIXELS, PATCH, WIDTH, CHANNELS = 128, 8, 96, 64
_Mask = NDArray[np.bool_]


def new_segmenter() -> Any:
    """Untrained, 0.6 M parameters; pictures of 128 px, masks of 64."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    cells = PIXELS // PATCH
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=PIXELS,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=3,
            num_heads=3,
            mlp_ratio=3,
            out_chans=CHANNELS,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=(0, 1, 2),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=CHANNELS, image_embedding_size=(cells, cells), input_image_size=(PIXELS, PIXELS), mask_in_chans=8
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=4 * CHANNELS, num_heads=4),
            transformer_dim=CHANNELS,
            iou_head_depth=2,
            iou_head_hidden_dim=CHANNELS,
        ),
    )


def click_on(mask: _Mask, rng: np.random.Generator) -> tuple[float, float]:
    """x, y of a pixel inside the mask, off its edge where it is thick enough."""
    inner = cv2.erode(np.pad(mask, 1).astype(np.uint8), np.ones((3, 3), np.uint8))[1:-1, 1:-1]
    ys, xs = np.nonzero(inner if inner.any() else mask)
    pick = int(rng.integers(len(xs)))
    return float(xs[pick]) + 0.5, float(ys[pick]) + 0.5


def box_of(mask: _Mask) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of what is visible, in pixels; x1 and y1 are just outside."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def _clicks(one: Scene, masks: list[_Mask], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One to three points for each mask: (masks, n, 2) in the segmenter's pixels, and labels (1 inside, 0 outside)."""
    count = int(rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))
    everything = np.any(one.masks, axis=0)
    points, labels = [], []
    for mask in masks:
        spots, signs = [click_on(mask, rng)], [1]
        for _ in range(count - 1):
            inside = bool(rng.random() < 0.5)
            outside = everything & ~mask if (everything & ~mask).any() else ~mask
            spots.append(click_on(mask if inside else outside, rng))
            signs.append(int(inside))
        points.append(spots)
        labels.append(signs)
    return torch.tensor(points) * (PIXELS / SIZE), torch.tensor(labels)


def _boxes(masks: list[_Mask], rng: np.random.Generator) -> Tensor:
    """(masks, 4), shaken a little as a person or a detector would."""
    shaken = [[v + float(rng.uniform(-1.2, 1.2)) for v in box_of(mask)] for mask in masks]
    return torch.tensor(shaken).clamp(0, SIZE) * (PIXELS / SIZE)


def _apart(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy plus dice loss: logits (masks, tokens, h, w) and truth (masks, 1, h, w) -> (masks, tokens)."""
    truth = truth.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=(2, 3))
    chance = logits.sigmoid()
    both = (chance * truth).sum(dim=(2, 3))
    dice = 1 - (2 * both + 1) / (chance.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)
    return 5 * entropy + dice


def _losses(sam: Any, rng: np.random.Generator, batch: int) -> Losses:
    """The single mask, the best of the three alternatives, and how well their quality is foretold."""
    scenes = [scene("train", int(seed)) for seed in rng.integers(0, 1_000_000, batch)]
    pixels = torch.from_numpy(np.stack([one.image for one in scenes])).permute(0, 3, 1, 2).float()
    pixels = pixels + torch.from_numpy(rng.normal(0, 3, tuple(pixels.shape)).astype(np.float32))
    big = F.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)
    features = sam.image_encoder(sam.preprocess(big.clamp(0, 255)))
    total: dict[str, list[Tensor]] = {"single": [], "best": [], "quality": []}
    for row, one in enumerate(scenes):
        masks = [mask for mask in one.masks if mask.sum() >= 12]
        if not masks:
            continue
        truth = torch.from_numpy(np.stack(masks)).float()[:, None]
        for points, boxes in ((_clicks(one, masks, rng), None), (None, _boxes(masks, rng))):
            logits, quality = _decoded(sam, features[row : row + 1], points, boxes)
            apart = _apart(logits, truth)
            found = (logits > 0).float()
            union = torch.maximum(found, truth.expand_as(found)).sum(dim=(2, 3))
            overlap = (found * truth).sum(dim=(2, 3)) / union
            total["single"].append(apart[:, 0].mean())
            total["best"].append(apart[:, 1:].amin(dim=1).mean())
            total["quality"].append(F.mse_loss(quality, overlap))
    return {name: torch.stack(values).mean() for name, values in total.items()}


def _decoded(sam: Any, features: Tensor, points: Any, boxes: Any) -> tuple[Tensor, Tensor]:
    """All four masks (prompts, 4, 64, 64) as logits, and their foretold IoU (prompts, 4)."""
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
    decoded: tuple[Tensor, Tensor] = sam.mask_decoder.predict_masks(
        image_embeddings=features,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    return decoded


def _seeded() -> Any:
    torch.manual_seed(15)
    sam = new_segmenter()
    sam.prompt_encoder.mask_downscaling.requires_grad_(False)  # no earlier mask is ever given
    return sam


def train_segmenter(folder: Path, plan: Plan = PLAN) -> Iterator[Event]:
    """Trains or goes on; the state lies in `folder`."""
    sam = _seeded()
    yield from Fit(sam, plan, folder).run(lambda rng, batch: _losses(sam, rng, batch))


def trained_segmenter(folder: Path, plan: Plan = PLAN) -> Any:
    """The averaged weights so far."""
    sam = _seeded()
    Fit(sam, plan, folder).use_mean()
    return sam.eval()
