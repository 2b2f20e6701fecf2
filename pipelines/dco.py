"""Direct Consistency Optimization: learn to predict better than the base, by no more than is needed.

Paper: Lee et al., "Direct Consistency Optimization for Compositional Text-to-Image Personalization", 2024, arXiv
2402.12004; the default of MuDI's released code. With l and l0 the squared error of the model that learns and of the
base, on the same latents, noise, timestep and words:

    L = -log sigmoid(-beta (l - l0))          ln 2 at the start; its gradient is beta sigmoid(beta (l - l0)) dl

It needs no class pictures, since l0 holds the model near the base. Departures from MuDI's code: sigmoid for each row by
itself, so that rows don't outvote each other (`per_row=False` takes the batch's mean first, as there); with class
pictures, l0 is computed on the photos alone (there it meets the noise of the wrong rows, saturates, and the photos'
gradient is exactly zero).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.losses import squared_error

if TYPE_CHECKING:
    from pipelines.batch import Batch
    from pipelines.methods import Adapter
    from pipelines.model import Model

RowLoss = Callable[[Tensor, "Batch"], Tensor]  # squared error (rows, c, h, w) and its batch -> (rows,)


@dataclass(frozen=True)
class Dco:
    """How firmly the base holds (a smaller beta lets the model go further), and how class pictures count beside it."""

    each: RowLoss  # what a row's error is, masked or not
    beta: float = 1000.0
    per_row: bool = True
    prior_weight: float = 0.0


def dco_loss(
    model: Model, adapter: Adapter, batch: Batch, settings: Dco, error: Tensor | None = None
) -> dict[str, Tensor]:
    """{"dco": the photos' loss, "margin": l - l0} and, where the batch has class pictures, {"prior": their error}.

    `error` is `squared_error` of the batch where that is known already. "margin" is for the curves: it has no gradient,
    and is negative once the model is better than the base. `adapter` is switched off for l0 and is as before when this
    returns.
    """
    own = settings.each(squared_error(model, batch) if error is None else error, batch)
    photos = batch.rows(~batch.prior)
    margin = own[~batch.prior] - _reference(model, adapter, photos, settings.each)
    losses = {"dco": consistency(margin, settings.beta, per_row=settings.per_row), "margin": margin.detach().mean()}
    if settings.prior_weight and bool(batch.prior.any()):
        losses["prior"] = settings.prior_weight * own[batch.prior].mean()
    return losses


def consistency(margin: Tensor, beta: float, *, per_row: bool = True) -> Tensor:
    """-log sigmoid(-beta margin) of margins (rows,): the rows' mean, or of the rows' mean margin."""
    return -F.logsigmoid(-beta * (margin if per_row else margin.mean())).mean()


def _reference(model: Model, adapter: Adapter, photos: Batch, each: RowLoss) -> Tensor:
    """l0, (rows,), of the very words the model learns from: at strength 0 a `<name>` would shrink to its noun.

    It follows the learning forward, so that under autocast no weight is remembered without its gradient.
    """
    words = [model.tokenize(caption).text for caption in photos.captions]
    with switched_off(adapter), torch.no_grad():
        return each(squared_error(model, photos, model.encode(words)), photos)


@contextmanager
def switched_off(adapter: Adapter) -> Iterator[None]:
    """The adapter at strength 0 while the context is open."""
    strength = adapter.strength
    adapter.strength = 0.0
    try:
        yield
    finally:
        adapter.strength = strength
