"""Concepts in regions: the plain adapter where a region is the whole picture, the base outside, any methods at once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.attach import attached
from pipelines.commands.terminal import Terminal
from pipelines.concept import Concept, Subject, Trained
from pipelines.events import Heatmap, Note, Progress, Snapshot
from pipelines.first_pass import compete, split_masks
from pipelines.generate import generate
from pipelines.layout import Area, Layout, Region
from pipelines.library import Library
from pipelines.methods import dreambooth, residual, svdiff, textual_inversion
from pipelines.model import Model
from pipelines.photos import load_photos
from pipelines.pictures import read_picture
from pipelines.regions import RoutedStage, staged
from pipelines.request import Request
from pipelines.results import again, list_results, make_pictures
from pipelines.routed import shrunk
from pipelines.scene import make_scene
from pipelines.tokens import Expansion, placeholder
from pipelines.variants import layers_of
from pipelines.weights import weights_of
from pipelines.workspace import Workspace
from tests.tiny import tiny_model

WHOLE = Area.box((0, 0, 16, 16), (16, 16))
LEFT, RIGHT = Area.box((0, 0, 8, 16), (16, 16)), Area.box((8, 0, 16, 16), (16, 16))
PROMPT = "a photo of <my-cat> and <my-dog>"
REQUEST = Request(PROMPT, seeds=(3,), steps=2, preview_every=0)


def shifted(model: Model, token: str, noun: str, seed: int, **settings: Any) -> Trained:
    """An SVDiff concept with random shifts on every layer."""
    params, subject = svdiff.Params(**settings), Subject(token, noun)
    with svdiff.attach(model, params, [subject]) as adapter:
        chance = torch.Generator().manual_seed(seed)
        tensors = {
            name: 0.3 * torch.randn(values.shape, generator=chance) for name, values in adapter.tensors().items()
        }
    base = {"id": model.id, "fingerprint": model.fingerprint}
    return Trained(Concept(token.strip("<>"), (subject,), "svdiff", base, params.model_dump()), tensors)


def moved(model: Model, token: str, noun: str) -> Trained:
    """A residual."""
    width = model.encode([""]).states.shape[-1]
    rows = torch.randn(1, width, generator=torch.Generator().manual_seed(5))
    params = residual.Params().model_dump(mode="json")
    base = {"id": model.id, "fingerprint": model.fingerprint}
    return Trained(Concept(token.strip("<>"), (Subject(token, noun),), "residual", base, params), {"residual": rows})


def tuned(model: Model, token: str, noun: str, tune: Any) -> Trained:
    """DreamBooth: every weight and bias of the UNet, or low-rank changes of the attention."""
    params, subject, chance = dreambooth.Params(tune=tune), Subject(token, noun), torch.Generator().manual_seed(9)
    with dreambooth.attach(model, params, [subject]) as adapter:
        tensors = adapter.tensors()
    for name, module in weights_of(model).items() if tune == "full" else ():
        if name.startswith("unet."):
            tensors |= {f"{name}.{part}": p.detach().clone() for part, p in module.named_parameters(recurse=False)}
    tensors = {name: values + 0.1 * torch.randn(values.shape, generator=chance) for name, values in tensors.items()}
    base = {"id": model.id, "fingerprint": model.fingerprint}
    return Trained(Concept(token.strip("<>"), (subject,), "dreambooth", base, params.model_dump(mode="json")), tensors)


def inverted(model: Model, token: str, noun: str) -> Trained:
    """Textual inversion."""
    params, subject = textual_inversion.Params(), Subject(token, noun)
    with textual_inversion.attach(model, params, [subject]) as adapter:
        tensors = {name: values + 1 for name, values in adapter.tensors().items()}
    base = {"id": model.id, "fingerprint": model.fingerprint}
    dumped = params.model_dump(mode="json")
    return Trained(Concept(token.strip("<>"), (subject,), "textual_inversion", base, dumped), tensors)


def silent(*regions: Region) -> Layout:
    """Regions that concepts act in, without guidance."""
    return Layout(regions, strength=0.0)


@pytest.fixture(scope="module")
def model() -> Model:
    """Of the family with the most kinds of layers."""
    return tiny_model("sdxl")


@pytest.fixture(scope="module")
def cat(model: Model) -> Trained:
    return shifted(model, "<my-cat>", "cat", 1)


@pytest.fixture(scope="module")
def dog(model: Model) -> Trained:
    return shifted(model, "<my-dog>", "dog", 2, mode_1d="element", rare_word="hta")


def pictures(model: Model, request: Request, *concepts: Trained) -> list[np.ndarray[Any, Any]]:
    cast = [(one, 1.0) for one in concepts]
    return [event.image for event in generate(model, request, concepts=cast) if isinstance(event, Snapshot)]


@torch.no_grad()
def output(model: Model, stage: Any, request: Request, size: tuple[int, int] = (16, 16)) -> Tensor:
    """The UNet's own output for prompt and negative prompt, with the stage's regions."""
    scene = make_scene(model, replace(request, width=4 * size[1], height=4 * size[0]), encode=stage.encode)
    stage.place(scene, 1)
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    text = scene.text
    extra = model.conditioning(text, [(64, 64)], [(0, 0)], [(64, 64)])
    result: Tensor = model.unet(noise, torch.tensor(300), text.states, **extra).sample
    return result


def everything(model: Model) -> list[Any]:
    """Objects and values, to see that nothing is left behind."""
    parts = (model.unet, *model.text_encoders)
    modules = [module for part in parts for module in part.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in modules]
    return [*map(id, modules), *hooks, *((id(p), p.data_ptr()) for part in parts for p in part.parameters())]


def base_request() -> Request:
    return replace(REQUEST, prompt="a photo of cat and dog")


def test_a_region_that_is_the_whole_picture_is_the_plain_adapter(model: Model, cat: Trained, dog: Trained) -> None:
    plain = pictures(model, REQUEST, cat, dog)[0]
    whole = silent(Region("<my-cat>", WHOLE), Region("<my-dog>", WHOLE))
    assert np.array_equal(pictures(model, replace(REQUEST, layout=whole), cat, dog)[0], plain)
    assert not np.array_equal(plain, pictures(model, base_request())[0])


@torch.no_grad()
def test_where_routing_runs_a_full_region_is_the_plain_adapter_too(model: Model, cat: Trained) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = model.encode(["a cat"])
    extra = model.conditioning(text, [(64, 64)], [(0, 0)], [(64, 64)])
    with staged(model, replace(REQUEST, layout=silent(Region("<my-cat>", LEFT))), [(cat, 1.0)]) as stage:
        assert isinstance(stage, RoutedStage)
        stage.router.place(torch.ones(1, 16, 16).long(), torch.ones(77).long(), (16, 16))
        routed = model.unet(noise, torch.tensor(300), text.states, **extra).sample
    with attached(model, [(cat, 1.0)]):
        plain = model.unet(noise, torch.tensor(300), text.states, **extra).sample
    assert torch.allclose(routed, plain, atol=1e-4)  # the time is added in two parts
    assert not torch.allclose(plain, model.unet(noise, torch.tensor(300), text.states, **extra).sample, atol=1e-2)


@contextmanager
def heard(model: Model) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """What goes in and out of every layer with a weight, the last call of each."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    layers = [module for name, module in weights_of(model).items() if name.startswith("unet.")]
    handles = [
        layer.register_forward_hook(lambda module, args, out: seen.__setitem__(module, (args[0].clone(), out.clone())))
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind, size", [("sdxl", (16, 16)), ("sd1", (12, 20)), ("full", (12, 20))])
def test_every_layer_is_the_adapter_inside_and_the_base_outside(
    model: Model, cat: Trained, kind: str, size: tuple[int, int]
) -> None:
    """|h' - h| = 0 outside, |h' - (h + d)| = 0 inside, at every layer, given what comes in."""
    if kind != "sdxl":
        model = tiny_model("sd2" if kind == "full" else kind)
        cat = tuned(model, "<my-cat>", "cat", kind) if kind == "full" else shifted(model, "<my-cat>", "cat", 1)
    request = replace(REQUEST, prompt="a photo of <my-cat> and a dog", layout=silent(Region("<my-cat>", LEFT)))
    with staged(model, request, [(cat, 1.0)]) as stage, heard(model) as seen:
        output(model, stage, request, size)
    own = {at for at, word in enumerate(model_words(model, cat, request.prompt)) if word in ("sks", "cat")}
    plain = {module: call(module, seen[module][0]) for module in seen}
    with attached(model, [(cat, 1.0)]):
        adapted = {module: call(module, seen[module][0]) for module in seen}
    kinds = set()
    for module in seen:
        out, h, hd = seen[module][1], plain[module], adapted[module]
        if out.ndim == 2:  # of time: changed where it is added
            kinds.add("time")
        elif out.ndim == 4:
            middle = out.shape[3] // 2
            assert torch.equal(out[..., middle:], h[..., middle:])
            assert torch.equal(out[..., :middle], hd[..., :middle])
            kinds.add("cells")
        elif out.shape[1] == 77:
            inside = torch.tensor([at in own for at in range(77)])
            assert torch.equal(out[0], h[0]) and torch.equal(out[1, ~inside], h[1, ~inside])
            assert torch.equal(out[1, inside], hd[1, inside]) and not torch.equal(h[1, inside], hd[1, inside])
            kinds.add("words")
        else:
            width = size[1] if out.shape[1] == size[0] * size[1] else size[1] // 2
            rows, expected, changed = (t.unflatten(1, (-1, width)) for t in (out, h, hd))
            assert torch.equal(rows[:, :, width // 2 :], expected[:, :, width // 2 :])
            assert torch.equal(rows[:, :, : width // 2], changed[:, :, : width // 2])
            kinds.add("flat")
    assert kinds == {"time", "cells", "words", "flat"}


def model_words(model: Model, trained: Trained, prompt: str) -> tuple[str, ...]:
    with placeholder(model, trained.concept.subjects[0].token, Expansion("sks cat", "cat")):
        return model.tokenize(prompt).words


@torch.no_grad()
def call(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def test_the_time_is_changed_inside_alone(model: Model, cat: Trained) -> None:
    """Only the layers of time learn: the first block's cells differ from the base's on the left alone."""
    times = {name for name, module in weights_of(model).items() if "time" in name or "add_embedding" in name}
    only = replace(cat, tensors={k: v for k, v in cat.tensors.items() if k.removesuffix(".delta") in times})
    assert len(only.tensors) > 6
    block = next(m for m in model.unet.modules() if type(m).__name__ == "ResnetBlock2D")
    seen: list[Tensor] = []
    handle = block.norm2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    request = replace(REQUEST, prompt="a photo of <my-cat>")
    for one, area in ((replace(cat, tensors={}), WHOLE), (only, WHOLE), (only, LEFT)):
        with staged(model, replace(request, layout=silent(Region("<my-cat>", area))), [(one, 1.0)]) as stage:
            output(model, stage, request)
    handle.remove()
    nothing, everywhere, left = seen
    assert torch.equal(left[..., 8:], nothing[..., 8:]) and not torch.allclose(nothing, everywhere)
    assert torch.allclose(left[..., :8], everywhere[..., :8], atol=1e-5)


def test_states_of_its_own_tokens_are_the_concepts(model: Model, cat: Trained, dog: Trained) -> None:
    request = replace(REQUEST, layout=silent(Region("<my-cat>", LEFT), Region("<my-dog>", RIGHT)))
    with staged(model, request, [(cat, 1.0), (dog, 1.0)]) as stage:
        states = stage.encode([PROMPT]).states[0]
        prompt = stage.encode([PROMPT]).prompts[0]
        negative = model.encode([""]).states
    own = {
        name: [at for at, word in enumerate(prompt.words) if word in name.split()] for name in ("sks cat", "hta dog")
    }
    for trained, name in ((cat, "sks cat"), (dog, "hta dog")):
        with attached(model, [(trained, 1.0)]):
            assert torch.equal(states[own[name]], model.encode([prompt.text]).states[0][own[name]])
    rest = [at for at in range(77) if at not in own["sks cat"] + own["hta dog"]]
    assert torch.equal(states[rest], model.encode([prompt.text]).states[0][rest])
    assert torch.equal(negative, model.encode([""]).states)


def test_several_methods_each_in_its_place_and_nothing_left_behind(model: Model, cat: Trained, dog: Trained) -> None:
    house = moved(model, "<my-house>", "house")
    request = replace(REQUEST, prompt=PROMPT + " and <my-house>", seeds=(3, 4), batch=2)
    both = Layout((Region("<my-cat>", LEFT), Region("<my-dog>", RIGHT), Region("<my-house>", RIGHT)))
    before = everything(model)
    drawn = pictures(model, replace(request, layout=both), cat, dog, house)
    assert everything(model) == before
    alone = pictures(model, replace(request, layout=both, seeds=(4,), batch=1), cat, dog, house)[0]
    assert np.abs(drawn[1].astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(drawn[0], pictures(model, request, cat, dog, house)[0])
    swapped = Layout((Region("<my-cat>", RIGHT), Region("<my-dog>", LEFT), Region("<my-house>", RIGHT)))
    assert not np.array_equal(drawn[0], pictures(model, replace(request, layout=swapped), cat, dog, house)[0])
    work = generate(model, replace(request, layout=both), concepts=[(cat, 1.0), (dog, 1.0), (house, 1.0)])
    next(iter(work))
    work.close()  # type: ignore[attr-defined]
    assert everything(model) == before


def test_concepts_of_every_kind_share_a_picture(model: Model, cat: Trained) -> None:
    """Shifts, whole weights with biases, low-rank changes, a residual and learned tokens."""
    cast = [
        (cat, 1.0),
        (tuned(model, "<my-dog>", "dog", "full"), 0.8),
        (tuned(model, "<my-fish>", "fish", "lora"), 1.0),
        (moved(model, "<my-house>", "house"), 1.0),
        (inverted(model, "<my-ball>", "ball"), 1.0),
    ]
    quarters = [Area.box((4 * place, 0, 4 * place + 4, 16), (20, 20)) for place in range(5)]
    tokens = [trained.concept.subjects[0].token for trained, _ in cast]
    layout = Layout(tuple(Region(token, area) for token, area in zip(tokens, quarters, strict=True)))
    request = replace(REQUEST, prompt=" ".join(tokens), layout=layout)
    before = everything(model)
    with staged(model, request, cast) as stage:
        assert isinstance(stage, RoutedStage) and len(stage.router.variants) == 4  # the last two change no weights
        whole = output(model, stage, request)
    assert everything(model) == before and whole.isfinite().all()
    for place in range(len(cast)):
        weaker = [(one, strength / (1 + (at == place))) for at, (one, strength) in enumerate(cast)]
        with staged(model, request, weaker) as stage:
            assert not torch.equal(output(model, stage, request), whole)
    assert everything(model) == before


def test_overlapping_regions_have_both_and_a_style_acts_everywhere(model: Model, cat: Trained, dog: Trained) -> None:
    request = replace(REQUEST, layout=silent(Region("<my-cat>", LEFT)))
    with staged(model, request, [(cat, 1.0), (dog, 0.5)]) as stage:
        assert isinstance(stage, RoutedStage) and len(stage.router.variants) == 2
        style = layers_of(model)
        assert stage.router.variants[0]  # the dog has no region
        assert len(style) > len(stage.router.variants[0])
    both = replace(REQUEST, layout=silent(Region("<my-cat>", LEFT), Region("<my-dog>", WHOLE)))
    with staged(model, both, [(cat, 1.0), (dog, 1.0)]) as stage:
        assert isinstance(stage, RoutedStage)
        output(model, stage, both)
        numbers = stage.router.grid(16, 16, 1).numbers[0]
        assert len(stage.router.variants) == 4 and numbers[0, 0] == 3 and numbers[0, 15] == 2


def test_a_region_of_the_noun_says_that_the_concept_acts_everywhere(model: Model, cat: Trained, dog: Trained) -> None:
    def told(request: Request, *concepts: Trained, strength: float = 1.0) -> list[str]:
        cast = [(one, strength) for one in concepts]
        return [event.text for event in generate(model, request, concepts=cast) if isinstance(event, Note)]

    nouns = replace(REQUEST, layout=silent(Region("Cat ", LEFT), Region("<my-dog>", RIGHT)))
    (note,) = told(nouns, cat, dog)
    assert note.startswith("<my-cat> acts everywhere") and note.endswith("Name the region <my-cat> to keep it there.")
    bound = replace(REQUEST, layout=silent(Region("<my-cat>", LEFT), Region("<my-dog>", RIGHT)))
    assert told(bound, cat, dog) == [] == told(nouns, cat, dog, strength=0.0)
    alone = replace(nouns, prompt="a <my-cat>", layout=silent(Region("cat", LEFT)))
    assert told(alone, moved(model, "<my-cat>", "cat")) == [] and len(told(alone, cat)) == 1  # a residual keeps to it


def test_strength_zero_is_the_base(model: Model, cat: Trained, dog: Trained) -> None:
    request = replace(REQUEST, layout=silent(Region("<my-cat>", LEFT), Region("<my-dog>", RIGHT)))
    cast = [(cat, 0.0), (dog, 0.0)]
    made = [event.image for event in generate(model, request, concepts=cast) if isinstance(event, Snapshot)]
    assert np.array_equal(made[0], pictures(model, base_request())[0])


def test_regions_partition_every_grid() -> None:
    cells = torch.randint(0, 3, (2, 96, 64), generator=torch.Generator().manual_seed(0))
    cells[:, :48, :30] = 1
    for size in ((48, 32), (24, 16), (7, 9), (120, 80)):
        small = shrunk(cells, size, 3)
        assert small.shape == (2, *size) and 0 <= small.min() <= small.max() <= 2
        assert (small[:, : size[0] // 2 - 1, : size[1] * 30 // 64 - 1] == 1).all()


def test_cells_go_to_the_word_that_looks_there_most() -> None:
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    left = torch.exp(-((rows - 6) ** 2 + (columns - 3) ** 2) / 8)
    right = 0.2 * torch.exp(-((rows - 6) ** 2 + (columns - 12) ** 2) / 8)  # fainter, and as big as the other
    cells = compete(torch.stack([left, right])[:, None] + 0.01)[0]
    assert cells[6, 3] == 1 and cells[6, 12] == 2 and cells[0, 8] == 0
    assert abs(int((cells == 1).sum()) - int((cells == 2).sum())) <= 2
    flat = compete(torch.ones(2, 1, 12, 16))[0]
    assert flat.shape == (12, 16)


def test_concepts_of_one_noun_share_its_area_and_nobody_goes_without() -> None:
    columns = torch.arange(16.0).expand(12, 16)
    maps = torch.stack([16 - columns, columns, columns, (columns == 8).float()])
    both = torch.zeros(12, 16, dtype=torch.bool)
    both[4:8] = True
    nothing = torch.zeros_like(both)
    winners = split_masks([both, both, nothing, nothing], maps)
    assert (winners[4:8, :7] == 1).all() and (winners[4:8, 9:] == 2).all()
    assert (winners == 4).any() and (winners[both] <= 2).all()


def test_things_are_shared_out_where_masks_do_not_tell_concepts_apart() -> None:
    """One noun has both things, the other the background: each gets the thing its words look at more."""
    columns = torch.arange(16.0).expand(12, 16)
    things, everything_else = torch.zeros(12, 16, dtype=torch.bool), torch.ones(12, 16, dtype=torch.bool)
    things[4:8, 1:5], things[4:8, 9:14], things[0, 15] = True, True, True
    winners = split_masks([everything_else & ~things, things], torch.stack([20 + columns, 20 - columns]))
    assert (winners[4:8, 1:5] == 2).all() and (winners[4:8, 9:14] == 1).all()
    assert int((winners > 0).sum()) == 36  # the crumb is nobody's


def test_regions_are_found_by_a_first_pass_and_shown_before_the_second(
    model: Model, cat: Trained, dog: Trained
) -> None:
    request = replace(REQUEST, apart=True, steps=5, seeds=(3, 4), batch=2)
    events = list(generate(model, request, concepts=[(cat, 1.0), (dog, 1.0)]))
    heats = [event for event in events if isinstance(event, Heatmap)]
    assert [event.token for event in heats] == ["<my-cat>", "<my-dog>"] * 2
    assert all(event.image is not None and set(np.unique(event.values)) <= {0, 1} for event in heats)
    assert all((a.values * b.values).sum() == 0 < a.values.sum() for a, b in zip(heats[::2], heats[1::2], strict=True))
    first = [type(event) for event in events].index(Heatmap)
    steps = [(event.stage, event.step, event.total) for event in events if isinstance(event, Progress)]
    assert steps[:2] == [("regions", 1, 2), ("regions", 2, 2)] and steps[2:] == [
        ("generate", n, 5) for n in range(1, 6)
    ]
    assert all(event.stage == "regions" for event in events[:first] if isinstance(event, Progress))
    made = [event.image for event in events if isinstance(event, Snapshot)]
    assert not np.array_equal(made[0], pictures(model, replace(request, apart=False), cat, dog)[0])


def test_found_regions_are_saved_before_their_picture_is_painted(
    model: Model, cat: Trained, dog: Trained, tmp_path: Path
) -> None:
    """Beside the pictures, and read as one by nobody."""
    out = tmp_path / "out"
    request = replace(REQUEST, apart=True, seeds=(3, 4, 5), batch=2, keep=(4, 5))
    cast = [(cat, 1.0), (dog, 1.0)]
    for numbers in (("0001", "0002"), ("0003", "0004")):
        events = list(make_pictures(Workspace(tmp_path / "w"), model, request, cast, ["<my-cat>"], out))
        kept = [event for event in events if isinstance(event, Snapshot)]
        said = [(event.kind, event.path) for event in kept]
        shown = [str(out / "regions" / f"{number}.png") for number in numbers]
        painted = [str(out / f"{number}.png") for number in numbers]
        assert said == [("regions", shown[0]), ("picture", painted[0]), ("regions", shown[1]), ("picture", painted[1])]
        assert [event.info["regions"] for event in kept if event.kind == "picture"] == shown
        last = [event for event in events[: events.index(kept[0])] if isinstance(event, Progress)][-1]
        assert last.stage == "regions"
    with Image.open(shown[0]) as sheet:
        assert sheet.size == (2 * 64 + 4, 64 + 16) and read_picture(shown[0])["attune"] is None
    assert len(load_photos(out)) == 4 and [result.pictures for result in list_results(Workspace(tmp_path / "w"))] == []
    list(make_pictures(Workspace(tmp_path / "w"), model, request, cast))
    (result,) = list_results(Workspace(tmp_path / "w"))
    assert len(result.paths) == 2 and (result.folder / "regions" / "0001.png").is_file()


def test_the_terminal_prints_regions_but_counts_them_as_no_result() -> None:
    terminal = Terminal(err=io.StringIO())
    terminal.show(Snapshot("regions", path="out/regions/0001.png"))
    assert terminal.err.getvalue() == "regions: out/regions/0001.png\n" and terminal.kept == []  # type: ignore[attr-defined]


def test_two_concepts_that_change_weights_are_kept_apart_unless_said_otherwise(
    model: Model, cat: Trained, dog: Trained
) -> None:
    """One alone has nothing to be kept apart from, and a residual changes no weights."""
    unsaid, never = replace(REQUEST, apart=None), REQUEST
    assert not same(pictures(model, unsaid, cat, dog), pictures(model, never, cat, dog))
    assert same(pictures(model, unsaid, cat, dog), pictures(model, replace(REQUEST, apart=True), cat, dog))
    one = {"prompt": "a photo of <my-cat>"}
    assert same(pictures(model, replace(unsaid, **one), cat), pictures(model, replace(never, **one), cat))
    moving = moved(model, "<my-dog>", "dog")
    assert same(pictures(model, unsaid, cat, moving), pictures(model, never, cat, moving))
    nobody = replace(unsaid, prompt="a photo of a tree")
    assert same(pictures(model, nobody, cat, dog), pictures(model, replace(nobody, apart=False), cat, dog))


def same(some: list[Any], others: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("apart", [False, True])
def test_again_is_bit_identical(cat: Trained, dog: Trained, model: Model, tmp_path: Any, apart: bool) -> None:
    workspace = Workspace(tmp_path / "workspace")
    library = Library(workspace)
    for one in (cat, dog):
        library.save(one)
    layout = None if apart else Layout((Region("<my-cat>", LEFT), Region("<my-dog>", RIGHT)), steps=2)
    request = replace(REQUEST, layout=layout, apart=apart, recur=1, ramp=True, trim=True, seeds=(3, 4))
    list(make_pictures(workspace, model, request, [(cat, 1.0), (dog, 0.7)]))
    second = list_results(workspace)[0].paths[1]
    recipe = again(second)
    list(make_pictures(workspace, model, recipe.request, recipe.find_concepts(library), out=tmp_path / "out"))
    assert (tmp_path / "out" / "0001.png").read_bytes() == second.read_bytes()
