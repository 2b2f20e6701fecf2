"""AttnDreamBooth: what each of the three stages trains, what it is held by, and the released numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.attention.probe import Step, probe_attention
from pipelines.attention.regularizer import Moments, TokenMoments, map_loss
from pipelines.augment import Augment
from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.errors import StudioError
from pipelines.events import Finished, Progress
from pipelines.methods import attndreambooth as method
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.preset import load_preset
from pipelines.train import train
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
FAST = method.Params(
    steps=1, embedding_steps=2, attention_steps=1, lr=1e-3, embedding_lr=0.05, attention_lr=1e-2, batch_size=2,
    checkpoint_every=0,
)  # fmt: skip
EMBEDDING, ATTENTION, IDENTITY = method.stages(FAST)


def photos(count: int = 2) -> list[Photo]:
    pixels = np.random.default_rng(0)
    return [Photo(Path(f"{n}.png"), pixels.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for n in range(count)]


def events(model: Model, params: method.Params, **options: Any) -> Iterator[Any]:
    return train(model, method, prepare(model, photos(), params, [CAT], seed=0), params, seed=0, **options)


def batch_of(model: Model, params: method.Params, **options: Any) -> Any:
    return prepare(model, photos(), params, [CAT], seed=0, **options).batch(EMBEDDING, 1)


@torch.no_grad()
def output(model: Model, prompt: str) -> Tensor:
    noise, text = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), model.encode([prompt])
    sizes = model.conditioning(text, [(48, 64)], [(0, 0)], [(48, 64)])
    result: Tensor = model.unet(noise, torch.tensor([300]), text.states, **sizes).sample
    return result


def test_the_published_recipe_and_its_fast_form() -> None:
    default, fast = load_preset("attndreambooth", "default"), load_preset("attndreambooth", "fast")
    assert isinstance(default, method.Params) and isinstance(fast, method.Params)
    released = {"flip": True, "flip_chance": 0.25, "rotate": 45.0, "corners": "black"}  # off where photos are few
    assert default == method.Params(**released) and method.Params().rotate == 0 and not method.Params().flip
    assert method.augment(default) == Augment(45.0, 0.75, "black", 0.25)
    rates = [(s.name, s.steps, s.batch_size, s.weight_decay, s.max_grad_norm) for s in method.stages(default)]
    assert rates == [("embedding", 60, 8, 1e-2, 0.0), ("attention", 100, 8, 1e-2, 0.0), ("identity", 500, 8, 1e-2, 0.0)]
    assert (default.embedding_lr, default.attention_lr, default.lr) == (1e-3, 2e-5, 2e-6)
    assert (default.embedding_mean, default.embedding_variance) == (0.1, 0.0)
    assert (default.map_mean, default.map_variance) == (2.0, 5.0)
    one, two = default.model_dump(), fast.model_dump()
    changed = {key: two[key] for key in two if one[key] != two[key]}
    assert changed == {"steps": 200, "lr": 1e-5, "identity_batch": 4, "identity_maps": 0.5}
    # the released sum over a batch of 4 is half of that over 8, and so is 8 x mean x 0.5
    assert [stage.batch_size for stage in method.stages(fast)] == [8, 8, 4]


@pytest.mark.parametrize("identity", ["full", "lora"])
def test_each_stage_trains_its_own(identity: Any) -> None:
    model, params = tiny_model("sd1"), FAST.model_copy(update={"identity": identity, "rank": 2})
    batch = batch_of(model, params)
    with method.attach(model, params, [CAT]) as adapter:
        groups = {stage.name: adapter.param_groups(stage)[0] for stage in method.stages(params)}
        ids = {name: {id(value) for value in group["params"]} for name, group in groups.items()}
        last = 1e-3 if identity == "full" else params.lora_lr  # rates of whole training are no use to a low-rank one
        assert [group["lr"] for group in groups.values()] == [0.05, 1e-2, last] and params.lora_lr == 1e-4
        assert len(ids["embedding"]) == 1 and not ids["embedding"] & ids["attention"]
        crossing = {name for name, _ in model.unet.named_parameters() if ".attn2." in name}
        assert len(ids["attention"]) == len(crossing)
        if identity == "full":
            assert ids["attention"] < ids["identity"]
            assert len(ids["identity"]) == len(list(model.unet.parameters()))
        else:
            assert not ids["attention"] & ids["identity"]
        every = {id(value): value for group in groups.values() for value in group["params"]}
        for stage in method.stages(params):
            for value in every.values():
                value.grad = None
            sum(method.loss(model, adapter, batch, stage).values()).backward()  # type: ignore[union-attr]
            got = {key for key, value in every.items() if value.grad is not None}
            assert got <= ids[stage.name] and len(got) > 0.9 * len(ids[stage.name])
    assert all(parameter.grad is None for part in model.text_encoders for parameter in part.parameters())
    assert all(parameter.grad is None for parameter in model.unet.parameters())


def test_the_first_stage_changes_nothing_but_the_new_row() -> None:
    model = tiny_model("sd1")
    params = FAST.model_copy(update={"steps": 0, "attention_steps": 0})
    plain = output(model, "a photo of a cat")
    (*_, last) = events(model, params)
    assert isinstance(last, Finished) and set(last.value.tensors) == {"tokens.text_encoder"}
    assert torch.equal(plain, output(model, "a photo of a cat"))
    with method.attach(model, params, [CAT]) as adapter:
        adapter.load(last.value.tensors)
        adapter.bake()
        assert torch.equal(plain, output(model, "a photo of a cat"))
        assert not torch.equal(plain, output(model, "a photo of a <my-cat>"))
        assert "forward" not in model.unet.conv_in.__dict__


@pytest.mark.parametrize("identity", ["full", "lora"])
def test_later_stages_leave_the_row_alone_and_keep_what_came_before(identity: Any) -> None:
    model, params = tiny_model("sd2"), FAST.model_copy(update={"identity": identity, "rank": 2})
    crossing = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    rows, keys, names = [], [], []
    run = events(model, params)
    for event in run:
        if isinstance(event, Progress):
            frame = run.gi_frame  # type: ignore[attr-defined]
            adapter = frame.f_locals["adapter"]
            tensors = adapter.tensors()
            rows.append(tensors["tokens.text_encoder"])
            keys.append(tensors.get(crossing))
            names.append(event.stage)
            assert {"denoising", "maps", "gradient"} == set(event.values)
    assert names == ["embedding", "embedding", "attention", "identity"]
    assert not torch.equal(rows[0], rows[1]) and torch.equal(rows[1], rows[2]) and torch.equal(rows[1], rows[3])
    assert keys[0] is None and keys[1] is None and keys[2] is not None and keys[3] is not None
    assert torch.equal(keys[2], keys[3]) == (identity == "lora")


def test_resuming_in_a_later_stage_changes_nothing(tmp_path: Path) -> None:
    params = FAST.model_copy(update={"steps": 2, "attention_steps": 2, "checkpoint_every": 1})
    (*_, whole) = events(tiny_model("sd1"), params)
    model = tiny_model("sd1")
    for stop in ("attention", "identity"):
        run = events(model, params, checkpoint=tmp_path, resume=stop == "identity")
        for event in run:
            if isinstance(event, Progress) and event.stage == stop:
                break
        run.close()  # type: ignore[attr-defined]
    (*_, last) = events(model, params, checkpoint=tmp_path, resume=True)
    one, two = whole.value.tensors, last.value.tensors
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_loss_is_what_the_regulariser_says() -> None:
    model = tiny_model("sd1")
    prior = [(photo.image, "a photo of a cat") for photo in photos(2)]
    params = FAST.model_copy(update={"prior_weight": 1.0})
    batch = batch_of(model, params, prior=prior)
    with method.attach(model, params, [CAT]) as adapter:
        with torch.no_grad():
            adapter._tokens.parameters()[0].add_(0.3)
        losses = {
            (form, reduction): method.loss(model, _with(adapter, form, reduction), batch, ATTENTION)["maps"].item()
            for form in ("released", "printed")
            for reduction in ("mean", "sum")
        }
        assert losses["released", "mean"] == pytest.approx(4 * losses["released", "sum"])  # 8 of 2 photos
        assert losses["printed", "mean"] == pytest.approx(4 * losses["printed", "sum"])
        assert losses["released", "sum"] != losses["printed", "sum"] and losses["released", "sum"] > 0
        found = method.loss(model, _with(adapter, "released", "mean"), batch, IDENTITY)
        assert set(found) == {"denoising", "prior", "maps"}
        adapter.params = params.model_copy(update={"map_mean": 0.0, "map_variance": 0.0})
        assert set(method.loss(model, adapter, batch, IDENTITY)) == {"denoising", "prior"}


@pytest.mark.parametrize("off", [None, "mean", "variance"])
def test_each_stage_holds_the_maps_by_its_own_weights(off: str | None) -> None:
    """R is linear in its two weights, so what the maps alone give says which weights a stage took."""
    weights = {"embedding_mean": 0.1, "embedding_variance": 30.0, "map_mean": 2.0, "map_variance": 5.0}
    weights |= {name: 0.0 for name in weights if off and name.endswith(off)}
    params = FAST.model_copy(update=weights | {"identity_maps": 0.25})
    model = tiny_model("sd1")
    batch = batch_of(model, params)
    with moved(model, params) as adapter:
        for stage, names, factor in ((EMBEDDING, "embedding", 1), (ATTENTION, "map", 1), (IDENTITY, "map", 0.25)):
            found, layers = maps(model, adapter, batch, stage)
            mean, variance = (map_loss(layers, *one).item() for one in ((1, 0), (0, 1)))
            assert mean > 0 and variance > 0
            expected = factor * (weights[f"{names}_mean"] * mean + weights[f"{names}_variance"] * variance)
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_fast_preset_holds_the_maps_as_the_released_sum_over_four(reduction: Any) -> None:
    params = load_preset("attndreambooth", "fast").model_copy(update={"map_reduction": reduction})
    assert isinstance(params, method.Params)
    stage, model = method.stages(params)[-1], tiny_model("sd1")
    batch = prepare(model, photos(4), params, [CAT], seed=0).batch(stage, 1)
    with moved(model, params) as adapter:
        found, layers = maps(model, adapter, batch, stage)
    means, variances = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("mean", "variance"))
    assert means.shape[1:] == variances.shape[1:] == (4, 2)  # layers, photos, tokens
    squares = 2 * means.diff(dim=2) ** 2 + 5 * variances.diff(dim=2) ** 2
    assert found == pytest.approx(squares.mean(0).sum().item(), rel=1e-5)


@contextmanager
def moved(model: Model, params: method.Params) -> Iterator[Any]:
    """Attached, with a new word that looks elsewhere than its noun."""
    with method.attach(model, params, [CAT]) as adapter:
        with torch.no_grad():
            adapter._tokens.parameters()[0].add_(torch.linspace(-1, 1, 32))
        yield adapter


def maps(model: Model, adapter: Any, batch: Any, stage: Any) -> tuple[float, list[Moments]]:
    """The stage's "maps", and the moments of the new word and its noun in every layer, seen beside it."""
    probe = TokenMoments([[5, 6]] * len(batch.captions))
    with probe_attention(model.unet, probe) as tap:
        tap.at(Step())
        found = method.loss(model, adapter, batch, stage)["maps"].item()
    return found, list(probe.seen.values())


