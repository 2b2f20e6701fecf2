"""A look at a concept while it is learned: a sample, where its word looks, how much of that is inside the mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipelines.attention.heatmap import inside
from pipelines.attention.probe import Step, probe_attention
from pipelines.attention.store import AttentionStore
from pipelines.events import Event, Heatmap, Snapshot
from pipelines.generate import Request, generate
from pipelines.noise import alphas, diffused, generator
from pipelines.tokens import find_word

if TYPE_CHECKING:
    from pipelines.data import Data
    from pipelines.model import Model

STEPS = 12
SCHEDULER = "dpmpp_2m"
NOISE = 0.4  # share of the timesteps at which attention on a photo is measured: shapes show, details don't


def look(model: Model, data: Data, step: int) -> Iterator[Event]:
    """Paint `sample_prompt` with whatever is attached to `model` now; the same noise every time.

    Yields a Snapshot("sample") with info {"step", "prompt", "seed"; "inside" where a photo has a mask}, and a Heatmap
    of each subject's word on it. Nothing of the run's own randomness is used up.
    """
    tokens, prompt = [subject.token for subject in data.subjects], sample_prompt(data)
    words = {token: find_word(model.tokenize(prompt), token) for token in tokens}
    store = AttentionStore(words, budget_mb=0)
    seed = data.seed % 2**31
    request = Request(prompt, seeds=(seed,), steps=STEPS, scheduler=SCHEDULER, preview_every=0)
    (image,) = [e.image for e in generate(model, request, probes=[store]) if isinstance(e, Snapshot)]
    info: dict[str, Any] = {"step": step, "prompt": prompt, "seed": seed}
    share = inside_share(model, data)
    yield Snapshot("sample", image, info=info if share is None else info | {"inside": share})
    for token in tokens:
        yield Heatmap(token, store.maps(token)[0], image, step)


def sample_prompt(data: Data) -> str:
    """What the method trains on where its settings say so ("a photo of a {}"), else "a photo of <name>"."""
    tokens = " and ".join(subject.token for subject in data.subjects)
    said = str(getattr(data.params, "prompt", ""))
    return said.replace("{}", tokens) if "{}" in said else f"a photo of {tokens}"


def inside_share(model: Model, data: Data) -> float | None:
    """How much of the subjects' words' attention lies inside the mask, on the first photo that has one; 0-1 or None."""
    source = next((source for source in data.sources if source.mask is not None), None)
    if source is None or source.mask is None:
        return None
    prompt = sample_prompt(data)
    read = model.tokenize(prompt)
    positions = sorted({at for subject in data.subjects for at in find_word(read, subject.token)})
    size = data.resolution
    store = AttentionStore({prompt: positions}, budget_mb=0)
    with torch.no_grad(), probe_attention(model.unet, store) as tap:
        moments = data.latents.moments(("look", 0), source.image[:size, :size])
        chance = torch.randn(moments.shape, generator=generator("look", data.seed))
        latents = data.latents.sample(moments, chance[0])[None].to(model.device)
        t = torch.tensor([int(NOISE * len(alphas(model)))], device=model.device)
        noisy, _ = diffused(model, latents, chance[1:].to(model.device), t)
        text = model.encode([prompt])
        sizes = model.conditioning(text, [source.original], [(0, 0)], [(size, size)])
        tap.at(Step(0, 1, float(t)))
        model.unet(noisy.to(model.dtype), t, encoder_hidden_states=text.states.to(model.dtype), **sizes)
    mask = source.mask[:size, :size]
    return inside(store.maps(prompt)[0], np.where(mask > 127, 255, 0).astype(np.uint8)) if mask.max() > 127 else None
