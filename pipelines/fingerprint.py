"""Identities read off the weights: of a base model, which a concept must fit, and of a concept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipelines.concept import Trained

SAMPLES = 512  # values taken from every tensor, evenly spaced
_WRAPPERS = ("text_model.",)  # transformers 4 wraps the text tower in it, transformers 5 does not


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """16 hex digits that name the weights of `modules` (the UNet, then the text encoders).

    The same for a folder and a single file, for fp32 and fp16 storage, and on every device: names are freed of
    wrappers and sorted, and the values are compared as fp16, to which a stored fp16 file and its fp32 original round
    alike. Weights stored as bf16 are other numbers and get another fingerprint. Up to `SAMPLES` values of every
    tensor are read, so that it takes about a second for SDXL; any fine-tuned or merged base differs in nearly all.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in sorted((_plain(name), weight) for name, weight in module.named_parameters()):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(_sample(weight))
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


@torch.no_grad()
def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // SAMPLES)][: 2 * SAMPLES]
    halves = (values.float().cpu().to(torch.float16) + 0.0).numpy()  # + 0.0: minus zero becomes zero
    return bytes(halves.astype("<f2").tobytes())


def content_hash(trained: Trained) -> str:
    """64 hex digits over what a concept does: not its name, its token (both may be changed), its log or its date."""
    concept = trained.concept
    facts = [concept.method, concept.params, [subject.noun for subject in concept.subjects]]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(trained.tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
