"""Photos as the VAE sees them, each encoded once: mean and log variance are remembered, samples drawn from them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.model import Model

BUDGET = 256 * 2**20  # bytes of moments kept; a 512 px crop takes 128 KiB


class Latents:
    """The encoder of one run. Pictures go through it one by one, so a remembered one equals a fresh one bit for bit."""

    def __init__(self, model: Model, budget: int = BUDGET) -> None:
        self.budget = budget
        self.encoded = 0  # how often the VAE ran
        self._model = model
        self._kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._bytes = 0
        self._own_vae: Any = None

    def moments(self, key: tuple[Any, ...] | None, picture: Picture) -> Tensor:
        """Mean and log variance of `picture` (height, width, 3), which `key` names: (2, c, h, w) fp32 on the CPU.

        Without a key it isn't remembered.
        """
        if key is None:
            return self._encode(picture)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._encode(picture)
        size = found.numel() * found.element_size()
        if size <= self.budget:
            self._kept[key] = found
            self._bytes += size
            while self._bytes > self.budget:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.numel() * dropped.element_size()
        return found

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A scaled draw from the posterior (Kingma and Welling 2014, eq. 10), (c, h, w) fp32."""
        mean, logvar = moments
        return (mean + (0.5 * logvar).exp() * noise) * self._model.vae.config.scaling_factor

    def _encode(self, picture: Picture) -> Tensor:
        self.encoded += 1
        vae = self._vae()
        pixels = torch.from_numpy(np.array(picture)).to(vae.device).permute(2, 0, 1)[None]
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.logvar]).float().cpu()

    def _vae(self) -> Any:
        """SDXL's VAE overflows in fp16 and says so (force_upcast): such a one is copied in fp32, never changed."""
        vae = self._model.vae
        if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
            return vae
        if self._own_vae is None:
            self._own_vae = copy.deepcopy(vae).float()
        return self._own_vae


def small_mask(mask: NDArray[np.uint8], cell: int) -> Tensor:
    """A mask (height, width), 255 = subject, area-averaged to latent cells: (1, h, w) fp32 in [0, 1]."""
    height, width = mask.shape
    blocks = torch.from_numpy(np.array(mask)).float().view(height // cell, cell, width // cell, cell)
    return blocks.mean(dim=(1, 3))[None] / 255
