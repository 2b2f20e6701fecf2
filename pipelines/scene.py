"""What the denoising loop needs that is the same for all pictures of a request: size, text states, first noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pipelines.events import Note
from pipelines.placed import add_placed
from pipelines.request import Request, usual_guidance

if TYPE_CHECKING:
    from pipelines.model import Model, TextStates, Tokenized

Start = Callable[[Tensor, tuple[int, ...]], Tensor]  # noise (n, c, h, w) of unit variance, the seeds -> the same shape
Encode = Callable[[Sequence[str]], "TextStates"]


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
        return self.request.scale > 1

    @property
    def prompt(self) -> Tokenized:
        """The prompt as it was read."""
        return self.text.prompts[-1]

    def guided_rows(self, count: int) -> slice:
        """The rows of a batch of `count` pictures that belong to the prompt."""
        return slice(count, 2 * count) if self.guided else slice(0, count)


def sized(model: Model, request: Request) -> Request:
    """The request checked, size and guidance filled in; StudioError for what no base, or not this one, can paint."""
    request.check()
    width, height = request.width or model.native_size, request.height or model.native_size
    model.latent_size(width, height)
    guidance = usual_guidance(model.kind) if request.guidance is None else request.guidance
    return replace(request, width=width, height=height, guidance=guidance)


def make_scene(model: Model, request: Request, start: Start | None = None, encode: Encode | None = None) -> Scene:
    """Read the prompts; `encode` stands in for the model's own, `start` for the request's own start noise."""
    if start is None and request.start is not None:
        from pipelines.start_noise import start_of

        start = start_of(model, request)
    with torch.no_grad():
        text = add_placed((encode or model.encode)([request.prompt]), request.placed)
        if request.scale > 1:
            text = _stacked(_negative(model, request, text), text)
        if request.trim:
            text = _trimmed(text)
    return Scene(request, model.latent_size(request.width, request.height), text, start)


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


def _trimmed(text: TextStates) -> TextStates:
    """Without the padding that no prompt needs: start, words and end remain. Text encoders read from left to right, so
    the states that stay are those of the short text. (Multiple Concept Personalization counts words instead of tokens,
    which loses the last ones.)
    """
    ends = [
        max((at for at, (first, last) in enumerate(one.offsets) if first < last), default=0) for one in text.prompts
    ]
    return replace(text, states=text.states[:, : max(ends) + 2])


def unet_inputs(model: Model, scene: Scene, count: int) -> dict[str, Any]:
    """What the UNet takes beside latents and time, for `count` pictures: rows of the negative prompt come first."""
    text, size = scene.text, (scene.request.height, scene.request.width)
    rows = replace(
        text,
        states=text.states.repeat_interleave(count, dim=0).to(model.dtype),
        pooled=None if text.pooled is None else text.pooled.repeat_interleave(count, dim=0).to(model.dtype),
    )
    return {"encoder_hidden_states": rows.states} | model.conditioning(rows, [size], [(0, 0)], [size])


def first_noise(model: Model, scene: Scene, generators: list[torch.Generator], seeds: tuple[int, ...]) -> Tensor:
    """What the pictures begin as (n, c, h, w), before the scheduler scales it."""
    shape = (len(generators), model.unet.config.in_channels, *scene.size)
    noise = randn_tensor(shape, generator=generators, device=model.device, dtype=scene.text.states.dtype)
    if scene.start is None:
        return noise
    latents = scene.start(noise, seeds)
    if latents.shape != noise.shape:
        raise ValueError(f"start() turned {tuple(noise.shape)} into {tuple(latents.shape)}")
    return latents.to(noise)


def cut_notes(scene: Scene) -> Iterator[Note]:
    """What of the prompts was too long to be read."""
    names = ("negative prompt", "prompt")[-len(scene.text.prompts) :]
    for name, read in zip(names, scene.text.prompts, strict=True):
        if read.truncated:
            yield Note(
                f"The {name} is longer than the {len(read.ids) - 2} tokens this base reads. Cut off: “{read.truncated}”"
            )
