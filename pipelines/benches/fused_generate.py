"""A picture with a concept on ÷ the same picture of the base alone. Folded into the weights, it should cost nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pipelines.attach import attached
from pipelines.bench import Figures, compare
from pipelines.concept import Concept, Subject, Trained
from pipelines.generate import generate
from pipelines.methods import svdiff
from pipelines.request import Request

if TYPE_CHECKING:
    from pipelines.model import Model

SUBJECT = Subject("<my-cat>", "cat")


def measure(model: Model, steps: int = 25, runs: int = 8) -> Figures:
    """Whole pictures at the base's own size; the concept changes every layer and is on before the clock starts."""
    with_concept = replace(
        model,
        unet=copy.deepcopy(model.unet),
        text_encoders=tuple(copy.deepcopy(encoder) for encoder in model.text_encoders),
        placeholders={},
    )
    request = Request("a photo of a cat in the snow", steps=steps, preview_every=0)
    named = replace(request, prompt="a photo of a <my-cat> in the snow")
    with attached(with_concept, [(some_concept(model), 1.0)]):
        return compare(
            lambda: list(generate(with_concept, named)),
            lambda: list(generate(model, request)),
            runs,
            device=model.device,
        )


def some_concept(model: Model) -> Trained:
    """An SVDiff concept that moves every singular value of every layer a little."""
    params, chance = svdiff.Params(), torch.Generator().manual_seed(0)
    with svdiff.attach(model, params, [SUBJECT]) as adapter:
        tensors = {name: 1e-3 * torch.randn(t.shape, generator=chance) for name, t in adapter.tensors().items()}
    base = {"id": model.id, "fingerprint": model.fingerprint}
    return Trained(Concept("my-cat", (SUBJECT,), "svdiff", base, params.model_dump(mode="json")), tensors)
