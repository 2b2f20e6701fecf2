"""Concepts of several methods on one model, refused where they don't belong."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.attach import attached
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.methods import residual, svdiff
from pipelines.model import Model
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def shifted(model: Model, token: str, noun: str, seed: int, **settings: Any) -> Trained:
    """An SVDiff concept with random shifts."""
    params, subject = svdiff.Params(**settings), Subject(token, noun)
    with svdiff.attach(model, params, [subject]) as adapter:
        chance = torch.Generator().manual_seed(seed)
        tensors = {
            name: 0.2 * torch.randn(values.shape, generator=chance) for name, values in adapter.tensors().items()
        }
    base = {"id": model.id, "fingerprint": model.fingerprint}
    return Trained(Concept(token.strip("<>"), (subject,), "svdiff", base, params.model_dump()), tensors)


def moved(model: Model) -> Trained:
    """A residual for a house."""
    rows = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    params = residual.Params()
    base = {"id": model.id, "fingerprint": model.fingerprint}
    concept = Concept("my-house", (Subject("<my-house>", "house"),), "residual", base, params.model_dump(mode="json"))
    return Trained(concept, {"residual": rows})


@torch.no_grad()
def output(model: Model, prompt: str) -> Tensor:
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    result: Tensor = model.unet(noise, torch.tensor([300]), model.encode([prompt]).states).sample
    return result


def test_any_methods_in_any_order(model: Model) -> None:
    before = output(model, "a cat")
    concepts = [
        (shifted(model, "<my-cat>", "cat", 1), 1.0),
        (shifted(model, "<my-dog>", "dog", 2, mode_1d="element"), 0.6),
        (moved(model), 0.8),
    ]
    seen = []
    for order in permutations(concepts):
        with attached(model, order) as adapters:
            assert [adapter.strength for adapter in adapters] == [strength for _, strength in order]
            seen.append(output(model, "a <my-cat> and a <my-dog> by <my-house>"))
    assert all(torch.allclose(seen[0], other, atol=1e-4) for other in seen)
    assert not torch.allclose(seen[0], before, atol=1e-2)
    assert torch.equal(before, output(model, "a cat")) and not model.placeholders


def test_strength_moves_while_attached(model: Model) -> None:
    cat = shifted(model, "<my-cat>", "cat", 1)
    before = output(model, "a photo of a cat")
    with attached(model, [(cat, 1.0)]) as (adapter,):
        full = output(model, "a photo of a <my-cat>")
        adapter.strength = 0.0
        assert torch.equal(before, output(model, "a photo of a <my-cat>"))
        adapter.strength = 1.0
        assert torch.equal(full, output(model, "a photo of a <my-cat>"))
        adapter.load({name: torch.zeros_like(values) for name, values in cat.tensors.items()})
        assert torch.equal(before, output(model, "a photo of a cat"))


def test_another_base_is_refused_and_an_unknown_one_tried(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    cat = shifted(model, "<my-cat>", "cat", 1)
    foreign = replace(cat, concept=replace(cat.concept, base_model={"id": "elsewhere", "fingerprint": "0123456789"}))
    with pytest.raises(StudioError, match="elsewhere"), attached(model, [(foreign, 1.0)]):
        pass
    unknown = replace(cat, concept=replace(cat.concept, base_model={"id": "", "fingerprint": ""}))
    with caplog.at_level(logging.WARNING), attached(model, [(unknown, 1.0)]):
        assert "my-cat" in caplog.text


def test_a_failure_half_way_leaves_nothing_on(model: Model) -> None:
    before = output(model, "a cat")
    cat, dog = shifted(model, "<my-cat>", "cat", 1), shifted(model, "<my-dog>", "dog", 2)
    broken = replace(dog, tensors={"unet.elsewhere.delta": torch.zeros(3)})
    misfit = replace(dog, tensors={"unet.conv_in.delta": torch.zeros(7)})
    strange = replace(dog, concept=replace(dog.concept, params={"colour": "red"}))
    other = replace(dog, concept=replace(dog.concept, method="magic"))
    for bad, reason in (
        (broken, "elsewhere"),
        (misfit, "conv_in"),
        (strange, "colour"),
        (other, "magic"),
        (cat, "two|Two"),
    ):
        with pytest.raises(StudioError, match=reason), attached(model, [(cat, 1.0), (bad, 1.0)]):
            pass
        assert torch.equal(before, output(model, "a cat")) and not model.placeholders


def test_nothing_to_attach(model: Model) -> None:
    with attached(model, []) as adapters:
        assert adapters == []
