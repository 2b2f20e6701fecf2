"""DCO: ln 2 at the start, a gradient that points the right way, a reference that is the base on the same words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.dco import Dco, consistency, dco_loss, switched_off
from pipelines.losses import masked_mean, squared_error
from pipelines.methods import segmix
from pipelines.model import Model
from tests.test_data import photos
from tests.tiny import tiny_model

CAT = Subject("<my-cat>", "cat")
PARAMS = segmix.Params(batch_size=3, rank=2, prior_weight=1.0, rare_word="sks")
STAGE = segmix.stages(PARAMS)[0]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def batch(model: Model, prior: bool) -> Batch:
    params = PARAMS.model_copy(update={"prior_weight": float(prior)})
    pictures = [(photo.image, "a photo of a cat") for photo in photos(2)]
    return prepare(model, photos(), params, [CAT], seed=2, prior=pictures).batch(STAGE, 1)


def whole(error: Tensor, batch: Batch) -> Tensor:
    return masked_mean(error, None, 1.0)


@contextmanager
def moved(model: Model, by: float, text: bool = False) -> Iterator[Any]:
    """The method's adapter, `by` away from the base."""
    params = PARAMS.model_copy(update={"train_text_encoder": text})
    with segmix.attach(model, params, [CAT]) as adapter:
        with torch.no_grad():
            chance = torch.Generator().manual_seed(0)
            for part in adapter.change.parameters() + adapter.change.text_parameters():
                part.add_(by * torch.randn(part.shape, generator=chance))
        yield adapter


def gradient(adapter: Any, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapter.change.parameters())])


def test_the_formula() -> None:
    margin = torch.tensor([0.0, 0.001, -0.002], requires_grad=True)
    expected = [math.log(1 + math.exp(1000 * value)) for value in (0.0, 0.001, -0.002)]
    each = consistency(margin, 1000.0)
    assert each.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    (slope,) = torch.autograd.grad(each, margin)
    torch.testing.assert_close(slope, 1000 / 3 * torch.sigmoid(1000 * margin.detach()))
    together = consistency(margin, 1000.0, per_row=False)
    assert together.item() == pytest.approx(math.log(1 + math.exp(1000 * (0.001 - 0.002) / 3)), rel=1e-4)
    assert torch.equal(consistency(margin[1:2], 50.0), consistency(margin[1:2], 50.0, per_row=False))
    assert consistency(torch.tensor([5.0, -5.0]), 1000.0).item() == pytest.approx(2500.0)  # neither overflows nor nan


@pytest.mark.parametrize("prior", [False, True])
def test_it_starts_at_ln_2_with_a_gradient_in_every_row(model: Model, prior: bool) -> None:
    """With class pictures too, where the released code's photos learn nothing."""
    one = batch(model, prior)
    with moved(model, 0.0) as adapter:
        losses = dco_loss(model, adapter, one, Dco(whole, prior_weight=float(prior)))
        assert losses["dco"].item() == pytest.approx(math.log(2), abs=1e-3)
        assert losses["margin"].item() == pytest.approx(0, abs=1e-5) and not losses["margin"].requires_grad
        assert ("prior" in losses) == prior
        got = gradient(adapter, losses["dco"])
        plain = gradient(adapter, whole(squared_error(model, one), one)[~one.prior].mean())
    assert got.norm() > 0
    torch.testing.assert_close(got, 500 * plain, rtol=0.02, atol=0.02 * float(500 * plain.abs().max()))


def test_class_pictures_change_nothing_for_the_photos(model: Model) -> None:
    with moved(model, 0.05) as adapter:
        alone = dco_loss(model, adapter, batch(model, False), Dco(whole, beta=50.0))
        beside = dco_loss(model, adapter, batch(model, True), Dco(whole, beta=50.0, prior_weight=0.5))
        prior = whole(squared_error(model, batch(model, True)), batch(model, True))[3:].mean()
    assert alone["dco"].item() == pytest.approx(beside["dco"].item(), rel=1e-4)
    assert alone["margin"].item() == pytest.approx(beside["margin"].item(), rel=1e-3)
    assert beside["prior"].item() == pytest.approx(0.5 * prior.item(), rel=1e-5)


@pytest.mark.parametrize("text", [False, True])
def test_the_reference_is_the_base_on_the_very_same_words(model: Model, text: bool) -> None:
    """Not "a photo of a cat", to which `<my-cat>` shrinks at strength 0."""
    one = batch(model, False)
    with torch.no_grad():
        base = whole(squared_error(model, one, model.encode(["a photo of sks cat"] * 3)), one)
        noun = whole(squared_error(model, one, model.encode(["a photo of cat"] * 3)), one)
    with moved(model, 0.3, text) as adapter:
        own = whole(squared_error(model, one), one).detach()
        margin = dco_loss(model, adapter, one, Dco(whole))["margin"]
    assert margin.item() == pytest.approx((own - base).mean().item(), rel=1e-3, abs=1e-6)
    assert abs((own - noun).mean().item() - margin.item()) > 1e-5


def test_the_adapter_is_as_before_also_after_an_exception(model: Model) -> None:
    with moved(model, 0.1) as adapter:
        adapter.strength = 0.7
        dco_loss(model, adapter, batch(model, False), Dco(whole))
        assert adapter.strength == 0.7
        with pytest.raises(RuntimeError, match="inside"), switched_off(adapter):
            assert adapter.strength == 0
            raise RuntimeError("inside")
        assert adapter.strength == 0.7


def test_it_learns(model: Model) -> None:
    one = batch(model, False)
    with moved(model, 0.0) as adapter:
        optimizer = torch.optim.AdamW(adapter.change.parameters(), lr=0.02)
        seen = []
        for _ in range(6):
            losses = dco_loss(model, adapter, one, Dco(whole, beta=20.0))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            seen.append(losses["margin"].item())
    assert seen[-1] < seen[1] < 0 and abs(seen[0]) < 1e-5
