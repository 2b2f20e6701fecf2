"""Weight changes: on and off in any order, stacked, folded in, and gone without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipelines import weights
from pipelines.changes import Change
from pipelines.errors import StudioError
from pipelines.weights import changed, weights_of
from tests.one_layer import bench, naive, shifts
from tests.tiny import tiny_model


def test_stacked_shifts_add_up_inside_the_relu() -> None:
    """Equations 4 and 5; adding two whole changes would give something else."""
    module = nn.Linear(10, 20).requires_grad_(False)
    base = module.weight.clone()
    one, two = shifts(module, 3.0, 1), shifts(module, 3.0, 2)
    model = bench(module)
    with changed(model, {"unet.layer": one}) as first, changed(model, {"unet.layer": two}) as second:
        for strengths in ((1.0, 1.0), (0.3, 0.7)):
            first.strength, second.strength = strengths
            first.bake()
            second.bake()
            parts = [(strengths[0], one.shifts.detach()), (strengths[1], two.shifts.detach())]
            torch.testing.assert_close(module.weight, naive(base, *parts), rtol=1e-4, atol=1e-5)
            apart = sum(naive(base, part) - base for part in parts) + base
            assert not torch.allclose(module.weight, apart, atol=1e-2)


def test_strength_is_monotone() -> None:
    module = nn.Conv2d(8, 12, 3).requires_grad_(False)
    base = module.weight.clone()
    with changed(bench(module), {"unet.layer": shifts(module)}) as group:
        distances = []
        for group.strength in (0.0, 0.4, 0.8, 1.0, 1.2):
            group.bake()
            distances.append((module.weight - base).norm().item())
    assert distances == sorted(distances)
    assert distances[0] == 0 < distances[1]


def test_samples_while_training_are_the_folded_weight() -> None:
    module, x = nn.Linear(24, 24).requires_grad_(False), torch.randn(40, 24)
    change = shifts(module)
    optimizer = torch.optim.AdamW(change.parameters(), lr=0.1)
    with changed(bench(module), {"unet.layer": change}) as group:
        for _ in range(3):
            module(x).pow(2).sum().backward()
            optimizer.step()
            with torch.no_grad():
                sample = module(x)
                assert torch.equal(sample, module(x))
        group.bake()
        assert torch.equal(sample, module(x))


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("baked", [False, True])
def test_two_on_and_off_in_any_order(first_out: int, baked: bool) -> None:
    module, x = nn.Conv2d(8, 12, 3).requires_grad_(False), torch.randn(1, 8, 6, 9)
    model, weight, memory = bench(module), module.weight, module.weight.data_ptr()
    before, order = module(x), list(module._parameters)
    contexts = [changed(model, {"unet.layer": shifts(module, seed=seed)}) for seed in (1, 2)]
    groups = [context.__enter__() for context in contexts]
    if baked:
        for group in groups:
            group.bake()
    both = module(x)
    contexts.pop(first_out).__exit__(None, None, None)
    alone = module(x)
    with torch.no_grad():
        assert torch.equal(alone, module(x)) or not baked
    last = groups[1 - first_out].changes["unet.layer"].parameters()[0].detach()
    expected = nn.functional.conv2d(x, naive(weights._layers[module].base, (1, last)), module.bias)
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(both, alone)
    contexts.pop().__exit__(None, None, None)
    assert torch.equal(module(x), before)
    assert module.weight is weight and weight.data_ptr() == memory
    assert list(module._parameters) == order and "forward" not in module.__dict__ and not weights._layers


def test_undone_after_an_exception_and_a_half_way_entry() -> None:
    module = nn.Linear(8, 8)
    model, weight = bench(module), module.weight
    copy = weight.detach().clone()
    with pytest.raises(RuntimeError), changed(model, {"unet.layer": shifts(module)}) as group:
        group.bake()
        raise RuntimeError
    with pytest.raises(KeyError), changed(model, {"unet.layer": shifts(module), "unet.other": shifts(module)}):
        pass
    with pytest.raises(RuntimeError), changed(model, {"unet.layer": shifts(module)}):
        module(torch.randn(3, 9))  # the layer itself fails in the middle of a live forward
    assert module.weight is weight and torch.equal(weight, copy)
    assert "forward" not in module.__dict__ and not weights._layers


def test_somebody_elses_forward_comes_back() -> None:
    module, calls = nn.Linear(8, 8).requires_grad_(False), []

    def hooked(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return nn.Linear.forward(module, x)

    module.forward = hooked  # type: ignore[method-assign]
    with changed(bench(module), {"unet.layer": shifts(module)}) as group:
        module(torch.randn(2, 8))
        group.bake()
        module(torch.randn(2, 8))
    assert module.__dict__["forward"] is hooked and len(calls) == 2


def test_strength_must_be_a_number() -> None:
    module = nn.Linear(4, 4)
    with changed(bench(module), {"unet.layer": shifts(module)}) as group, pytest.raises(StudioError, match="Choose"):
        group.strength = float("nan")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_names_do_not_depend_on_wrappers(kind: str) -> None:
    from pipelines.tokens import added_tokens

    model = tiny_model(kind)
    names = weights_of(model)
    assert "unet.conv_in" in names and "text_encoder.embeddings.token_embedding" in names
    assert ("text_encoder_2.embeddings.token_embedding" in names) == (kind == "sdxl")
    with added_tokens(model, ["<new>"], ["cat"]):
        assert weights_of(model) == names


def test_text_states_are_never_stale() -> None:
    model = tiny_model("sd1")
    name = "text_encoder.encoder.layers.0.mlp.fc1"
    change: Change = shifts(weights_of(model)[name])

    def states() -> Tensor:
        with torch.no_grad():
            return model.encode(["a photo of a cat"]).states

    before = states()
    with changed(model, {name: change}) as one, changed(model, {"unet.conv_in": shifts(model.unet.conv_in)}) as other:
        live = states()
        assert not model.cache_text and not torch.equal(live, before)
        change.parameters()[0].data.mul_(2)
        assert model.encode(["a photo of a cat"]).states.requires_grad
        other.bake()
        assert not model.cache_text
        one.bake()
        assert model.cache_text and not torch.equal(states(), live)
        one.strength = 0
        assert torch.equal(states(), before)
    assert model.cache_text and torch.equal(states(), before)
