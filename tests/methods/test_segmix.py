"""Seg-Mix: several subjects in one change, collages among the photos, and a loss that knows which rows are collages."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.attention.probe import Columns, probe_attention
from pipelines.collage import Recipe
from pipelines.concept import Subject
from pipelines.data import Data, prepare
from pipelines.errors import StudioError
from pipelines.events import Finished, Progress
from pipelines.losses import denoising_loss, masked_mean, squared_error
from pipelines.methods import segmix
from pipelines.mixers import CutMixer, SegMixer
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.preset import BUILT_IN, load_preset
from pipelines.tokens import find_word
from pipelines.train import train
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
FAST = segmix.Params(
    steps=3, batch_size=4, lr=1e-2, prior_weight=0.0, rank=2, rare_word="hta sks", mix_chance=0.5, checkpoint_every=0
)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    yield tiny_model(request.param)


def photos() -> list[Photo]:
    """Two of each, each alone."""
    chance, made = np.random.default_rng(3), []
    for number, name in enumerate(("my-cat", "my-dog", "my-cat", "my-dog")):
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 16 + number : 44] = 255
        image = chance.integers(0, 200, (64, 64, 3), dtype=np.uint8)
        made.append(Photo(Path(f"{number}.png"), image, {name: mask}, None, (64, 64), (name,)))
    return made


def data(model: Model, params: Any, prior: bool = False) -> Data:
    pictures = [(photo.image, "a photo of a cat") for photo in photos()] if prior else []
    mixer = segmix.mixer(params, (CAT, DOG))
    return prepare(model, photos(), params, [CAT, DOG], seed=1, prior=pictures, mixer=mixer)


def test_the_published_settings() -> None:
    params = load_preset("segmix", "default")
    assert isinstance(params, segmix.Params) and params == segmix.Params(
        micro_batch=1, sample_every=200, checkpoint_every=200
    )
    assert (params.mix_chance, params.rank, params.targets, params.lr) == (0.3, 32, "attention", 1e-4)
    assert tomllib.loads((BUILT_IN / "segmix" / "default.toml").read_text())["params"]["targets"] == "attention"
    assert (params.batch_size, params.micro_batch) == (2, 1)  # one photo, two accumulated gradients
    assert (params.soft_alpha, params.loss, params.dco_beta, params.prior_weight) == (1.0, "mse", 1000.0, 1.0)
    assert segmix.mixer(params, (CAT, DOG)) == SegMixer(("<my-cat>", "<my-dog>"), 0.3, Recipe(0.75, 1.0, 0.5), 2)


def test_mixtures_are_chosen_by_name() -> None:
    assert segmix.mixer(FAST, (CAT,)) is None
    assert segmix.mixer(FAST.model_copy(update={"mix": "none"}), (CAT, DOG)) is None
    cut = segmix.mixer(FAST.model_copy(update={"mix": "cutmix", "cut_sides": "never"}), (CAT, DOG))
    assert isinstance(cut, CutMixer) and cut.sides == "never" and cut.chance == 0.5
    sized = segmix.mixer(FAST.model_copy(update={"relative_sizes": "1 0.5"}), (CAT, DOG))
    assert isinstance(sized, SegMixer) and sized.recipe.sizes == {"<my-cat>": 1.0, "<my-dog>": 0.5}
    with pytest.raises(StudioError, match="write 2 numbers"):
        segmix.mixer(FAST.model_copy(update={"relative_sizes": "1"}), (CAT, DOG))


def test_each_subject_is_its_rare_word_and_noun(model: Model) -> None:
    with segmix.attach(model, FAST, (CAT, DOG)) as adapter:
        read = model.tokenize("a photo of a <my-cat> and a <my-dog>, simple background.")
        assert read.text == "a photo of a hta cat and a sks dog, simple background."
        adapter.strength = 0
        assert model.tokenize("a <my-dog>").text == "a dog"
    assert not model.placeholders
    with pytest.raises(StudioError, match="2 rare words"):
        segmix.attach(model, FAST.model_copy(update={"rare_word": "hta"}), (CAT, DOG)).__enter__()
    assert not model.placeholders


def test_batches_hold_collages_of_both(model: Model) -> None:
    made = data(model, FAST)
    stage, captions = segmix.stages(FAST)[0], []
    for step in range(1, 6):
        batch = made.batch(stage, step)
        assert batch.shown is not None and batch.subject_masks is not None
        for row, caption in enumerate(batch.captions):
            captions.append(caption)
            mixed = caption.endswith("simple background.")
            assert bool(batch.shown[row].all()) == mixed
            covered = batch.subject_masks[row].flatten(1).sum(1) > 0
            assert covered.tolist() == batch.shown[row].tolist()
    share = sum(caption.endswith("simple background.") for caption in captions) / len(captions)
    assert 0.2 < share < 0.8
    assert {"a photo of <my-cat>", "a photo of <my-dog>"} < set(captions)


def test_a_collages_white_weighs_soft_alpha(model: Model) -> None:
    params = FAST.model_copy(update={"soft_alpha": 0.25})
    batch = next(
        batch
        for step in range(1, 9)
        if 0 < (batch := data(model, params).batch(segmix.stages(params)[0], step)).mixed.sum() < 4
    )
    error = torch.rand(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with segmix.attach(model, params, (CAT, DOG)) as adapter:
        each = segmix.each_row(adapter.params, error, batch)
    for row in range(4):
        weight = batch.masks[row] + (1 - batch.masks[row]) * 0.25
        mixed = bool(batch.mixed[row])
        assert mixed == bool(batch.shown[row].all())  # these photos show one each
        expected = (error[row] * weight).mean() if mixed else error[row].mean()
        torch.testing.assert_close(each[row], expected)
    with segmix.attach(model, params.model_copy(update={"masked_loss": True}), (CAT, DOG)) as adapter:
        torch.testing.assert_close(segmix.each_row(adapter.params, error, batch), masked_mean(error, batch.masks, 0.05))


@pytest.mark.parametrize("loss", ["mse", "dco"])
@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_both_losses_go_with_and_without_class_pictures(model: Model, loss: Any, prior: float) -> None:
    params = FAST.model_copy(update={"loss": loss, "prior_weight": prior})
    batch = data(model, params, prior=prior > 0).batch(segmix.stages(params)[0], 1)
    with segmix.attach(model, params, (CAT, DOG)) as adapter:
        losses = segmix.loss(model, adapter, batch, segmix.stages(params)[0])
        first = losses["dco" if loss == "dco" else "denoising"]
        moved = torch.autograd.grad(first, adapter.change.parameters(), retain_graph=True)
        assert sum(float(part.abs().sum()) for part in moved) > 0 and ("prior" in losses) == (prior > 0)
        if loss == "mse":
            usual = denoising_loss(model, adapter, batch, params)
            assert all(torch.allclose(usual[name], losses[name]) for name in usual)


def test_unmix_keeps_a_nouns_attention_off_the_other_subject(model: Model) -> None:
    """By hand: mean over cells of (attention of the noun * the other's mask)^2, summed over both nouns."""
    params = FAST.model_copy(update={"mix": "cutmix", "mix_chance": 1.0, "unmix_weight": 3.0, "batch_size": 2})
    stage, seen = segmix.stages(params)[0], []
    batch = data(model, params, prior=True).batch(stage, 1)
    assert batch.subject_masks is not None

    class Look:
        def wants(self, site: Any) -> Any:
            return Columns(None) if site.kind == "cross" else None

        def look(self, site: Any, columns: Any, step: Any) -> None:
            seen.append((site, columns.detach().mean(1)))  # (rows, queries, keys)

    with segmix.attach(model, params, (CAT, DOG)) as adapter:
        losses = segmix.loss(model, adapter, batch, stage)
        with probe_attention(model.unet, Look()):
            squared_error(model, batch)
        expected = []
        for site, maps in seen:
            value = 0.0
            for row, caption in enumerate(batch.captions):
                for other, word in ((1, "cat"), (0, "dog")):
                    at = find_word(model.tokenize(caption), word)[-1]
                    there = batch.subject_masks[row, other][None, None]
                    there = F.interpolate(there, (site.height, site.width), mode="area").flatten()
                    value += float(((maps[row, :, at] * there) ** 2).mean()) / len(batch.captions)
            expected.append(value)
        assert losses["unmix"].item() == pytest.approx(3 * np.mean(expected), rel=1e-3) and np.mean(expected) > 0
        moved = torch.autograd.grad(losses["unmix"], adapter.change.parameters(), allow_unused=True)
        assert any(part is not None and part.abs().sum() > 0 for part in moved)
        alone = data(model, params.model_copy(update={"mix": "none"})).batch(stage, 1)
        assert segmix.loss(model, adapter, alone, stage)["unmix"] == 0  # every process names the same losses
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_two_subjects_train_and_the_base_is_as_before(model: Model) -> None:
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    params = FAST.model_copy(update={"train_text_encoder": True, "loss": "dco"})
    *steps, last = train(model, segmix, data(model, params), params, seed=1)
    assert isinstance(last, Finished) and [event.step for event in steps if isinstance(event, Progress)] == [1, 2, 3]
    assert all("margin" in event.values for event in steps if isinstance(event, Progress))
    tensors = last.value.tensors
    assert last.value.concept.subjects == (CAT, DOG)
    assert any(not name.startswith("unet.") and value.any() for name, value in tensors.items() if "lora_B" in name)
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    assert not model.placeholders
    with segmix.attach(model, params, (CAT, DOG)) as adapter:
        groups = adapter.param_groups(segmix.stages(params)[0])
        assert [group["lr"] for group in groups] == [1e-2, 5e-6]
        adapter.load(tensors)
        again = adapter.tensors()
        assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)


def test_the_same_seed_mixes_alike_whoever_shares_the_batch(model: Model) -> None:
    stage = segmix.stages(FAST)[0]
    one = data(model, FAST).batch(stage, 2)
    again = data(model, FAST).batch(stage, 2)
    assert torch.equal(one.latents, again.latents) and one.captions == again.captions
    made = data(model, FAST)
    halves = [replace(made, share=replace(made.share, index=index, count=2)).batch(stage, 2) for index in (0, 1)]
    assert torch.equal(one.latents, torch.cat([half.latents for half in halves]))
