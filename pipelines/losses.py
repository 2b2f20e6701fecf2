"""The denoising loss: what a base should have predicted, inside the mask, beside its class pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipelines.noise import diffused

if TYPE_CHECKING:
    from pipelines.batch import Batch
    from pipelines.methods import Adapter
    from pipelines.model import Model
    from pipelines.params import TrainParams
    from pipelines.text import TextStates

LEAST_AREA = 16.0  # latent cells: a smaller mask doesn't make its few cells count without bound


def denoising_loss(
    model: Model, adapter: Adapter | None, batch: Batch, params: TrainParams, text: TextStates | None = None
) -> dict[str, Tensor]:
    """{"denoising": photos, "prior": prior_weight * class pictures}, each a mean over rows of |prediction - target|^2.

    The prior part is DreamBooth's (Ruiz et al. 2023, eq. 2) and is never masked. It is there only when the batch has
    class pictures. `adapter` is attached to `model` already; it stands here because losses of other methods use it.
    `text` stands for the captions' states where a method has its own.
    """
    error = squared_error(model, batch, text)
    masks = batch.masks if params.masked_loss else None
    each = masked_mean(error, masks, params.background_weight)
    losses = {"denoising": each[~batch.prior].mean()}
    if params.prior_weight and bool(batch.prior.any()):
        losses["prior"] = params.prior_weight * each[batch.prior].mean()
    return losses


def squared_error(model: Model, batch: Batch, text: TextStates | None = None) -> Tensor:
    """(prediction - target)^2 of the base with whatever is attached to it, (rows, c, h, w) fp32."""
    text = text or model.encode(batch.captions)
    noisy, target = diffused(model, batch.latents, batch.noise, batch.timesteps)
    sizes: dict[str, Any] = model.conditioning(text, batch.original_sizes, batch.crops, batch.target_sizes)
    states = text.states.to(model.dtype)
    predicted = model.unet(noisy.to(model.dtype), batch.timesteps, encoder_hidden_states=states, **sizes).sample
    return (predicted.float() - target) ** 2


def masked_mean(error: Tensor, masks: Tensor | None, background: float) -> Tensor:
    """The mean error of each row, (rows,): sum(m e) / (C max(sum m, 16)) with m = b + (1 - b) mask.

    Dividing by the mask's area makes a small subject learn as fast as a large one. A small `background` keeps the rest
    of the picture from drifting to haze. error: (rows, C, h, w); masks: (rows, 1, h, w) in [0, 1] or None.
    """
    if masks is None:
        return error.mean(dim=(1, 2, 3))
    weight = background + (1 - background) * masks
    area = weight.sum(dim=(1, 2, 3)).clamp(min=LEAST_AREA)
    return (error * weight).sum(dim=(1, 2, 3)) / (error.shape[1] * area)
