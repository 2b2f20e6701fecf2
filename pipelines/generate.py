"""generate(): the denoising loop, written out. Without concepts and probes it equals diffusers' own pipelines."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Preview, Progress, Snapshot
from pipelines.preview import rough_picture, steady_vae, to_uint8, to_vae
from pipelines.request import Request
from pipelines.schedulers import make_scheduler, step_options

if TYPE_CHECKING:
    from pipelines.attention.probe import Probe, Tap
    from pipelines.concept import Trained
    from pipelines.model import Model, TextStates

__all__ = ["Request", "Start", "decode", "denoise", "generate"]

Start = Callable[[Tensor, tuple[int, ...]], Tensor]  # noise (n, c, h, w) of unit variance, the seeds -> the same shape


@dataclass(frozen=True)
class Scene:
    """Everything the loop needs that is the same for all pictures of a request."""

    request: Request
    size: tuple[int, int]  # latents (height, width)
    text: TextStates  # one row with the prompt, preceded by one for the negative prompt under guidance
    start: Start | None = None  # what pictures begin as, instead of the seeds' own noise

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on (Ho and Salimans 2022)."""
        return self.request.guidance > 1


def generate(
    model: Model,
    request: Request,
    *,
    concepts: Sequence[tuple[Trained, float]] = (),
    probes: Sequence[Probe] = (),
    start: Start | None = None,
) -> Iterator[Event]:
    """Paint `request.prompt` once per seed, with concepts at their strengths and attention probes.

    `start(noise, seeds)` may give other first latents than each seed's noise (n, c, h, w): of unit variance, before the
    scheduler scales them, on the same device and of the same dtype.

    Yields Note, Progress, Preview, a Snapshot("picture") with info {"seed", "index", "width", "height"} for each
    picture, and Finished with the list of those infos. Closing the generator stops within one step; the model is then
    as it was before. Raises StudioError for what the model can't do.
    """
    request = sized(model, request)
    infos: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if concepts:
            from pipelines.attach import attached

            stack.enter_context(attached(model, concepts))
        scene = replace(_scene(model, request), start=start)
        yield from _cut_notes(scene)
        tap = None
        if probes:
            from pipelines.attention.probe import probe_attention

            tap = stack.enter_context(probe_attention(model.unet, *probes))
        for first in range(0, len(request.seeds), request.batch):
            latents = yield from denoise(model, scene, first, tap)
            for index, picture in _wanted(request, first, latents):
                info = {"seed": request.seeds[index], "index": index, "width": request.width, "height": request.height}
                infos.append(info)
                yield Snapshot("picture", to_uint8(decode(model, picture)[0]), info=info)
    yield Finished(infos)


def denoise(model: Model, scene: Scene, first: int = 0, tap: Tap | None = None) -> Generator[Event, None, Tensor]:
    """Paint one batch, the seeds from `first` on; yields Progress and Preview, returns latents (n, c, h, w)."""
    request = scene.request
    seeds = request.seeds[first : first + request.batch]
    scheduler = make_scheduler(request.scheduler, model.scheduler_config)
    scheduler.set_timesteps(request.steps, device=model.device)
    # one generator per picture, on the CPU: the same seed is the same picture on every device and in every batch
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = step_options(scheduler, generators)
    latents = _first(scene, _noise(model, scene, generators), seeds) * scheduler.init_noise_sigma
    inputs = _inputs(model, scene, len(seeds))
    clock = _Clock(request, first, len(scheduler.timesteps))
    for index, t in enumerate(scheduler.timesteps):
        if tap is not None:
            tap.at(_step(scene, index, len(scheduler.timesteps), t, len(seeds)))
        with torch.no_grad():  # never across a yield: the consumer would run without gradients too
            seen = scheduler.scale_model_input(latents, t)
            guess = _predict(model, scene, seen, t, inputs)
            latents = scheduler.step(guess, t, latents, **options, return_dict=False)[0].to(latents.dtype)
        yield clock.tick(index)
        if _preview_due(request, index):
            clean = _clean(model, scheduler, seen, guess, t)
            yield from _previews(model, scene, first, index, clean)
    return latents


def _predict(model: Model, scene: Scene, latents: Tensor, t: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The UNet's guess (n, c, h, w), guided: both prompts in one batch, the negative rows first."""
    if not scene.guided:
        guess: Tensor = model.unet(latents, t, **inputs, return_dict=False)[0]
        return guess
    negative, positive = model.unet(torch.cat([latents] * 2), t, **inputs, return_dict=False)[0].chunk(2)
    return negative + scene.request.guidance * (positive - negative)


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


def sized(model: Model, request: Request) -> Request:
    """The request checked, with its size filled in; StudioError for what no base, or not this one, can paint."""
    request.check()
    width, height = request.width or model.native_size, request.height or model.native_size
    model.latent_size(width, height)
    return replace(request, width=width, height=height)


def _scene(model: Model, request: Request) -> Scene:
    with torch.no_grad():
        text = model.encode([request.prompt])
        if request.guidance > 1:
            text = _stacked(_negative(model, request, text), text)
    return Scene(request, model.latent_size(request.width, request.height), text)


def _negative(model: Model, request: Request, text: TextStates) -> TextStates:
    """The states of the negative prompt; SDXL takes zeros where none is given, SD the empty prompt."""
    negative = model.encode([request.negative or ""])
    if request.negative is not None or not model.zero_negative or text.pooled is None:
        return negative
    return replace(negative, states=torch.zeros_like(text.states), pooled=torch.zeros_like(text.pooled))


def _stacked(first: TextStates, second: TextStates) -> TextStates:
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    return type(first)(torch.cat([first.states, second.states]), pooled, first.prompts + second.prompts)


def _inputs(model: Model, scene: Scene, count: int) -> dict[str, Any]:
    """What the UNet takes beside latents and time, for `count` pictures: rows of the negative prompt come first."""
    text, size = scene.text, (scene.request.height, scene.request.width)
    rows = replace(
        text,
        states=text.states.repeat_interleave(count, dim=0).to(model.dtype),
        pooled=None if text.pooled is None else text.pooled.repeat_interleave(count, dim=0).to(model.dtype),
    )
    return {"encoder_hidden_states": rows.states} | model.conditioning(rows, [size], [(0, 0)], [size])


def _noise(model: Model, scene: Scene, generators: list[torch.Generator]) -> Tensor:
    shape = (len(generators), model.unet.config.in_channels, *scene.size)
    return randn_tensor(shape, generator=generators, device=model.device, dtype=scene.text.states.dtype)


def _first(scene: Scene, noise: Tensor, seeds: tuple[int, ...]) -> Tensor:
    """What the pictures begin as, before the scheduler scales it."""
    if scene.start is None:
        return noise
    latents = scene.start(noise, seeds)
    if latents.shape != noise.shape:
        raise ValueError(f"start() turned {tuple(noise.shape)} into {tuple(latents.shape)}")
    return latents.to(noise)


def _step(scene: Scene, index: int, total: int, t: Tensor, count: int) -> Any:
    from pipelines.attention.probe import Step

    return Step(index, total, float(t), slice(count, 2 * count) if scene.guided else slice(0, count))


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


def _cut_notes(scene: Scene) -> Iterator[Note]:
    names = ("negative prompt", "prompt")[-len(scene.text.prompts) :]
    for name, read in zip(names, scene.text.prompts, strict=True):
        if read.truncated:
            yield Note(
                f"The {name} is longer than the {len(read.ids) - 2} tokens this base reads. Cut off: “{read.truncated}”"
            )


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
