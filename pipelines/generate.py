"""generate(): the denoising loop, written out. Without concepts and probes it equals diffusers' own pipelines."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Preview, Progress, Snapshot
from pipelines.preview import rough_picture, steady_vae, to_uint8, to_vae
from pipelines.request import Request
from pipelines.sampling import Sampler
from pipelines.scene import Scene, Start, cut_notes, first_noise, make_scene, sized, unet_inputs

if TYPE_CHECKING:
    from pipelines.attention.probe import Probe, Tap
    from pipelines.concept import Trained
    from pipelines.model import Model
    from pipelines.regions import Stage

__all__ = ["Request", "Start", "decode", "denoise", "generate", "paint", "sized"]


def generate(
    model: Model,
    request: Request,
    *,
    concepts: Sequence[tuple[Trained, float]] = (),
    probes: Sequence[Probe] = (),
    start: Start | None = None,
) -> Iterator[Event]:
    """Paint `request.prompt` once per seed, with concepts at their strengths and attention probes.

    `start(noise, seeds)` may give, instead of the request's own start noise, other first latents than each seed's noise
    (n, c, h, w): of unit variance, before the scheduler scales them, on the same device and of the same dtype.

    Yields Note, Progress, Preview, a Snapshot("picture") with info {"seed", "index", "width", "height"} for each
    picture, and Finished with the list of those infos. Closing the generator stops within one step; the model is then
    as it was before. Raises StudioError for what the model can't do.
    """
    from pipelines.regions import staged

    request = sized(model, request)
    with staged(model, request, concepts) as stage:
        yield from paint(stage, request, probes=probes, start=start)


def paint(
    stage: Stage, request: Request, *, probes: Sequence[Probe] = (), start: Start | None = None
) -> Iterator[Event]:
    """`generate` with the concepts already on; `request` has its size (see `sized`)."""
    model, infos = stage.model, []
    scene = make_scene(model, request, start, stage.encode)
    yield from cut_notes(scene)
    yield from (Note(text) for text in stage.notes(scene))
    guides = stage.probes(scene)
    for first in range(0, len(request.seeds), request.batch):
        count = len(request.seeds[first : first + request.batch])
        stage.place(scene, count)
        if stage.searching:
            from pipelines.first_pass import find_cells

            cells = yield from find_cells(scene, stage, first)
            stage.place(scene, count, cells)
        with ExitStack() as stack:
            tap = None
            if guides or probes:
                from pipelines.attention.probe import probe_attention

                tap = stack.enter_context(probe_attention(model.unet, *guides, *probes))
            latents = yield from denoise(model, scene, first, tap)
        for index, picture in _wanted(request, first, latents):
            info = {"seed": request.seeds[index], "index": index, "width": request.width, "height": request.height}
            infos.append(info)
            yield Snapshot("picture", to_uint8(decode(model, picture)[0]), info=info)
    yield Finished(infos)


def denoise(
    model: Model, scene: Scene, first: int = 0, tap: Tap | None = None, until: int | None = None
) -> Generator[Event, None, Tensor]:
    """Paint one batch, the seeds from `first` on; yields Progress and Preview, returns latents (n, c, h, w).

    With `until` only the first so many steps; what is returned is then what the UNet thinks the picture will be.
    """
    request = scene.request
    seeds = request.seeds[first : first + request.batch]
    # one generator per picture, on the CPU: the same seed is the same picture on every device and in every batch
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler = Sampler(request, model.scheduler_config, model.device, generators)
    latents = first_noise(model, scene, generators, seeds) * sampler.scheduler.init_noise_sigma
    inputs = unet_inputs(model, scene, len(seeds))
    clock = _Clock(request, first, len(sampler.timesteps))
    for index, t in enumerate(sampler.timesteps[:until]):
        if tap is not None:  # once a step, also where it is taken again: what follows attention sees each step once
            tap.at(_step(scene, index, len(sampler.timesteps), t, len(seeds)))
        guidance = sampler.guidance(request.scale, index, request.ramp)
        with torch.no_grad():  # never across a yield: the consumer would run without gradients too
            for turn in range(_turns(request, index)):
                latents = sampler.back(latents, index) if turn else sampler.mark(latents)
                seen = sampler.scaled(latents, t)
                guess = _predict(model, scene, seen, t, inputs, guidance)
                latents = sampler.step(guess, t, latents)
        yield clock.tick(index)
        if _preview_due(request, index):
            clean = _clean(model, sampler.scheduler, seen, guess, t)
            yield from _previews(model, scene, first, index, clean)
    return latents if until is None else _clean(model, sampler.scheduler, seen, guess, t).to(latents.dtype)


def _turns(request: Request, index: int) -> int:
    """How often a step is taken: again in guided steps, or everywhere without a layout."""
    return 1 + request.recur * (request.layout is None or request.layout.guides(index))


def _predict(model: Model, scene: Scene, latents: Tensor, t: Tensor, inputs: dict[str, Any], guidance: float) -> Tensor:
    """The UNet's guess (n, c, h, w), guided: both prompts in one batch, the negative rows first."""
    if not scene.guided:
        guess: Tensor = model.unet(latents, t, **inputs, return_dict=False)[0]
        return guess
    negative, positive = model.unet(torch.cat([latents] * 2), t, **inputs, return_dict=False)[0].chunk(2)
    return negative + guidance * (positive - negative)


