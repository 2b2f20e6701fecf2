"""Textual Inversion: only new rows learn, in the right table, and come back as they were saved."""

from __future__ import annotations

from collections.abc import Iterator
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
from pipelines.learned_tokens import learned_tokens
from pipelines.methods import textual_inversion as method
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.train import train
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
FAST = method.Params(steps=2, batch_size=2, lr=0.05, checkpoint_every=0)


@pytest.fixture(params=["sd1", "sdxl"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    yield tiny_model(request.param)


def photos(count: int = 2) -> list[Photo]:
    pixels = np.random.default_rng(0)
    return [Photo(Path(f"{n}.png"), pixels.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for n in range(count)]


def run(model: Model, params: method.Params, subjects: list[Subject]) -> Any:
    *_, last = train(model, method, prepare(model, photos(), params, subjects, seed=0), params, seed=0)
    assert isinstance(last, Finished)
    return last.value


def test_only_the_new_rows_change(model: Model) -> None:
    before = {name: value.clone() for part in model.text_encoders for name, value in part.state_dict().items()}
    unet = {name: value.clone() for name, value in model.unet.state_dict().items()}
    tokenizers = model.tokenizers
    trained = run(model, FAST.model_copy(update={"tokens": 3}), [CAT])
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in model.text_encoders]
    assert [tuple(value.shape) for value in trained.tensors.values()] == [(3, width) for width in widths]
    assert set(trained.tensors) == {"tokens.text_encoder", "tokens.text_encoder_2"} if len(widths) == 2 else True
    after = {name: value for part in model.text_encoders for name, value in part.state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, unet[name]) for name, value in model.unet.state_dict().items())
    assert model.tokenizers is tokenizers and not model.placeholders
    assert all(parameter.grad is None for part in model.text_encoders for parameter in part.parameters())


def test_it_starts_as_the_noun_and_reads_as_asked() -> None:
    model = tiny_model("sd1")
    table = model.text_encoders[0].get_input_embeddings().weight
    row = table[model.tokenizers[0]("cat", add_special_tokens=False)["input_ids"][0]]
    with method.attach(model, method.Params(), [CAT, DOG]) as adapter:
        tensors = adapter.tensors()["tokens.text_encoder"]
        assert torch.equal(tensors[0], row) and not torch.equal(tensors[0], tensors[1])
        assert model.tokenize("a <my-cat> cat in snow").text == "a <mycatV0> in snow"
        assert model.tokenize("a <my-cat>").words[2] == "<mycatV0>"
        adapter.strength = 0.0
        assert model.tokenize("a <my-cat> in snow").text == "a cat in snow"
    with method.attach(model, method.Params(with_noun=True, tokens=2, start_word="dog"), [CAT]):
        assert model.tokenize("a <my-cat>").text == "a <mycatV0> <mycatV1> cat"


def test_strength_goes_from_the_noun_to_what_was_learned() -> None:
    model = tiny_model("sd1")

    def state(strength: float) -> Tensor:
        with method.attach(model, method.Params(), [CAT]) as adapter:
            first = adapter.tensors()["tokens.text_encoder"]
            adapter.load({"tokens.text_encoder": first + 1.0})
            adapter.strength = strength
            adapter.bake()
            assert torch.equal(adapter.tensors()["tokens.text_encoder"], first + 1.0)
            return (adapter.learned.parameters()[0] - first).mean().detach()

    assert state(1.0) == pytest.approx(1.0, abs=1e-6) and state(0.25) == pytest.approx(0.25, abs=1e-6)


def test_what_each_row_reads() -> None:
    model = tiny_model("sd1")
    data = prepare(model, photos(), FAST, [CAT], seed=0)
    batch = data.batch(method.stages(FAST)[0], 1)
    with method.attach(model, FAST, [CAT]) as adapter:
        read = adapter.prompts(batch)
        assert len(set(read)) == 2 and all("<my-cat>" in text for text in read)
        assert read == adapter.prompts(batch)  # a row's own timestep decides
        batch.prior = torch.tensor([False, True])
        assert adapter.prompts(batch)[1] == batch.captions[1]
    with method.attach(model, FAST.model_copy(update={"prompt": "captions"}), [CAT]) as adapter:
        assert adapter.prompts(batch) == batch.captions


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("sd1")
    with method.attach(model, method.Params(), [CAT]) as adapter:
        for tensors, reason in (
            ({}, "no learned token"),
            ({"tokens.text_encoder": torch.zeros(1, 8)}, "brings 1 x 8 numbers.*needs 1 x 32"),
            ({"tokens.text_encoder": torch.full((1, 32), float("inf"))}, "broken"),
        ):
            with pytest.raises(StudioError, match=reason):
                adapter.load(tensors)
        with pytest.raises(StudioError, match="no meaning"):
            adapter.strength = float("nan")


def test_loss_falls_on_one_batch(model: Model) -> None:
    data = prepare(model, photos(1), FAST, [CAT], seed=0)
    batch = data.batch(method.stages(FAST)[0], 1)
    with method.attach(model, FAST, [CAT]) as adapter:
        stage = method.stages(FAST)[0]
        optimizer = torch.optim.AdamW(adapter.param_groups(stage))
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            value = sum(method.loss(model, adapter, batch, stage).values())
            value.backward()  # type: ignore[union-attr]
            optimizer.step()
            losses.append(float(value.detach()))  # type: ignore[union-attr]
    assert losses[-1] < losses[0]


def test_names_that_differ_by_a_hyphen_are_two_tokens(model: Model) -> None:
    pair = (Subject("<my-cat>", "cat"), Subject("<mycat>", "dog"))
    with learned_tokens(model, pair) as learned:
        assert len(learned.tokens) == 2 and len(set(learned.tokens)) == 2
        assert learned.tensors()["tokens.text_encoder"].shape[0] == 2