def _with(adapter: Any, form: str, reduction: str) -> Any:
    adapter.params = adapter.params.model_copy(update={"map_form": form, "map_reduction": reduction})
    return adapter


def test_what_it_reads() -> None:
    model = tiny_model("sd1")
    batch = batch_of(model, FAST)
    with method.attach(model, FAST, [CAT]) as adapter:
        assert adapter.prompts(batch) == ["a photo of a <my-cat>"] * 2
        assert model.tokenize("a photo of a <my-cat>").text == "a photo of a <mycatV0> cat"
        adapter.params = FAST.model_copy(update={"prompt": ""})
        assert adapter.prompts(batch) == batch.captions
    with pytest.raises(ValueError, match="{} once"):
        method.Params(prompt="a photo")
    with pytest.raises(StudioError, match="one subject at a time"), method.attach(model, FAST, [CAT, DOG]):
        pass
    with pytest.raises(StudioError, match="All three stages"):
        method.stages(FAST.model_copy(update={"steps": 0, "embedding_steps": 0, "attention_steps": 0}))


def test_half_precision_bases_train() -> None:
    model = tiny_model("sdxl")
    for part in (model.unet, *model.text_encoders):
        part.to(torch.bfloat16)
    (*_, last) = events(model, FAST)
    tensors = last.value.tensors
    assert {"tokens.text_encoder", "tokens.text_encoder_2", "unet.conv_in.weight"} <= set(tensors)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values())
