"""The bench of what training remembers runs, leaves the model alone, and what it compares differs as it says."""

from __future__ import annotations

import torch

from pipelines.benches import cached_step
from tests.tiny import tiny_model


def test_measures_and_leaves_the_model_alone() -> None:
    model = tiny_model("sd1")
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    figures = cached_step.measure(model, batch=1, runs=2)
    assert figures["runs"] == 2 and 0 < figures["ratio"] < 10 and not model.placeholders and model.cache_text
    assert all(torch.equal(before[name], value) for name, value in model.unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
