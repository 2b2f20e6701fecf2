"""A training step with remembered latents and text states ÷ one that asks the VAE and the text encoder each time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.bench import Figures, compare
from pipelines.concept import Subject
from pipelines.data import Photo, prepare
from pipelines.events import Progress
from pipelines.methods import svdiff
from pipelines.train import train

if TYPE_CHECKING:
    from pipelines.model import Model

SUBJECT = Subject("<my-cat>", "cat")
PHOTOS = 2


def measure(model: Model, batch: int = 2, runs: int = 8) -> Figures:
    """Whole steps of the training loop (SVDiff, text encoder frozen), on photos of the base's own size."""
    with ExitStack() as stack:
        cached, fresh = (stack.enter_context(closing(_steps(model, batch, remember))) for remember in (True, False))
        return compare(_next(cached), _next(fresh), runs, device=model.device)


def _steps(model: Model, batch: int, remember: bool) -> Generator[Progress, None, None]:
    """An endless run on a copy of the model, one Progress a step."""
    own = replace(model, unet=copy.deepcopy(model.unet), placeholders={}, cache_text=remember)
    params = svdiff.Params(
        steps=100_000, batch_size=batch, prior_weight=0, train_text_encoder=False, sample_every=0, checkpoint_every=0
    )
    data = prepare(own, _photos(model.native_size), params, [SUBJECT], seed=0)
    if not remember:
        data.latents.budget = 0
    with closing(train(own, svdiff, data, params, seed=0)) as events:  # type: ignore[arg-type]
        yield from (event for event in events if isinstance(event, Progress))


def _next(steps: Iterator[Progress]) -> Callable[[], Progress]:
    return lambda: next(steps)


def _photos(side: int) -> list[Photo]:
    chance = np.random.default_rng(0)
    pictures = [chance.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(PHOTOS)]
    return [Photo(Path(f"{number}.png"), picture) for number, picture in enumerate(pictures)]
