"""Rough pictures of unfinished latents: one small matrix instead of the VAE's decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.model import Model

_CELLS = 16  # side of the pictures the map is fitted on
_PICTURES = 4
_maps: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def rough_picture(model: Model, latents: Tensor, size: tuple[int, int]) -> Picture:
    """Latents (c, h, w) as a picture of `size` (height, width): the best linear guess, smoothly enlarged."""
    matrix = latent_to_rgb(model)
    cells = latents.detach().float().cpu()
    colours = torch.einsum("chw,cr->rhw", cells, matrix[:-1]) + matrix[-1][:, None, None]
    large = functional.interpolate(colours[None], size=size, mode="bilinear", align_corners=False)[0]
    return to_uint8(large)


def latent_to_rgb(model: Model) -> Tensor:
    """(c + 1, 3): least squares from latent channels and 1 to colours in [0, 1].

    Fitted once per VAE on smooth random colour fields, so that it needs no table of known models.
    """
    if model.vae not in _maps:
        cell = model.scale_factor
        with torch.no_grad():
            random = torch.Generator().manual_seed(0)
            coarse = torch.rand(_PICTURES, 3, 5, 5, generator=random)
            pictures = functional.interpolate(coarse, size=_CELLS * cell, mode="bicubic").clamp(0, 1)
            latents = encode_pictures(model, pictures)
        ones = torch.ones(latents.shape[0] * _CELLS * _CELLS, 1)
        known = torch.cat([latents.permute(0, 2, 3, 1).flatten(0, 2), ones], dim=1)
        colours = functional.avg_pool2d(pictures, cell).permute(0, 2, 3, 1).flatten(0, 2)
        _maps[model.vae] = torch.linalg.lstsq(known, colours, driver="gelsd").solution  # a VAE may waste a channel
    return _maps[model.vae]


def encode_pictures(model: Model, pictures: Tensor) -> Tensor:
    """Pictures (n, 3, height, width) in [0, 1] -> the means of their latents (n, c, h, w), scaled, fp32 on the CPU."""
    with steady_vae(model) as vae:
        pixels = (2 * pictures - 1).to(vae.device, vae.dtype)
        means = torch.cat([vae.encode(one).latent_dist.mean for one in pixels.split(1)])
    return from_vae(model, means).float().cpu()


def to_vae(model: Model, latents: Tensor) -> Tensor:
    """The UNet's latents (n, c, h, w) in the VAE's own scale; some SDXL VAEs normalise each channel."""
    factor, shift = model.vae.config.scaling_factor, _channels(model, latents)
    return latents / factor if shift is None else latents * shift[1] / factor + shift[0]


def from_vae(model: Model, latents: Tensor) -> Tensor:
    """The inverse of `to_vae`."""
    factor, shift = model.vae.config.scaling_factor, _channels(model, latents)
    return latents * factor if shift is None else (latents - shift[0]) * factor / shift[1]


def _channels(model: Model, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """(mean, std) of the VAE's channels, (1, c, 1, 1) each, where its configuration has them."""
    config = model.vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return None
    return torch.tensor(mean).view(1, -1, 1, 1).to(latents), torch.tensor(std).view(1, -1, 1, 1).to(latents)


@contextmanager
def steady_vae(model: Model) -> Iterator[Any]:
    """The VAE; for the time of the context in fp32 if it is one of SDXL's that overflow in fp16.

    Only SDXL's `force_upcast` means something: the VAEs of SD 1 and 2 have it by default, and diffusers ignores it.
    """
    upcast = (
        model.kind == "sdxl"
        and model.vae.dtype == torch.float16
        and bool(getattr(model.vae.config, "force_upcast", False))
    )
    if not upcast:
        yield model.vae
        return
    try:
        yield nn.Module.to(model.vae, torch.float32)
    finally:
        nn.Module.to(model.vae, torch.float16)  # exact: every value came from fp16


def to_uint8(pixels: Tensor) -> Picture:
    """(3, height, width) in [0, 1] -> (height, width, 3) in 0-255, rounded as diffusers does."""
    rounded = (pixels.clamp(0, 1).permute(1, 2, 0).cpu().float().numpy() * 255).round()
    return np.ascontiguousarray(rounded.astype(np.uint8))
