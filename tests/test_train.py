"""The training loop: repeatable, restoring, stopping and going on, and never keeping what is not a number."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.checkpoint import Checkpoint, Checkpoints, newest
from pipelines.concept import Trained
from pipelines.data import Data, prepare
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Progress, Snapshot
from pipelines.generate import Request, generate
from pipelines.methods import Stage, get_method, method_names
from pipelines.model import Model
from pipelines.train import train
from tests.test_data import CAT, photos
from tests.tiny import tiny_model

METHODS = method_names()
# methods that train in one stage unless told otherwise
ONE_STAGE = [name for name in METHODS if len(get_method(name).stages(get_method(name).Params())) == 1]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def settings(name: str, **changes: Any) -> Any:
    quick = {"steps": 4, "batch_size": 2, "prior_weight": 0.0, "checkpoint_every": 0, "lr": 1e-3, "masked_loss": True}
    known = get_method(name).Params.model_fields
    last_alone = {field: 0 for field in ("embedding_steps", "attention_steps") if field in known}
    return get_method(name).Params(**(quick | last_alone | changes))


def start(model: Model, name: str, seed: int = 1, folder: Path | None = None, **options: Any) -> Iterator[Event]:
    resume, method = options.pop("resume", False), options.pop("method", None) or get_method(name)
    params = settings(name, **options)
    data = prepare(model, photos(), params, CAT, seed)
    return train(model, method, data, params, seed=seed, checkpoint=folder, resume=resume)


def result(events: Iterator[Event]) -> dict[str, Tensor]:
    last = list(events)[-1]
    assert isinstance(last, Finished) and isinstance(last.value, Trained)
    return last.value.tensors


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(model: Model) -> dict[str, Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, "text": model.text_encoders[0]}
    return {
        f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_events_and_result(model: Model, name: str) -> None:
    before, processors = state(model), dict(model.unet.attn_processors)
    events = list(start(model, name))
    steps = [event for event in events if isinstance(event, Progress)]
    assert [step.step for step in steps] == [1, 2, 3, 4] and {step.total for step in steps} == {4}
    assert all(step.values["denoising"] > 0 and step.values["gradient"] > 0 for step in steps)
    assert steps[-1].eta == 0 and all(step.eta is not None for step in steps)
    trained = events[-1].value  # type: ignore[union-attr]
    assert trained.concept.name == "my-cat" and trained.concept.method == name
    assert trained.concept.base_model["fingerprint"] == model.fingerprint
    assert any(tensor.abs().max() > 0 for tensor in trained.tensors.values())
    assert same(before, state(model)) and model.unet.attn_processors == processors and not model.placeholders


@pytest.mark.parametrize("name", METHODS)
def test_nothing_around_it_changes_it_and_it_changes_nothing_around(model: Model, name: str) -> None:
    """Twice the same; pictures painted in between and other people's random numbers make no difference."""
    expected = result(start(model, name))
    trained = None
    request = Request("a photo of <my-cat> in the snow", steps=2, preview_every=0)
    for number, event in enumerate(start(model, name)):
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)
        if isinstance(event, Progress) and event.step < 3:
            list(generate(model, request))
        trained = event
    assert isinstance(trained, Finished) and same(expected, trained.value.tensors)
    assert not same(expected, result(start(model, name, seed=2)))


@pytest.mark.parametrize("name", METHODS)
def test_global_randomness_is_left_alone(model: Model, name: str) -> None:
    numpy_before = np.random.get_state()[1]
    before = torch.get_rng_state(), random.getstate()
    for _ in start(model, name):
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
        assert np.array_equal(numpy_before, np.random.get_state()[1]) and torch.is_grad_enabled()


@pytest.mark.parametrize("name", METHODS)
def test_closing_keeps_a_checkpoint_and_restores_the_model(model: Model, name: str, tmp_path: Path) -> None:
    expected, before = result(start(model, name)), state(model)
    events = start(model, name, folder=tmp_path)
    while not (isinstance(event := next(events), Progress) and event.step == 2):
        pass
    events.close()  # type: ignore[attr-defined]
    assert same(before, state(model)) and not model.placeholders
    point = newest(tmp_path)
    assert point is not None and point.done == 2
    assert set(point.part("adapter")) == set(expected) and not same(point.part("adapter"), expected)
    resumed = list(start(model, name, folder=tmp_path, resume=True))
    assert "Going on after step 2" in resumed[0].text  # type: ignore[union-attr]
    assert [event.step for event in resumed if isinstance(event, Progress)] == [3, 4]
    assert same(expected, result(iter(resumed)))


def two_stages(name: str) -> Any:
    """The method in two stages with different optimizers, as some papers train."""
    method = get_method(name)
    made = [Stage("first", 3, 2, 1e-2, 1.0), Stage("second", 4, 1, 0.0, 0.0)]
    names = ("name", "title", "paper", "Params", "attach", "loss")
    return SimpleNamespace(**{key: getattr(method, key) for key in names}, stages=lambda params: made)


@pytest.mark.parametrize("name", ONE_STAGE)
@pytest.mark.parametrize("stop", [3, 5])
def test_stages_resume_too(model: Model, name: str, stop: int, tmp_path: Path) -> None:
    method = two_stages(name)
    expected = result(start(model, name, method=method))
    events = start(model, name, method=method, folder=tmp_path)
    done = 0
    while done < stop:
        done += isinstance(next(events), Progress)
    events.close()  # type: ignore[attr-defined]
    resumed = list(start(model, name, method=method, folder=tmp_path, resume=True))
    assert sum(isinstance(event, Progress) for event in resumed) == 7 - stop
    assert same(expected, result(iter(resumed)))


