"""DreamBooth: what learns in each form, at which rate, and what a prompt says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.errors import StudioError
from pipelines.events import Finished
from pipelines.methods import dreambooth as method
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.train import train
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
FAST = method.Params(steps=2, lr=1e-3, lr_text=1e-3, rank=2, prior_weight=0.0, checkpoint_every=0)


def photos(count: int = 2) -> list[Photo]:
    pixels = np.random.default_rng(0)
    return [Photo(Path(f"{n}.png"), pixels.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for n in range(count)]


@torch.no_grad()
def output(model: Model, prompt: str) -> Tensor:
    noise, text = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), model.encode([prompt])
    sizes = model.conditioning(text, [(48, 64)], [(0, 0)], [(48, 64)])
    result: Tensor = model.unet(noise, torch.tensor([300]), text.states, **sizes).sample
    return result


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_it_learns_and_leaves_the_base_alone(tune: Any, kind: str) -> None:
    model, params = tiny_model(kind), FAST.model_copy(update={"tune": tune, "train_text_encoder": True})
    before = output(model, "a photo of a sks cat")
    *_, last = train(model, method, prepare(model, photos(), params, [CAT], seed=0), params, seed=0)
    assert isinstance(last, Finished)
    tensors = last.value.tensors
    parts = {name.split(".")[0] for name in tensors}
    assert parts == {"unet", "text_encoder"} | ({"text_encoder_2"} if kind == "sdxl" else set())
    assert all(".lora_" in name for name in tensors) == (tune == "lora")
    assert torch.equal(before, output(model, "a photo of a sks cat"))
    with method.attach(model, params, [CAT]) as adapter:
        assert torch.equal(before, output(model, "a photo of a <my-cat>"))
        adapter.load(tensors)
        adapter.bake()
        assert not torch.allclose(before, output(model, "a photo of a <my-cat>"), atol=1e-4)
    assert torch.equal(before, output(model, "a photo of a sks cat"))


def test_rates_and_scale() -> None:
    model = tiny_model("sd1")
    stage = method.stages(FAST)[0]
    with method.attach(model, FAST, [CAT]) as adapter:
        (group,) = adapter.param_groups(stage)
        assert group["lr"] == 1e-3 and all(change.scale == 1.0 for change in adapter.change.changes.values())
    params = FAST.model_copy(update={"train_text_encoder": True, "alpha": 8.0, "lr_text": 1e-5})
    with method.attach(model, params, [CAT]) as adapter:
        unet, text = adapter.param_groups(stage)
        assert (unet["lr"], text["lr"]) == (1e-3, 1e-5) and text["params"]
        assert all(change.scale == 4.0 for change in adapter.change.changes.values())


def test_what_a_prompt_says() -> None:
    model = tiny_model("sd1")
    with method.attach(model, FAST.model_copy(update={"rare_word": "hta sks"}), [CAT, DOG]) as adapter:
        assert model.tokenize("a <my-cat> and a <my-dog>").text == "a hta cat and a sks dog"
        adapter.strength = 0.0
        assert model.tokenize("a <my-cat>").text == "a cat"
    with pytest.raises(StudioError, match="2 rare words"), method.attach(model, FAST, [CAT, DOG]):
        pass
    assert not model.placeholders


def test_class_pictures_count_by_their_weight() -> None:
    model, params = tiny_model("sd1"), FAST.model_copy(update={"prior_weight": 0.5})
    prior = [(photo.image, "a photo of a cat") for photo in photos(2)]
    batch = prepare(model, photos(), params, [CAT], seed=0, prior=prior).batch(method.stages(params)[0], 1)
    with method.attach(model, params, [CAT]) as adapter:
        half = method.loss(model, adapter, batch, method.stages(params)[0])
        adapter.params = params.model_copy(update={"prior_weight": 1.0})
        whole = method.loss(model, adapter, batch, method.stages(params)[0])
    torch.testing.assert_close(2 * half["prior"], whole["prior"])
    torch.testing.assert_close(half["denoising"], whole["denoising"])
