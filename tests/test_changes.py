"""Every form of every change: exactly nothing at zero, the paper's formula otherwise, gradients that are its slope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines import changes, spectral, weights
from pipelines.changes import Elements, LowRank
from pipelines.model import Model
from pipelines.weights import changed, weights_of
from tests.one_layer import LAYERS, bench, naive, shifts, with_weight

FORMS: dict[str, Any] = {
    "dense": None,
    "both sides": changes._both_sides,
    "short side": changes._short_side,
    "short side at once": changes._short_side_at_once,
}


def allow(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    """Make every layer that can take `form` take it."""
    free = changes._cheapest

    def chosen(layer: Any, x: Tensor) -> Any:
        possible = free(layer, x) is not None or isinstance(layer.module, nn.Linear | nn.Embedding)
        reaches = changes._plain_conv(layer.module) or isinstance(layer.module, nn.Linear | nn.Embedding)
        if form in (changes._short_side, changes._short_side_at_once):
            reaches = reaches and changes._short_side_reaches(layer.module, layer.factors().tall)
        return form if (possible or form is changes._both_sides) and reaches else None

    monkeypatch.setattr(changes, "_cheapest", chosen)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, x = LAYERS[request.param]
    module = make()
    if spectral.as_matrix(module.weight).shape[0] == 1:
        nn.init.normal_(module.weight)  # a norm's gains are all 1 at first
    return module, x()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_formula(layer: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer
    allow(monkeypatch, FORMS[form])
    change = shifts(module)
    expected = with_weight(module, naive(module.weight, (1.0, change.shifts.detach())), x)
    with changed(bench(module), {"unet.layer": change}):
        live = module(x)
    torch.testing.assert_close(live, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_shift_is_the_base_to_the_bit(layer: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer
    allow(monkeypatch, FORMS[form])
    before = module(x)
    with changed(bench(module), {"unet.layer": shifts(module, size=0)}) as group:
        assert torch.equal(module(x), before)
        group.changes["unet.layer"].parameters()[0].data += 0.5
        assert not torch.equal(module(x), before)
        group.strength = 0
        assert torch.equal(module(x), before)
        group.bake()
        assert torch.equal(module(x), before)
        assert module.weight.data_ptr() == weights._layers[module].base.data_ptr()  # nothing was even copied


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_finite_differences(layer: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer
    allow(monkeypatch, FORMS[form])
    module.double()
    x = x.double() if x.is_floating_point() else x
    change = shifts(module, size=0.05)
    with changed(bench(module), {"unet.layer": change}):

        def total(values: Tensor) -> Tensor:
            with torch.no_grad():
                change.shifts.copy_(values)
                return (module(x) ** 2).sum()

        start = change.shifts.detach().clone()
        (module(x) ** 2).sum().backward()
        for index in range(0, len(start), 3):
            nudge = torch.zeros_like(start)
            nudge[index] = 1e-5
            slope = (total(start + nudge) - total(start - nudge)) / 2e-5
            torch.testing.assert_close(change.shifts.grad[index], slope, rtol=1e-5, atol=1e-6)
    assert module.weight.grad is None


def test_dead_zone() -> None:
    """Below -S a direction is gone and learns no more."""
    module = nn.Linear(6, 6).requires_grad_(False)
    change = shifts(module, size=0)
    with torch.no_grad():
        change.shifts[2] = -100.0
    with changed(bench(module), {"unet.layer": change}) as group:
        module(torch.randn(50, 6)).pow(2).sum().backward()
        group.bake()
        assert torch.linalg.svdvals(module.weight)[-1] < 1e-6
    assert change.shifts.grad is not None
    assert change.shifts.grad[2] == 0
    assert (change.shifts.grad[[0, 1, 3, 4, 5]] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base_with_fp32_shifts(layer: Any, dtype: torch.dtype, autocast: bool) -> None:
    module, x = layer
    reference, x = module(x), x.to(dtype) if x.is_floating_point() else x
    module.to(dtype)
    change = shifts(module.float(), size=0.3)
    module.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        before = module(x)
        with changed(bench(module), {"unet.layer": change}) as group:
            live = module(x)
            live.float().pow(2).sum().backward()
            group.bake()
            torch.testing.assert_close(live, module(x), rtol=0.05, atol=0.05 * live.detach().float().abs().max().item())
            assert module.weight.dtype == dtype
            group.strength = 0
            assert torch.equal(module(x), before)
    assert change.shifts.grad is not None and change.shifts.grad.dtype == torch.float32
    assert change.shifts.grad.isfinite().all() and change.shifts.grad.any()
    assert reference.shape == live.shape


def test_other_kinds_of_change() -> None:
    torch.manual_seed(0)
    norm, conv = nn.LayerNorm(8).requires_grad_(False), nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    gains = Elements(nn.Parameter(torch.randn(8)))
    product = LowRank(nn.Parameter(torch.randn(2, 36)), nn.Parameter(torch.randn(6, 2)), scale=0.5)
    for module, change, delta, x in (
        (norm, gains, gains.values, torch.randn(3, 8)),
        (conv, product, 0.5 * (product.up @ product.down).reshape(6, 4, 3, 3), torch.randn(2, 4, 5, 7)),
    ):
        expected = with_weight(module, module.weight + 0.25 * delta, x)
        with changed(bench(module), {"unet.layer": change}) as group:
            group.strength = 0.25
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
            module(x).sum().backward()
            assert all(parameter.grad is not None for parameter in change.parameters())
            group.bake()
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_different_kinds_on_one_weight() -> None:
    module, x = nn.Linear(12, 12).requires_grad_(False), torch.randn(30, 12)
    product = LowRank(nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.randn(12, 2)))
    change, model, before = shifts(module), bench(module), module(x)
    expected = naive(module.weight, (1.0, change.shifts.detach())) + product.up @ product.down
    with changed(model, {"unet.layer": change}), changed(model, {"unet.layer": product}):
        torch.testing.assert_close(module(x), with_weight(module, expected, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(module(x), before)


def test_training_step_costs_little_more_than_frozen_weights() -> None:
    """Multiplications in one forward and backward at the toybox's own size, against the frozen base (input gradients
    only) and the published way, which rebuilds U diag(S + d) V^T with a dense diagonal in every layer.
    """
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    ).requires_grad_(False)
    model = Model("bench", "sd1", "", (), (), unet, None, {})
    x, states = torch.randn(2, 4, 16, 16, requires_grad=True), torch.randn(2, 77, 32)

    def count(work: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def forward() -> Tensor:
        return unet(x, torch.tensor([10, 900]), encoder_hidden_states=states).sample

    plain, frozen = count(forward), count(lambda: forward().sum().backward())
    all_shifts = {name: shifts(module, 0.01) for name, module in weights_of(model).items()}
    with changed(model, all_shifts) as group:
        assert count(forward) <= 1.6 * plain
        ours = count(lambda: forward().sum().backward())
        group.bake()
        assert count(forward) == plain
    rebuilt = 0
    for name, module in weights_of(model).items():
        rows, columns = spectral.as_matrix(module.weight).shape
        r = min(rows, columns)
        if r > 1 and name in all_shifts:
            rebuilt += 3 * 2 * rows * r * (columns + r)  # forward, and twice that backward
    naive_step = count(lambda: forward().sum().backward()) * 1.5 + rebuilt
    assert ours <= 1.5 * frozen
    assert ours <= 0.75 * naive_step
