"""SVDiff: which numbers learn, how fast, what they mean in a prompt, and that they come back as they were saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines import spectral
from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.errors import StudioError
from pipelines.events import Finished, Progress
from pipelines.methods import svdiff
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.shifts import chosen
from pipelines.train import train
from pipelines.weights import weights_of
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
FAST = svdiff.Params(steps=3, lr=0.05, lr_1d=0.01, prior_weight=0.0, checkpoint_every=0)


@pytest.fixture(params=["sd1", "sd2v", "sdxl"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    yield tiny_model(request.param)


def photos(count: int = 3) -> list[Photo]:
    pixels = np.random.default_rng(0)
    return [Photo(Path(f"{n}.png"), pixels.integers(0, 256, (72, 64, 3), dtype=np.uint8)) for n in range(count)]


@torch.no_grad()
def output(model: Model, prompt: str) -> Tensor:
    noise, text = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), model.encode([prompt])
    sizes = model.conditioning(text, [(48, 64)], [(0, 0)], [(48, 64)])
    result: Tensor = model.unet(noise, torch.tensor([300]), text.states, **sizes).sample
    return result


def run(model: Model, params: svdiff.Params) -> Any:
    data = prepare(model, photos(), params, [CAT], seed=0)
    *_, last = train(model, svdiff, data, params, seed=0)
    assert isinstance(last, Finished)
    return last.value


@pytest.mark.parametrize("mode", ["scalar", "element"])
def test_every_number_has_its_shape_and_rate(model: Model, mode: Any) -> None:
    params = svdiff.Params(mode_1d=mode)
    modules = weights_of(model)
    with svdiff.attach(model, params, [CAT]) as adapter:
        shifts, groups = adapter.shifts(), adapter.param_groups(svdiff.stages(params)[0])
    assert shifts.keys() == {f"{name}.delta" for name in modules}
    slow = {id(values) for group in groups if group["lr"] == 1e-6 for values in group["params"]}
    for name, module in modules.items():
        values = shifts[f"{name}.delta"]
        one = module.weight.ndim == 1
        length = len(module.weight) if one and mode == "element" else spectral.rank(module.weight)
        assert values.shape == (length,) and values.dtype == torch.float32 and values.requires_grad
        assert (id(values) in slow) == one
    assert sum(len(group["params"]) for group in groups) == len(shifts)
    assert {group["lr"] for group in groups} == {1e-3, 1e-6}


def test_no_shift_is_the_base_to_the_bit(model: Model) -> None:
    before = output(model, "a photo of a sks cat")
    for mode in ("scalar", "element"):
        with svdiff.attach(model, svdiff.Params(mode_1d=mode), [CAT]) as adapter:
            assert torch.equal(before, output(model, "a photo of a <my-cat>"))
            adapter.bake()
            assert torch.equal(before, output(model, "a photo of a <my-cat>"))


@pytest.mark.parametrize("text", [True, False])
def test_it_learns_only_what_it_should(model: Model, text: bool) -> None:
    params = FAST.model_copy(update={"train_text_encoder": text})
    before = {name: module.weight.clone() for name, module in weights_of(model).items()}
    version = model.text_version
    trained = run(model, params)
    assert any(not name.startswith("unet.") for name in trained.tensors) == text
    assert trained.concept.params["lr_1d"] == 0.01 and trained.concept.method == "svdiff"
    assert trained.tensors["unet.conv_in.delta"].any()
    assert all(torch.equal(module.weight, before[name]) for name, module in weights_of(model).items())
    assert all(module.weight.grad is None for module in weights_of(model).values())
    assert (model.text_version > version) == text and model.cache_text


def test_loss_falls_on_one_batch() -> None:
    """The same batch again and again must be learnt."""
    model, params = tiny_model("sd1"), FAST
    batch = prepare(model, photos(1), params, [CAT], seed=0).batch(svdiff.stages(params)[0], 1)
    with svdiff.attach(model, params, [CAT]) as adapter:
        stage = svdiff.stages(params)[0]
        optimizer = torch.optim.AdamW(adapter.param_groups(stage))
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            value = sum(svdiff.loss(model, adapter, batch, stage).values())
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("layers", ["1d", "2d", "4d", "ca", "ca-kv", "up", "down", "mid", "up-ca", "down-ca", "mid-ca"])
def test_subsets(layers: Any) -> None:
    model = tiny_model("sd1")
    found = chosen(model, svdiff.Params(layers=layers, train_text_encoder=False))
    everything = chosen(model, svdiff.Params(train_text_encoder=False))
    assert found and found.keys() < everything.keys()
    for name, module in found.items():
        assert layers[1] != "d" or module.weight.ndim == int(layers[0])
        assert "ca" not in layers.split("-") or ".attn2." in name
        assert layers != "ca-kv" or name.endswith(("to_k", "to_v"))
        place = layers.split("-")[0]
        assert place not in ("up", "down", "mid") or name.startswith(f"unet.{place}_block")


def test_the_placeholder_means_rare_word_and_noun() -> None:
    model = tiny_model("sd1")
    with svdiff.attach(model, svdiff.Params(rare_word="hta"), [CAT]) as adapter:
        assert model.tokenize("a photo of a <my-cat> cat in snow").text == "a photo of a hta cat in snow"
        adapter.strength = 0
        assert model.tokenize("a photo of a <my-cat>").text == "a photo of a cat"
    with svdiff.attach(model, svdiff.Params(rare_word="hta sks"), [CAT, DOG]):
        assert model.tokenize("a <my-dog> and a <my-cat>").text == "a sks dog and a hta cat"
    with svdiff.attach(model, svdiff.Params(rare_word=""), [CAT]):
        assert model.tokenize("a <my-cat>").text == "a cat"
    with pytest.raises(StudioError, match="2 rare words"), svdiff.attach(model, svdiff.Params(), [CAT, DOG]):
        pass
    for words, alike in (("sks SKS", (CAT, Subject("<b>", "Cat"))), ("", (CAT, Subject("<b>", "cat")))):
        with pytest.raises(StudioError, match="both read"):
            svdiff.attach(model, svdiff.Params(rare_word=words), alike).__enter__()
    with svdiff.attach(model, svdiff.Params(rare_word="sks sks"), [CAT, DOG]):
        assert model.tokenize("a <my-dog> and a <my-cat>").text == "a sks dog and a sks cat"
    assert not model.placeholders


def test_saved_and_loaded_is_the_same(model: Model) -> None:
    trained = run(model, FAST)
    outputs = []
    for _ in range(2):
        with svdiff.attach(model, FAST, [CAT]) as adapter:
            adapter.load(trained.tensors)
            outputs.append(output(model, "a <my-cat>"))  # folded for this forward only
            adapter.bake()
            outputs.append(output(model, "a <my-cat>"))
            kept = adapter.tensors()
    assert all(torch.equal(outputs[0], other) for other in outputs)
    assert kept.keys() == trained.tensors.keys() and all(torch.equal(kept[k], trained.tensors[k]) for k in kept)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = tiny_model("sd1")
    with svdiff.attach(model, svdiff.Params(), [CAT]) as adapter:
        good = adapter.tensors()
        for name, values, reason in (
            ("unet.conv_in.delta", torch.zeros(5), "conv_in.*brings 5 numbers.*needs 32 numbers"),
            ("unet.conv_in.delta", torch.full((32,), float("nan")), "broken"),
            ("unet.conv_elsewhere.delta", torch.zeros(5), "conv_elsewhere.*lacks"),
        ):
            with pytest.raises(StudioError, match=reason):
                adapter.load(good | {name: values})
        with torch.no_grad():
            adapter.shifts()["unet.conv_in.delta"].fill_(1.0)
        adapter.load({"unet.conv_out.delta": torch.ones(4)})
        assert not adapter.tensors()["unet.conv_in.delta"].any()  # what a file leaves out is no change


def test_closing_in_the_middle_of_training_restores() -> None:
    model = tiny_model("sd1")
    before = output(model, "a cat")
    events = train(model, svdiff, prepare(model, photos(), FAST, [CAT], seed=0), FAST, seed=0)
    assert isinstance(next(events), Progress)
    assert "forward" in model.unet.conv_in.__dict__
    events.close()  # type: ignore[attr-defined]
    assert torch.equal(before, output(model, "a cat")) and "forward" not in model.unet.conv_in.__dict__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_trains_fp32_shifts(dtype: torch.dtype) -> None:
    model = tiny_model("sd1")
    for part in (model.unet, *model.text_encoders):
        part.to(dtype)
    trained = run(model, FAST)
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in trained.tensors.values())
    assert trained.tensors["unet.conv_in.delta"].any()


def test_masks_and_class_pictures_enter_the_loss() -> None:
    model, params = tiny_model("sd1"), FAST.model_copy(update={"prior_weight": 1.0, "masked_loss": True})
    mask = np.zeros((72, 64), dtype=np.uint8)
    mask[20:50, 10:40] = 255
    masked = [Photo(photo.path, photo.image, {"": mask}) for photo in photos()]
    prior = [(photo.image, "a photo of a cat") for photo in photos(2)]
    batch = prepare(model, masked, params, [CAT], seed=0, prior=prior).batch(svdiff.stages(params)[0], 1)
    with svdiff.attach(model, params, [CAT]) as adapter:
        losses = svdiff.loss(model, adapter, batch, svdiff.stages(params)[0])
    assert losses.keys() == {"denoising", "prior"} and all(value.requires_grad for value in losses.values())


def both_photos() -> list[Photo]:
    """One of each, alone."""
    pixels = np.random.default_rng(5)
    return [
        Photo(Path(f"{name}.png"), pixels.integers(0, 256, (64, 64, 3), np.uint8), {}, None, (64, 64), (name,))
        for name in ("my-cat", "my-dog")
    ]


def test_cut_mix_puts_halves_of_two_subjects_together(model: Model) -> None:
    params = FAST.model_copy(update={"mix": "cutmix", "rare_word": "hta sks", "batch_size": 4, "unmix_weight": 2.0})
    mixer, stage = svdiff.mixer(params, [CAT, DOG]), svdiff.stages(params)[0]
    data = prepare(model, both_photos(), params, [CAT, DOG], seed=0, mixer=mixer)
    captions = [caption for step in range(1, 16) for caption in data.batch(stage, step).captions]
    share = sum("cat" in caption and "dog" in caption for caption in captions) / len(captions)
    assert 0.45 < share < 0.75  # the paper's 0.6
    assert any("on the left" in caption for caption in captions) and "a photo of <my-cat>" in captions
    *steps, last = train(model, svdiff, data, params, seed=0)
    assert isinstance(last, Finished) and last.value.concept.subjects == (CAT, DOG)
    assert any(event.values["unmix"] > 0 for event in steps if isinstance(event, Progress))
    assert not any(module._forward_hooks for module in model.unet.modules()) and not model.placeholders


def test_unmix_reaches_the_shifts_and_is_off_by_default() -> None:
    model, params = (
        tiny_model("sd1"),
        FAST.model_copy(update={"mix": "cutmix", "mix_chance": 1.0, "rare_word": "hta sks"}),
    )
    assert svdiff.Params().mix == "none" and svdiff.Params().unmix_weight == 0
    stage = svdiff.stages(params)[0]
    mixer = svdiff.mixer(params, [CAT, DOG])
    batch = prepare(model, both_photos(), params, [CAT, DOG], seed=0, mixer=mixer).batch(stage, 1)
    with svdiff.attach(model, params, [CAT, DOG]) as adapter:
        assert "unmix" not in svdiff.loss(model, adapter, batch, stage)
    with svdiff.attach(model, params.model_copy(update={"unmix_weight": 1.0}), [CAT, DOG]) as adapter:
        losses = svdiff.loss(model, adapter, batch, stage)
        moved = torch.autograd.grad(losses["unmix"], list(adapter.shifts().values()), allow_unused=True)
        assert sum(float(part.abs().sum()) for part in moved if part is not None) > 0


def test_cut_mix_needs_each_subject_alone() -> None:
    model, params = tiny_model("sd1"), FAST.model_copy(update={"mix": "cutmix", "rare_word": "hta sks"})
    with pytest.raises(StudioError, match="Cut-Mix needs a photo of <my-cat> or <my-dog> alone"):
        prepare(model, photos(), params, [CAT, DOG], seed=0, mixer=svdiff.mixer(params, [CAT, DOG]))
