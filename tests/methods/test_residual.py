"""Cones 2: what trains, what holds it, what is kept, and that the base never notices."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.batch import Batch
from pipelines.concept import Subject
from pipelines.data import Data, prepare
from pipelines.errors import StudioError
from pipelines.events import Finished, Progress
from pipelines.methods import residual
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.templates import TEMPLATES, filled
from pipelines.train import train
from tests.tiny import tiny_model

CAT = Subject("<my-cat>", "cat")
MUSHROOM = Subject("<my-mushroom>", "mushroom")  # several tokens
FAST = residual.Params(steps=3, lr=1e-3, checkpoint_every=1)


def photos(count: int = 3) -> list[Photo]:
    pixels = np.random.default_rng(0)
    return [
        Photo(Path(f"{number}.png"), pixels.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for number in range(count)
    ]


def data(model: Model, params: residual.Params, subjects: Sequence[Subject] = (CAT,)) -> Data:
    return prepare(model, photos(), params, subjects, seed=0)


def first_batch(model: Model, params: residual.Params, subject: Subject = CAT) -> Batch:
    return data(model, params, (subject,)).batch(residual.stages(params)[0], 1)


@contextmanager
def moved_adapter(model: Model, params: residual.Params, subject: Subject = CAT) -> Iterator[residual.Residual]:
    """The adapter after its encoder was pushed somewhere."""
    with residual.attach(model, params, (subject,)) as adapter:
        chance = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.param_groups(residual.stages(params)[0])[0]["params"]:
                parameter += 0.02 * torch.randn(parameter.shape, generator=chance)
        yield adapter


@pytest.fixture(params=["sd1", "sd2v", "sdxl"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    yield tiny_model(request.param)


def weights(model: Model) -> dict[str, torch.Tensor]:
    parts = {"unet": model.unet, "vae": model.vae} | {f"text{i}": e for i, e in enumerate(model.text_encoders)}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def test_only_copies_of_the_text_encoder_train(model: Model) -> None:
    encoders, before = model.text_encoders, {name: value.clone() for name, value in weights(model).items()}
    states = model.encode(["a photo of a cat"]).states
    trained = [
        event.value for event in train(model, residual, data(model, FAST), FAST, seed=0) if isinstance(event, Finished)
    ][0]

    assert all(now is then for now, then in zip(model.text_encoders, encoders, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert not any(p.requires_grad for e in (*model.text_encoders, model.unet, model.vae) for p in e.parameters())
    assert not model.placeholders
    assert torch.equal(model.encode(["a photo of a cat"]).states, states)
    rows = trained.tensors["residual"]
    assert rows.shape == (1, states.shape[-1]) and rows.dtype == torch.float32 and not rows.requires_grad
    assert rows.norm() > 0


def test_every_parameter_that_matters_gets_a_gradient_through_the_unet() -> None:
    model = tiny_model("sd2")
    with residual.attach(model, FAST, (CAT,)) as adapter:
        (group,) = adapter.param_groups(residual.stages(FAST)[0])
        assert len(group["params"]) == len(list(model.text_encoders[0].parameters()))
        losses = residual.loss(model, adapter, first_batch(model, FAST), residual.stages(FAST)[0])
        losses["denoising"].backward()
        assert all(parameter.grad is not None for parameter in group["params"])
        assert sum(float(parameter.grad.abs().sum()) for parameter in group["params"]) > 0


def test_the_loss_is_the_published_formula() -> None:
    model, params = tiny_model("sd2"), residual.Params(steps=3, anchor_start=1e-2, anchor_rest=1e-3)
    batch = first_batch(model, params)
    with moved_adapter(model, params) as adapter:
        losses = residual.loss(model, adapter, batch, residual.stages(params)[0])
        tuned = copy.deepcopy(model.text_encoders[0])
        groups = adapter.param_groups(residual.stages(params)[0])
        with torch.no_grad():
            for own, learned in zip(tuned.parameters(), groups[0]["params"], strict=True):
                own.copy_(learned)
        ids = model.tokenizers[0]("cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
        after, before = tuned(ids)[0][0], model.text_encoders[0](ids)[0][0]

    start = ((before[0:1] - after[0:1]) ** 2).sum().sqrt()
    rest = ((before[2:77] - after[2:77]) ** 2).sum().sqrt()
    torch.testing.assert_close(losses["start"], 1e-2 * start)
    torch.testing.assert_close(losses["rest"], 1e-3 * rest)
    assert losses["start"] > 0 and losses["rest"] > 0


def test_anchors_are_norms_of_each_row_averaged() -> None:
    """Photos of one batch read templates of different lengths; the loss is the mean of what each alone has."""
    model = tiny_model("sd1")
    params = residual.Params(steps=3, batch_size=3, prompt="templates")
    batch = first_batch(model, params)
    batch = replace(batch, timesteps=torch.tensor([0, 4, 10]))  # templates of 5, 6 and 6 words
    with moved_adapter(model, params) as adapter:
        stage = residual.stages(params)[0]
        together = residual.loss(model, adapter, batch, stage)
        alone = [
            residual.loss(
                model,
                adapter,
                replace(
                    batch,
                    latents=batch.latents[[row]],
                    noise=batch.noise[[row]],
                    timesteps=batch.timesteps[[row]],
                    captions=batch.captions[:1],
                    prior=batch.prior[[row]],
                    original_sizes=batch.original_sizes[:1],
                    crops=batch.crops[:1],
                    target_sizes=batch.target_sizes[:1],
                ),
                stage,
            )
            for row in range(3)
        ]
    for part in ("denoising", "start", "rest"):
        torch.testing.assert_close(together[part], torch.stack([each[part] for each in alone]).mean())


@pytest.mark.parametrize("prompt", ["noun", "templates", "captions"])
def test_nothing_learned_costs_nothing_and_gives_finite_gradients(prompt: Any) -> None:
    model, params = tiny_model("sd1"), residual.Params(steps=3, batch_size=2, prompt=prompt)
    with residual.attach(model, params, (CAT,)) as adapter:
        losses = residual.loss(model, adapter, first_batch(model, params), residual.stages(params)[0])
        assert losses["start"] == 0 and losses["rest"] == 0
        sum(losses.values()).backward()  # type: ignore[union-attr]
        (group,) = adapter.param_groups(residual.stages(params)[0])
        assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in group["params"])
        assert torch.equal(adapter.tensors()["residual"], torch.zeros(1, 32))


@pytest.mark.parametrize("subject", [CAT, MUSHROOM])
def test_export_is_the_mean_over_the_templates_at_the_nouns_tokens(model: Model, subject: Subject) -> None:
    with moved_adapter(model, FAST, subject) as adapter:
        rows = adapter.tensors()["residual"]
        pairs = [
            (adapter._learning().states([text]), model.tokenize(text), place)
            for text, place in (filled(template, subject.noun) for template in TEMPLATES)
        ]
    change = []
    for pair, tokens, (start, end) in pairs:
        where = [i for i, (a, b) in enumerate(tokens.offsets) if a < b and start <= a and b <= end]
        change.append((pair.tuned - pair.frozen).detach()[0, where])
    torch.testing.assert_close(rows, torch.stack(change).mean(0))
    assert (len(rows) == 1) == (subject is CAT)


def test_each_step_shows_in_the_next_picture() -> None:
    model = tiny_model("sd1")
    stage = residual.stages(FAST)[0]
    with residual.attach(model, FAST, (CAT,)) as adapter:
        groups = adapter.param_groups(stage)
        kinds: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]
        for optimizer in (torch.optim.AdamW(groups, **kind) for kind in kinds):
            before, again = model.encode(["a <my-cat>"]).states, model.encode(["a <my-cat>"]).states
            assert torch.equal(before, again)
            sum(residual.loss(model, adapter, first_batch(model, FAST), stage).values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            assert not torch.equal(model.encode(["a <my-cat>"]).states, before)


def test_a_noun_that_a_template_says_too_is_found_in_its_own_place() -> None:
    """Matching the first token's id would take the template's "photo"."""
    text, place = filled(TEMPLATES[0], "photo")
    model = tiny_model("sd1")
    with residual.attach(model, FAST, (Subject("<p>", "photo"),)) as adapter:
        assert adapter._reading(text, [place])[1] == [5]


def test_a_prompt_changes_in_the_nouns_rows_only(model: Model) -> None:
    width = model.encode(["cat"]).states.shape[-1]
    rows = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    plain, empty = model.encode(["a cat, a dog and a cat"]), model.encode([""])
    with residual.attach(model, FAST, (CAT,)) as adapter:
        adapter.load({"residual": rows})
        shifted = model.encode(["a cat, a dog and a <my-cat>"])
        assert torch.equal(model.encode([""]).states, empty.states)
        assert torch.equal(model.encode(["a cat, a dog and a cat"]).states, plain.states)
        adapter.strength = 0.5
        half = model.encode(["a cat, a dog and a <my-cat> cat"])
        adapter.strength = 0.0
        assert torch.equal(model.encode(["a cat, a dog and a <my-cat>"]).states, plain.states)
    assert (shifted.states != plain.states).any(-1)[0].nonzero().flatten().tolist() == [8]
    torch.testing.assert_close(shifted.states[0, 8] - plain.states[0, 8], rows[0])
    torch.testing.assert_close(half.states[0, 8] - plain.states[0, 8], 0.5 * rows[0])
    if plain.pooled is not None:
        assert torch.equal(shifted.pooled, plain.pooled)


def test_saved_rows_do_what_the_training_encoder_showed(model: Model) -> None:
    with moved_adapter(model, FAST, MUSHROOM) as adapter:
        shown, saved = model.encode(["a <my-mushroom> on sand"]).states, adapter.tensors()
    with residual.attach(model, FAST, (MUSHROOM,)) as adapter:
        assert torch.equal(
            model.encode(["a <my-mushroom> on sand"]).states, model.encode(["a mushroom on sand"]).states
        )
        adapter.load(saved)
        assert torch.equal(model.encode(["a <my-mushroom> on sand"]).states, shown)
        assert torch.equal(adapter.tensors()["residual"], saved["residual"])


def test_resume_keeps_the_frozen_anchor_and_ends_bit_identical(tmp_path: Path) -> None:
    params = FAST.model_copy(update={"steps": 4})

    def whole() -> tuple[torch.Tensor, list[dict[str, float]]]:
        model = tiny_model("sd1")
        events = list(train(model, residual, data(model, params), params, seed=0))
        return events[-1].value.tensors["residual"], [e.values for e in events if isinstance(e, Progress)]

    model = tiny_model("sd1")
    run = train(model, residual, data(model, params), params, seed=0, checkpoint=tmp_path)
    for event in run:
        if isinstance(event, Progress) and event.step == 2:
            run.close()  # type: ignore[attr-defined]
    fresh = tiny_model("sd1")
    rest = list(train(fresh, residual, data(fresh, params), params, seed=0, checkpoint=tmp_path, resume=True))
    rows, values = whole()
    later = [event.values for event in rest if isinstance(event, Progress)]
    assert later == values[2:]  # the anchors among them: measured from the base, not from where the stop was
    assert later[0]["rest"] > 0
    assert torch.equal(rest[-1].value.tensors["residual"], rows)


def test_closing_mid_training_leaves_the_model_alone() -> None:
    model = tiny_model("sd1")
    encoder = model.text_encoders[0]
    before = {name: value.clone() for name, value in weights(model).items()}
    run = train(model, residual, data(model, FAST), FAST, seed=0)
    next(event for event in run if isinstance(event, Progress))
    run.close()  # type: ignore[attr-defined]
    assert model.text_encoders[0] is encoder and not model.placeholders
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_half_precision_base_trains_an_fp32_encoder() -> None:
    model = tiny_model("sd1")
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to(torch.bfloat16)
    events = list(train(model, residual, data(model, FAST), FAST, seed=0))
    first = next(event for event in events if isinstance(event, Progress))
    assert first.values["rest"] == 0  # the anchor too was measured in fp32
    assert events[-1].value.tensors["residual"].norm() > 0
    assert model.text_encoders[0].dtype == torch.bfloat16


def test_two_residuals_go_on_and_off_in_any_order() -> None:
    model = tiny_model("sd1")
    one = residual.attach(model, FAST, (CAT,))
    two = residual.attach(model, FAST, (Subject("<my-dog>", "dog"),))
    one.__enter__().load({"residual": torch.ones(1, 32)})
    two.__enter__().load({"residual": torch.full((1, 32), 2.0)})
    plain = model.encode(["a cat and a dog"]).states
    both = model.encode(["a <my-cat> and a <my-dog>"]).states - plain
    assert both[0].abs().sum(-1).nonzero().flatten().tolist() == [2, 5]
    one.__exit__(None, None, None)
    alone = model.encode(["a cat and a <my-dog>"]).states
    assert torch.equal(alone[0, 2], plain[0, 2]) and not torch.equal(alone[0, 5], plain[0, 5])
    two.__exit__(None, None, None)
    assert not model.placeholders and torch.equal(model.encode(["a cat and a dog"]).states, plain)


def test_what_does_not_fit_is_refused_in_words() -> None:
    model = tiny_model("sd1")
    with residual.attach(model, FAST, (CAT,)) as adapter:
        with pytest.raises(StudioError, match="48 wide, those of this base have 32"):
            adapter.load({"residual": torch.ones(1, 48)})
        with pytest.raises(StudioError, match="changes 2 token"):
            adapter.load({"residual": torch.ones(2, 32)})
        with pytest.raises(StudioError, match="one tensor 'residual'"):
            adapter.load({"other": torch.ones(1, 32)})
    with pytest.raises(StudioError, match="one subject at a time"), residual.attach(model, FAST, (CAT, MUSHROOM)):
        pass
    with pytest.raises(StudioError, match="can't read"), residual.attach(model, FAST, (Subject("<x>", "  "),)):
        pass
    twice = residual.attach(model, FAST, (CAT,)), residual.attach(model, FAST, (CAT,))
    with pytest.raises(StudioError, match="Two concepts answer to <my-cat>"), twice[0], twice[1]:
        pass
    assert not model.placeholders
    with pytest.raises(ValueError, match="prior_weight must be 0"):
        residual.Params(prior_weight=1.0)