def poisoned(name: str, at: int, value: float) -> Any:
    """The method whose loss is no number from step `at` on."""
    method, calls = get_method(name), []

    def loss(*args: Any) -> dict[str, Tensor]:
        calls.append(1)
        losses = method.loss(*args)
        return {key: loss * value if len(calls) >= at else loss for key, loss in losses.items()}

    names = ("name", "title", "paper", "Params", "stages", "attach")
    return SimpleNamespace(**{key: getattr(method, key) for key in names}, loss=loss)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_in_the_same_step_and_is_never_written(model: Model, name: str, value: float, tmp_path: Path) -> None:
    before, done = state(model), []
    with pytest.raises(StudioError, match="Lower lr"):
        for event in start(model, name, folder=tmp_path, checkpoint_every=1, method=poisoned(name, 3, value)):
            done.append(event)
    assert [event.step for event in done if isinstance(event, Progress)] == [1, 2]
    point = newest(tmp_path)
    assert point is not None and point.done == 2 and all(t.isfinite().all() for t in point.tensors.values())
    assert same(before, state(model)) and not model.placeholders
    checkpoints = Checkpoints(tmp_path, "other")
    with pytest.raises(StudioError, match="NaN"):
        checkpoints.save(Checkpoint(0, 9, 9, {"trainable/0": torch.tensor([1.0, value])}))
    assert newest(tmp_path).done == 2  # type: ignore[union-attr]


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(model: Model, tmp_path: Path) -> None:
    expected = result(start(model, "svdiff"))
    events = list(start(model, "svdiff", folder=tmp_path, checkpoint_every=1))
    assert [event.info["step"] for event in events if isinstance(event, Snapshot)] == [1, 2, 3, 4]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["checkpoint-00000003.safetensors", "checkpoint-00000004.safetensors"]
    data = bytearray((tmp_path / files[1]).read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / files[1]).write_bytes(data)
    resumed = list(start(model, "svdiff", folder=tmp_path, resume=True))
    notes = [event.text for event in resumed if isinstance(event, Note)]
    assert "checkpoint-00000004.safetensors is damaged" in notes[0] and "after step 3" in notes[1]
    assert same(expected, result(iter(resumed)))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "config")
    tensors = {"trainable/0": torch.randn(40), "optimizer/0/step": torch.tensor(3.0)}
    path = checkpoints.save(Checkpoint(1, 2, 5, tensors))
    point = checkpoints.latest([])
    assert point is not None and (point.stage, point.step, point.done) == (1, 2, 5) and same(point.tensors, tensors)
    data = path.read_bytes()
    chance = random.Random(0)
    for position in chance.sample(range(8 * len(data)), 1000):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert newest(tmp_path) is None, position
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        assert newest(tmp_path) is None


def test_other_settings_photos_or_base_are_not_mixed_in(model: Model, tmp_path: Path) -> None:
    list(start(model, "svdiff", folder=tmp_path, checkpoint_every=2))
    for changes in ({"lr": 1e-4}, {"seed": 5}, {"flip": True}):
        with pytest.raises(StudioError, match="other settings, photos or another base"):
            list(start(model, "svdiff", folder=tmp_path, resume=True, **changes))
    with pytest.raises(StudioError, match="another base"):
        list(start(tiny_model("sd1", seed=7), "svdiff", folder=tmp_path, resume=True))
    method, params = get_method("svdiff"), settings("svdiff")
    data = prepare(model, photos(2), params, CAT, 1)
    with pytest.raises(StudioError, match="photos"):
        list(train(model, method, data, params, seed=1, checkpoint=tmp_path, resume=True))


def test_a_run_that_needed_too_much_memory_goes_on_in_smaller_parts(model: Model, tmp_path: Path) -> None:
    list(start(model, "svdiff", folder=tmp_path, checkpoint_every=2))
    events = list(start(model, "svdiff", folder=tmp_path, resume=True, micro_batch=1))
    assert isinstance(events[0], Note) and "going on" in events[0].text.lower()


def test_resuming_with_nothing_there_starts_anew(model: Model, tmp_path: Path) -> None:
    events = list(start(model, "svdiff", folder=tmp_path, resume=True))
    assert isinstance(events[0], Note) and "starting at step 1" in events[0].text
    assert same(result(iter(events)), result(start(model, "svdiff")))


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system's own way to say that there is no room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_the_checkpoint_not_the_run(model: Model, tmp_path: Path) -> None:
    with small_disk(1000):
        events = list(start(model, "svdiff", folder=tmp_path, checkpoint_every=2))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 2 and all("disk is full" in note and "training goes on" in note for note in notes)
    assert same(result(iter(events)), result(start(model, "svdiff"))) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_bases_train_in_fp32(name: str) -> None:
    model = tiny_model("sd1")
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to(torch.bfloat16)
    before = state(model)
    tensors = result(start(model, name))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert same(before, state(model))


@pytest.mark.parametrize("kind", ["sd2v", "sdxl"])
@pytest.mark.parametrize("name", METHODS)
def test_other_bases(name: str, kind: str) -> None:
    model = tiny_model(kind)
    tensors = result(start(model, name, steps=2))
    assert any(tensor.abs().max() > 0 for tensor in tensors.values())


def test_training_learns(model: Model) -> None:
    """On one photo with one noise the loss falls: the sign of the gradient and the target belong together."""
    params = settings("svdiff", steps=25, lr=5e-2, batch_size=1)
    data: Data = prepare(model, photos(1), params, CAT, 0)
    fixed = data.batch(Stage("x", 1, 1), 1)
    data.batch = lambda stage, step: fixed  # type: ignore[method-assign]
    events = train(model, get_method("svdiff"), data, params, seed=0)
    losses = [event.values["denoising"] for event in events if isinstance(event, Progress)]
    assert losses[-1] < 0.9 * losses[0]
