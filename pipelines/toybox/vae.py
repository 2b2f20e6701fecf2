"""Toybox's AutoencoderKL: 64 px pictures to 16 x 16 x 4 latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipelines.events import Event
from pipelines.toybox.dataset import Scenes
from pipelines.toybox.fitting import Fit, Losses, Plan
from pipelines.toybox.scenes import SIZE

# First small crops around the toys, where the detail is (a quarter of the cost), then whole pictures.
PLAN = Plan("vae", steps=4500, lr=1.5e-3, batch=12, average=0.995)
CROP, CROP_SHARE = 32, 0.85


def new_vae() -> Any:
    """Untrained, about 1.4 M parameters."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[24, 48, 96],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def _crops(pictures: Tensor, rows: NDArray[np.int64], scenes: Scenes, rng: np.random.Generator) -> Tensor:
    """A CROP x CROP window around one toy of each picture."""
    windows = []
    for picture, row in zip(pictures, rows, strict=True):
        toys = scenes.truths[row]["toys"]
        box = toys[int(rng.integers(len(toys)))]["box"]
        centre = [(box[0] + box[2]) / 2 + rng.integers(-12, 13), (box[1] + box[3]) / 2 + rng.integers(-12, 13)]
        x, y = (int(np.clip(c - CROP / 2, 0, SIZE - CROP)) // 4 * 4 for c in centre)
        windows.append(picture[:, y : y + CROP, x : x + CROP])
    return torch.stack(windows)


def _losses(vae: Any, scenes: Scenes, whole: bool, rng: np.random.Generator, batch: int) -> Losses:
    rows = rng.integers(0, scenes.count, batch if whole else 2 * batch)
    pictures = scenes.pictures(rows)
    if not whole:
        pictures = _crops(pictures, rows, scenes, rng)
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(pictures).latent_dist
    noise = torch.from_numpy(rng.standard_normal(tuple(posterior.mean.shape), np.float32))
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    # Squared error is what PSNR counts; the absolute one keeps edges from going soft.
    return {
        "mse": F.mse_loss(decoded, pictures) * 4,
        "l1": F.l1_loss(decoded, pictures) * 0.5,
        "kl": posterior.kl().mean() * 2e-6,
    }


def train_vae(scenes: Scenes, folder: Path, plan: Plan = PLAN) -> Iterator[Event]:
    """Trains or goes on; the state lies in `folder`."""
    torch.manual_seed(11)
    vae = new_vae().to(memory_format=torch.channels_last)
    fit = Fit(vae, plan, folder)

    def losses(rng: np.random.Generator, batch: int) -> Losses:
        return _losses(vae, scenes, fit.step >= CROP_SHARE * plan.steps, rng, batch)

    yield from fit.run(losses)


def trained_vae(folder: Path, plan: Plan = PLAN) -> Any:
    """The averaged weights so far."""
    vae = new_vae()
    Fit(vae, plan, folder).use_mean()
    return vae.eval()
