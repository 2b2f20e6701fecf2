"""The benches of concepts run, leave the model alone, and a folded concept costs nothing."""

from __future__ import annotations

import pytest
import torch

from pipelines.benches import fused_generate, load_concept, svdiff_vs_lora
from pipelines.model import Model
from pipelines.weights import weights_of
from tests.tiny import tiny_model


@pytest.fixture
def model() -> Model:
    return tiny_model("sd1")


@pytest.mark.parametrize("bench", [svdiff_vs_lora, fused_generate, load_concept])
def test_measures_and_restores(bench: object, model: Model) -> None:
    before = {name: (module.weight, module.weight.clone()) for name, module in weights_of(model).items()}
    options = {"steps": 2} if bench is fused_generate else {}
    figures = bench.measure(model, runs=2, **options)  # type: ignore[attr-defined]
    assert figures["runs"] == 2 and 0 < figures["ratio"] < 10
    after = weights_of(model)
    assert before.keys() == after.keys() and not model.placeholders
    assert all(after[name].weight is weight and torch.equal(weight, copy) for name, (weight, copy) in before.items())
    assert all("forward" not in module.__dict__ for module in after.values())


def test_both_sides_train_the_same_layers(model: Model) -> None:
    changed = {
        name for name, module in weights_of(model).items() if name.startswith("unet.") and module.weight.ndim > 1
    }
    linear_or_conv = {
        f"unet.{name}"
        for name, module in model.unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert changed == linear_or_conv
