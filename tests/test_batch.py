"""Parts of a batch: the same step with less memory at a time."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.events import Finished, Progress
from pipelines.methods import get_method, method_names, segmix, svdiff
from pipelines.model import Model
from pipelines.train import train
from tests.methods.test_extract import BOTH, photo
from tests.methods.test_svdiff import both_photos
from tests.test_data import photos
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
PRIOR = [(one.image, "a photo of a cat") for one in photos(2)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def batch(model: Model, prior: bool) -> Batch:
    params = segmix.Params(batch_size=3, rank=2, prior_weight=float(prior), rare_word="sks")
    return prepare(model, photos(), params, [CAT], seed=2, prior=PRIOR).batch(segmix.stages(params)[0], 1)


def test_rows_are_taken_from_everything_a_batch_has(model: Model) -> None:
    one = batch(model, True)
    kept = one.rows(~one.prior)
    assert len(one.latents) == 6 and not kept.prior.any()
    for field in fields(Batch):
        value = getattr(kept, field.name)
        assert value is None or isinstance(value, bool) or len(value) == 3, field.name
    assert torch.equal(kept.noise, one.noise[:3]) and kept.captions == one.captions[:3]


def test_parts_have_their_own_class_pictures_and_shares_of_the_whole(model: Model) -> None:
    one = batch(model, True)
    (first, most), (second, least) = one.parts(2)
    assert (most, least) == (pytest.approx(2 / 3), pytest.approx(1 / 3)) and (first.first, second.first) == (
        True,
        False,
    )
    assert first.prior.tolist() == [False, False, True, True] and second.prior.tolist() == [False, True]
    assert torch.equal(second.noise, one.noise[[2, 5]]) and second.captions == [one.captions[2], one.captions[5]]
    for size in (0, 3, 99):
        ((whole, share),) = one.parts(size)
        assert whole is one and share == 1.0


def learned(model: Model, name: str, subjects: Any, pictures: Any, **settings: Any) -> tuple[Tensor, list[Any]]:
    """What a few steps move the concept to, and their losses. The rate is small: AdamW makes much of rounding."""
    known = get_method(name).Params.model_fields
    rates = {field: 1e-4 for field in known if field.endswith("lr") or field == "lr"}
    stages = {field: 2 for field in ("embedding_steps", "attention_steps", "shift_steps") if field in known}
    quick = {"steps": 2, "batch_size": 4, "checkpoint_every": 0, "weight_decay": 0.0} | stages | rates
    params = get_method(name).Params(**(quick | settings))
    mixer = getattr(get_method(name), "mixer", lambda *_: None)(params, subjects)
    data = prepare(model, pictures, params, subjects, seed=1, prior=PRIOR, mixer=mixer)
    *steps, last = train(model, get_method(name), data, params, seed=1)
    assert isinstance(last, Finished)
    tensors = last.value.tensors
    found = torch.cat([tensors[key].flatten().double() for key in sorted(tensors)])
    return found, [step.values for step in steps if isinstance(step, Progress)]


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{name: ([CAT], photos(), {"prior_weight": 1.0}) for name in method_names()},
    "residual": ([CAT], photos(), {}),
    "extract": (list(BOTH), [photo()], {"schedule": "passes", "prior_weight": 1.0, "split": 2, "split_steps": 2}),
    "svdiff unmixed": (
        [CAT, DOG], both_photos(),
        {"mix": "cutmix", "mix_chance": 0.5, "rare_word": "hta sks", "unmix_weight": 5.0, "prior_weight": 0.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_step_in_parts_is_the_step(model: Model, case: str, size: int) -> None:
    name, (subjects, pictures, settings) = case.split()[0], CASES[case]
    whole, expected = learned(model, name, subjects, pictures, **settings)
    parts, found = learned(model, name, subjects, pictures, **settings, micro_batch=size)
    assert len(expected) == len(found) > 1 and expected[0].keys() == found[0].keys()
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert whole.norm() > 0 and (whole - parts).norm() <= 1e-3 * whole.norm()


def test_fewer_rows_are_computed_at_a_time(model: Model) -> None:
    seen: list[int] = []
    hook = model.unet.register_forward_pre_hook(
        lambda module, given, named: seen.append(len(given[0])), with_kwargs=True
    )
    try:
        learned(model, "svdiff", [CAT], photos(), prior_weight=1.0, micro_batch=1)
    finally:
        hook.remove()
    assert seen == [2] * 8  # a photo and its class picture; four of them in each of two steps


def test_a_loss_is_named_also_where_it_is_zero(model: Model) -> None:
    """Parts and processes without a mixture name the same losses as those with one."""
    params = svdiff.Params(batch_size=1, rare_word="hta sks", unmix_weight=1.0, prior_weight=0.0)
    stage = svdiff.stages(params)[0]
    one = prepare(model, both_photos(), params, [CAT, DOG], seed=0).batch(stage, 1)
    with svdiff.attach(model, params, [CAT, DOG]) as adapter:
        losses = svdiff.loss(model, adapter, one, stage)
    assert losses.keys() == {"denoising", "unmix"} and losses["unmix"] == 0
