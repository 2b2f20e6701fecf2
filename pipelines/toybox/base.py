"""Toybox's base model: a UNet over the VAE's latents, led by the frozen text tower of Toybox's CLIP.

It predicts v, not epsilon: at high noise, where SD's schedule decides colours, the epsilon target is nearly the input
itself and carries almost nothing of the words, so colours took several times as many steps to follow the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from pipelines.events import Event, Progress
from pipelines.toybox.dataset import CHUNK, Scenes
from pipelines.toybox.fitting import Fit, Losses, Plan
from pipelines.toybox.words import Wording

PLAN = Plan("base", steps=16000, lr=6e-4, batch=32, average=0.9993, warmup=300, cooldown=0.3)
DROP = 0.1  # share of pictures without words, for classifier-free guidance
SHARES = (0.15, 0.72, 0.13)  # of the scenes drawn: with one, two, more toys
FOCUS, FOCUSED = (650, 150), 0.7  # timesteps at which words decide most (mean, deviation); the share drawn there


def new_unet() -> Any:
    """Untrained, 11.5 M parameters; words are read at 16 x 16 and 8 x 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=[96, 160, 192],
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> Any:
    """SD's schedule (scaled linear, 0.00085 to 0.012, 1000 steps), v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def encode_latents(vae: Any, scenes: Scenes, path: Path) -> Iterator[Event]:
    """Means of all scenes' latents, unscaled, (count, 4, 16, 16) fp16 in one file; a part a step."""
    vae, parts = vae.to(memory_format=torch.channels_last), []
    for start in range(0, scenes.count, CHUNK):
        part = path.with_name(f"{path.stem}-{start}.npy")
        if not part.exists():
            rows = np.arange(start, min(start + CHUNK, scenes.count))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                pieces = [scenes.pictures(piece) for piece in np.array_split(rows, 20)]
                means = [vae.encode(piece.to(memory_format=torch.channels_last)).latent_dist.mean for piece in pieces]
            np.save(part, torch.cat(means).half().numpy())
        parts.append(np.load(part))
        yield Progress("latents", start + len(parts[-1]), scenes.count)
    np.save(path, np.concatenate(parts))


def text_states(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """(n, 77, width): the encoder's final states, padded as at generation."""
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states: Tensor = encoder(input_ids=ids).last_hidden_state
    return states


def timesteps(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Mostly from where the words decide what is where, the rest from everywhere."""
    everywhere = rng.uniform(0, 1000, count)
    focused = rng.normal(*FOCUS, count)
    return np.where(rng.random(count) < FOCUSED, focused, everywhere).clip(0, 999).astype(np.int64)


class Painter:
    """What a training step needs: the UNet, frozen text encoder, cached latents."""

    def __init__(self, scenes: Scenes, latents: Path, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        torch.manual_seed(13)
        self.unet = new_unet().to(memory_format=torch.channels_last)
        self.unet.set_attn_processor(AttnProcessor())  # at these sizes the fused kernel's backward is the slower one
        self.scenes, self.encoder, self.tokenizer = scenes, encoder, tokenizer
        self.latents = np.load(latents)
        self.scale = float(1 / self.latents[:2000].astype(np.float32).std())
        self.noise = DDPMScheduler.from_config(new_scheduler().config)
        counts = np.array([len(truth["toys"]) for truth in scenes.truths])
        self.by_count = [np.flatnonzero(found) for found in (counts == 1, counts == 2, counts > 2)]

    def _rows(self, rng: np.random.Generator, batch: int) -> NDArray[np.int64]:
        """Scenes of one, two and more toys by their SHARES; which word goes with which toy is learned from several."""
        kinds = [(rows, share) for rows, share in zip(self.by_count, SHARES, strict=True) if len(rows)]
        total = sum(share for _, share in kinds)
        drawn = rng.choice(len(kinds), batch, p=[share / total for _, share in kinds])
        return np.array([rng.choice(kinds[kind][0]) for kind in drawn], dtype=np.int64)

    def losses(self, rng: np.random.Generator, batch: int) -> Losses:
        """Mean squared error of v."""
        rows = self._rows(rng, batch)
        clean = torch.from_numpy(self.latents[rows].astype(np.float32)) * self.scale
        noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), np.float32))
        t = torch.from_numpy(timesteps(rng, batch))
        prompts = [c.text if rng.random() > DROP else "" for c in self.scenes.captions(rows, rng, Wording())]
        states = text_states(self.encoder, self.tokenizer, prompts)
        noisy = self.noise.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
        predicted = self.unet(noisy, t, encoder_hidden_states=states).sample.float()
        return {"v": F.mse_loss(predicted, self.noise.get_velocity(clean, noise, t))}


def train_base(painter: Painter, folder: Path, plan: Plan = PLAN) -> Iterator[Event]:
    """Trains or goes on; the state lies in `folder`."""
    yield from Fit(painter.unet, plan, folder).run(painter.losses)


def trained_unet(folder: Path, plan: Plan = PLAN) -> Any:
    """The averaged weights so far."""
    unet = new_unet()
    Fit(unet, plan, folder).use_mean()
    return unet.eval()
