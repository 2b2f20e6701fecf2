"""What every method keeps, with every preset: found by looking, so a new method is held to it without an edit here.

On tiny models, with every stage cut to three steps. The output that is compared is the UNet's own, in floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.attach import attached
from pipelines.concept import Subject, Trained
from pipelines.data import prepare
from pipelines.events import Event, Finished, Progress
from pipelines.files import save_tensors
from pipelines.intake import load_tensors
from pipelines.methods import get_method, method_names
from pipelines.model import Model
from pipelines.preset import Preset, load_preset, presets
from pipelines.settings import fields, validated
from pipelines.train import train
from tests.test_data import photos
from tests.tiny import tiny_model

STEPS = 3
CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
EVERY = pytest.mark.parametrize("preset", presets(), ids=lambda preset: f"{preset.method}-{preset.name}")


@cache
def model() -> Model:
    return tiny_model("sd1")


def cut(name: str) -> Any:
    """The method with short stages."""
    method = get_method(name)

    def stages(params: Any) -> list[Any]:
        return [replace(stage, steps=STEPS, batch_size=min(2, stage.batch_size)) for stage in method.stages(params)]

    names = ("name", "title", "paper", "Params", "attach", "loss")
    return SimpleNamespace(**{key: getattr(method, key) for key in names}, stages=stages)


def start(preset: Preset, subject: Subject, folder: Path | None = None, resume: bool = False) -> Iterator[Event]:
    params = preset.params.model_copy(update={"resolution": 0, "checkpoint_every": 1})
    prior = [(photo.image, f"a photo of a {subject.noun}") for photo in photos(2)]
    data = prepare(model(), photos(), params, [subject], seed=4, prior=prior)
    return train(model(), cut(preset.method), data, params, seed=4, checkpoint=folder, resume=resume)


@cache
def trained(method: str, name: str, subject: Subject) -> Trained:
    (preset,) = (preset for preset in presets(method) if preset.name == name)
    (*_, last) = start(preset, subject)
    assert isinstance(last, Finished)
    made: Trained = last.value
    return made


def concepts(preset: Preset) -> tuple[Trained, Trained]:
    return trained(preset.method, preset.name, CAT), trained(preset.method, preset.name, DOG)


@torch.no_grad()
def output(prompt: str) -> Tensor:
    """What the UNet says of the same noise, (1, 4, 16, 12): not square."""
    base = model()
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    text = base.encode([prompt])
    result: Tensor = base.unet(
        noise, torch.tensor([400]), text.states, **base.conditioning(text, [(64, 48)], [(0, 0)], [(64, 48)])
    ).sample
    return result


def everything() -> dict[str, Tensor]:
    base = model()
    modules = {"unet": base.unet, "vae": base.vae} | {f"text{i}": part for i, part in enumerate(base.text_encoders)}
    return {
        f"{part}.{name}": value.clone()
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }


def objects() -> list[int]:
    """The identity of every module, parameter, hook and processor."""
    base = model()
    found: list[int] = []
    for root in (base.unet, base.vae, *base.text_encoders):
        for module in root.modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            found += [id(module), type(module).__qualname__.__hash__(), *(len(hook) for hook in hooks)]
            found += [id(parameter) for parameter in module._parameters.values()]
            found += [parameter.requires_grad for parameter in module._parameters.values() if parameter is not None]
    return [*found, *(id(processor) for processor in base.unet.attn_processors.values()), len(base.placeholders)]


@EVERY
def test_the_preset_is_valid_and_complete(preset: Preset) -> None:
    method = get_method(preset.method)
    assert method.name == preset.method and method.title and method.paper.startswith("https://")
    assert validated(method.Params, preset.params.model_dump()) == preset.params
    assert all(field.help for field in fields(method.Params))
    assert all(stage.steps > 0 for stage in method.stages(preset.params))


def test_every_method_has_a_preset() -> None:
    assert method_names()
    for name in method_names():
        assert presets(name) and load_preset(name, None, "toybox") and load_preset(name, None, "sd1")


@EVERY
def test_strength_zero_is_the_base(preset: Preset) -> None:
    before = output("a photo of a cat in the snow")
    for one in concepts(preset):
        with attached(model(), [(one, 0.0)]):
            named = output(f"a photo of a {one.concept.subjects[0].token} in the snow")
            assert torch.equal(named, output(f"a photo of a {one.concept.subjects[0].noun} in the snow"))
            assert torch.equal(before, output("a photo of a cat in the snow"))


@EVERY
def test_three_steps_change_the_output_and_strength_scales_it(preset: Preset) -> None:
    one, _ = concepts(preset)
    seen = []
    for strength in (1.0, 0.5, 0.0):
        with attached(model(), [(one, strength)]):
            seen.append(output("a photo of a <my-cat> in the snow"))
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert all(outcome.isfinite().all() for outcome in seen)


@EVERY
def test_detaching_restores_everything(preset: Preset) -> None:
    one, _ = concepts(preset)
    before, same = everything(), objects()
    with attached(model(), [(one, 1.0)]):
        output("a <my-cat>")
    assert objects() == same
    with pytest.raises(RuntimeError, match="in the middle"), attached(model(), [(one, 0.7)]):
        raise RuntimeError("in the middle")
    assert objects() == same
    for stop in range(1, STEPS + 1):
        events = start(preset, CAT)
        while not (isinstance(event := next(events), Progress) and event.step == stop):
            pass
        events.close()  # type: ignore[attr-defined]
        assert objects() == same
    after = everything()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@EVERY
def test_save_and_load_give_the_same_output(preset: Preset, tmp_path: Path) -> None:
    one, _ = concepts(preset)
    with attached(model(), [(one, 0.8)]):
        expected = output("a photo of a <my-cat>")
    save_tensors(tmp_path / "w.safetensors", one.tensors)
    tensors, _ = load_tensors(tmp_path / "w.safetensors")
    with attached(model(), [(Trained(one.concept, tensors), 0.8)]) as (adapter,):
        assert torch.equal(expected, output("a photo of a <my-cat>"))
        kept = adapter.tensors()
        assert kept.keys() == tensors.keys() and all(torch.equal(kept[name], tensors[name]) for name in kept)


@EVERY
def test_what_training_saw_is_what_generation_gives(preset: Preset) -> None:
    """The adapter in training, with its last step done, and the finished concept say the same (up to rounding)."""
    seen = None
    for event in start(preset, CAT):
        if isinstance(event, Progress) and event.step == STEPS:
            seen = output("a photo of a <my-cat>")
    one, _ = concepts(preset)
    with attached(model(), [(one, 1.0)]):
        assert seen is not None and torch.allclose(seen, output("a photo of a <my-cat>"), atol=1e-4)


@EVERY
def test_concepts_go_on_and_off_in_any_order(preset: Preset) -> None:
    """Also with one of every other method beside it."""
    others = [trained(name, presets(name)[0].name, CAT) for name in method_names() if name != preset.method]
    _, dog = concepts(preset)
    cat = (others or [concepts(preset)[0]])[0]
    pair = {"cat": cat, "dog": dog}
    prompt = {"cat": "a photo of a <my-cat>", "dog": "a photo of a <my-dog>"}
    before, same, alone = output("a cat"), objects(), {}
    for name, one in pair.items():
        with attached(model(), [(one, 1.0)]):
            alone[name] = output(prompt[name])
    for on in permutations(pair):
        for off in permutations(pair):
            contexts = {name: attached(model(), [(pair[name], 1.0)]) for name in on}
            for name in on:
                contexts[name].__enter__()
            output("a <my-cat> and a <my-dog>")
            contexts[off[0]].__exit__(None, None, None)
            assert torch.equal(alone[off[1]], output(prompt[off[1]]))
            contexts[off[1]].__exit__(None, None, None)
            assert objects() == same and torch.equal(before, output("a cat"))


@EVERY
def test_two_concepts_of_one_method_stand_together(preset: Preset) -> None:
    cat, dog = concepts(preset)
    with attached(model(), [(cat, 1.0), (dog, 1.0)]):
        both = output("a <my-cat> and a <my-dog>")
    with attached(model(), [(cat, 1.0), (dog, 0.0)]):
        assert not torch.equal(both, output("a <my-cat> and a <my-dog>"))
    assert both.isfinite().all()


@EVERY
@pytest.mark.parametrize("stop", [1, 2])
def test_resume_equals_an_uninterrupted_run(preset: Preset, stop: int, tmp_path: Path) -> None:
    one, _ = concepts(preset)
    events = start(preset, CAT, tmp_path)
    while not (isinstance(event := next(events), Progress) and event.step == stop):
        pass
    events.close()  # type: ignore[attr-defined]
    (*_, last) = start(preset, CAT, tmp_path, resume=True)
    assert isinstance(last, Finished)
    resumed = last.value.tensors
    assert resumed.keys() == one.tensors.keys()
    assert all(torch.equal(resumed[name], one.tensors[name]) for name in resumed)


@EVERY
def test_the_form_gives_back_what_it_shows(preset: Preset) -> None:
    from studio import forms

    kind = type(preset.params)
    shown = {s.name: forms.component(s, getattr(preset.params, s.name)).value for s in fields(kind)}
    assert forms.read(kind, shown) == preset.params
    assert forms.read(kind, {s.name: forms.component(s, s.default).value for s in fields(kind)}) == kind()
