"""A diffusers scheduler whose steps can be taken again, and what depends on its noise levels.

Self-recurrence (Bansal et al. 2023, arXiv:2302.07121, section 3.3; used by Cones 2 in its guided steps): after a step
from level i to i + 1 the latents are noised back to level i and the step is taken once more,

    z_i = z_{i+1} + sqrt(sigma_i^2 - sigma_{i+1}^2) n            where latents carry sigma n on top of the picture,
    z_i = sqrt(r) z_{i+1} + sqrt(1 - r) n,  r = a_i / a_{i+1}    where their variance stays 1 (a = 1 / (1 + sigma^2)).

Guidance ramp (Multiple Concept Personalization): w_i = w (1 + sigma_i / sigma_0), twice the guidance at first.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.schedulers import make_scheduler, step_options

if TYPE_CHECKING:
    from pipelines.request import Request


class Sampler:
    """One run of a scheduler over a batch of pictures. `generators`: one a picture, on the CPU."""

    def __init__(
        self, request: Request, config: dict[str, Any], device: torch.device, generators: list[torch.Generator]
    ) -> None:
        self.scheduler = make_scheduler(request.scheduler, config)
        self.scheduler.set_timesteps(request.steps, device=device)
        self._repeats = request.recur > 0
        self._generators = generators
        self._options = step_options(self.scheduler, generators)
        if self._repeats and "order" in inspect.signature(self.scheduler.step).parameters:
            self._options["order"] = 1  # past slopes belong to other noise; Cones 2 calls LMS so as well
        self._before: Any = None

    @property
    def timesteps(self) -> Tensor:
        """The model's timesteps, from the noisiest."""
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def scaled(self, latents: Tensor, t: Tensor) -> Tensor:
        """Latents as the UNet sees them, of unit variance."""
        seen: Tensor = self.scheduler.scale_model_input(latents, t)
        return seen

    def step(self, guess: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) at the next level."""
        moved: Tensor = self.scheduler.step(guess, t, latents, **self._options, return_dict=False)[0]
        return moved.to(latents.dtype)

    def mark(self, latents: Tensor) -> Tensor:
        """Note the scheduler as it is, so that `back` can return to this step: most count the steps they take."""
        if self._repeats:
            self._before = copy.deepcopy(self.scheduler)
        return latents

    def back(self, latents: Tensor, index: int) -> Tensor:
        """Latents noised from level `index` + 1 to level `index`, with the scheduler as it was at `mark`."""
        self.scheduler = copy.deepcopy(self._before)
        high, low = self.sigma(index), self.sigma(index + 1)
        noise = self._noise(latents)
        if float(self.scheduler.init_noise_sigma) > 1:  # noise is put on top
            return latents + max(high**2 - low**2, 0.0) ** 0.5 * noise
        ratio = min((1 + low**2) / (1 + high**2), 1.0)
        return ratio**0.5 * latents + (1 - ratio) ** 0.5 * noise

    def sigma(self, index: int) -> float:
        """The noise in units of the picture's scale at a level: 0 = the first step's, one more than steps."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigmas is not None:
            return float(sigmas[index])
        last = index >= len(self.timesteps)
        kept = float(self.scheduler.final_alpha_cumprod if last else self._kept(self.timesteps[index]))
        return float(((1 - kept) / kept) ** 0.5)

    def guidance(self, scale: float, index: int, ramp: bool) -> float:
        """The guidance of a step; with the ramp it falls from twice `scale` to about `scale`."""
        return scale * (1 + self.sigma(index) / self.sigma(0)) if ramp else scale

    def _kept(self, t: Tensor) -> Tensor:
        kept: Tensor = self.scheduler.alphas_cumprod[int(t)]
        return kept

    def _noise(self, latents: Tensor) -> Tensor:
        """Each picture's own next draw."""
        shape = latents.shape[1:]
        drawn = [torch.randn(shape, generator=one, dtype=latents.dtype) for one in self._generators]
        return torch.stack(drawn).to(latents.device)