@torch.no_grad()
def decode(model: Model, latents: Tensor) -> Tensor:
    """Latents (n, c, h, w) -> pictures (n, 3, height, width) in [0, 1], fp32. StudioError when they overflowed."""
    with steady_vae(model) as vae:
        wanted = to_vae(model, latents.to(vae.dtype))
        pictures = torch.cat([vae.decode(one, return_dict=False)[0] for one in wanted.split(1)]).float()
    if not torch.isfinite(pictures).all():
        raise StudioError(
            f"The picture overflowed in {str(model.dtype).removeprefix('torch.')}. "
            "Load the base in float32 or bfloat16, or lower the guidance or a concept's strength."
        )
    return (pictures / 2 + 0.5).clamp(0, 1)


def _step(scene: Scene, index: int, total: int, t: Tensor, count: int) -> Any:
    from pipelines.attention.probe import Step

    return Step(index, total, float(t), scene.guided_rows(count))


def _clean(model: Model, scheduler: Any, seen: Tensor, guess: Tensor, t: Tensor) -> Tensor:
    """The latents without their noise, as far as the UNet knows at time t (Ho et al. 2020, eq. 15; v: Salimans 2022).

    `seen` is what the UNet saw: every scheduler scales that to unit variance.
    """
    kept = scheduler.alphas_cumprod[min(round(float(t)), len(scheduler.alphas_cumprod) - 1)].item()
    if model.prediction_type == "v_prediction":
        return seen * kept**0.5 - guess * (1 - kept) ** 0.5
    return (seen - guess * (1 - kept) ** 0.5) / kept**0.5


def _preview_due(request: Request, index: int) -> bool:
    return request.preview_every > 0 and (index + 1) % request.preview_every == 0 and index + 1 < request.steps


def _previews(model: Model, scene: Scene, first: int, index: int, clean: Tensor) -> Iterator[Preview]:
    request = scene.request
    for row, latents in enumerate(clean):
        picture = rough_picture(model, latents, (request.height, request.width))
        yield Preview(picture, first + row, index + 1, request.steps)


def _wanted(request: Request, first: int, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
    for index, picture in enumerate(latents.split(1), start=first):
        if not request.keep or request.seeds[index] in request.keep:
            yield index, picture


class _Clock:
    """Progress over all pictures of a request, with the time that is left."""

    def __init__(self, request: Request, first: int, steps: int) -> None:
        batches = -(-len(request.seeds) // request.batch)
        self.done, self.steps, self.total = first // request.batch * steps, steps, batches * steps
        self.started = time.monotonic()

    def tick(self, index: int) -> Progress:
        """One step of this batch is done."""
        pace = (time.monotonic() - self.started) / (index + 1)
        step = self.done + index + 1
        return Progress("generate", step, self.total, eta=pace * (self.total - step))
