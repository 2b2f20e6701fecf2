"""Guidance files that are written are read again to the same picture, and the original's readers could take them."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.__main__ import main
from pipelines.concept import Concept, Subject, Trained
from pipelines.config_export import write_config
from pipelines.configs import config_request
from pipelines.errors import StudioError
from pipelines.formats.cones_config import read_config
from pipelines.layout import Area, Layout, Region, bind
from pipelines.library import Library
from pipelines.methods import residual
from pipelines.model import Model
from pipelines.pictures import read_picture
from pipelines.request import Request
from pipelines.results import make_pictures
from pipelines.scene import make_scene
from pipelines.workspace import Workspace
from tests.tiny import tiny_folder, tiny_model

SIDE = 768
LEFT, RIGHT = Area.box((0, 0, 300, SIDE), (SIDE, SIDE)), Area.box((400, 10, 700, 700), (SIDE, SIDE))
REQUEST = Request("a <my-cat> and a <my-dog> on sand", seeds=(3,), steps=2, width=64, height=64, preview_every=0)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd2")


def concept(model: Model, name: str, noun: str, seed: int, count: int = 1) -> Trained:
    rows = torch.randn(count, 48, generator=torch.Generator().manual_seed(seed))
    base = {"id": model.id, "fingerprint": model.fingerprint, "kind": model.kind}
    params = residual.Params().model_dump(mode="json")
    return Trained(Concept(name, (Subject(f"<{name}>", noun),), "residual", base, params), {"residual": rows})


@pytest.fixture
def pair(model: Model) -> list[tuple[Trained, float]]:
    return [(concept(model, "my-cat", "cat", 0), 1.0), (concept(model, "my-dog", "dog", 1), 0.5)]


def laid_out(*regions: Region, **settings: Any) -> Request:
    return replace(REQUEST, layout=Layout(regions, **settings), recur=1)


def read_again(model: Model, folder: Path, request: Request) -> Request:
    (config,) = read_config(folder / "guidance.json")
    again, notes = config_request(model, config, replace(request, prompt="", layout=None, placed=()))
    assert notes == []
    return again


def picture(model: Model, request: Request, concepts: Any, out: Path) -> Any:
    list(make_pictures(Workspace(out / "w"), model, request, concepts, out=out))
    return np.asarray(Image.open(next(out.glob("*.png"))))


def test_a_picture_comes_out_the_same_from_its_file(model: Model, pair: Any, tmp_path: Path) -> None:
    request = laid_out(
        Region("<my-cat>", LEFT), Region("dog", RIGHT, weight=1.5), strength=0.1, steps=1, negative=-50.0
    )
    made = write_config(tmp_path / "new" / "out", model, request, pair)
    assert not made.notes and all(path.is_file() for path in made.files) and len(made.files) == 4
    again = read_again(model, tmp_path / "new" / "out", request)
    assert again.prompt == "a cat and a dog on sand" and again.layout is not None and request.layout is not None
    assert [(one.name, one.position) for one in again.placed] == [("my-cat", 2), ("my-dog", 5)]
    assert np.array_equal(again.placed[1].rows, 0.5 * pair[1][0].tensors["residual"].numpy())
    assert (again.layout.strength, again.layout.steps, again.layout.negative) == (0.1, 1, -50.0)
    assert [(one.words, one.weight, one.occurrence) for one in again.layout.regions] == [
        ("cat", 2.5, None),
        ("dog", 1.5, None),
    ]
    for one, other in zip(again.layout.regions, request.layout.regions, strict=True):
        assert np.array_equal(one.area.mask, other.area.mask)
    first, second = picture(model, request, pair, tmp_path / "a"), picture(model, again, (), tmp_path / "b")
    assert np.array_equal(first, second)


def test_the_original_could_read_it(model: Model, pair: Any, tmp_path: Path) -> None:
    """Every field of the published form, whole token numbers, bare tensors, exact colours on 768 x 768."""
    write_config(tmp_path, model, laid_out(Region("<my-cat>", LEFT), Region("<my-dog>", RIGHT)), pair)
    (data,) = json.loads((tmp_path / "guidance.json").read_text())
    assert set(data) == {
        "prompt", "residual_dict", "color_context", "guidance_steps", "guidance_weight", "weight_negative", "layout",
        "subject_list",
    }  # fmt: skip
    assert data["subject_list"] == [["my-cat", 2], ["my-dog", 5]] and data["guidance_steps"] == 2
    assert data["color_context"] == {"255,0,0": ["cat", 2.5], "0,255,0": ["dog", 2.5]}
    with Image.open(tmp_path / data["layout"]) as image:
        assert image.size == (SIDE, SIDE)
        pixels = np.asarray(image.convert("RGB"))
    assert int((pixels == (255, 0, 0)).all(-1).sum()) == LEFT.mask.sum() and tuple(pixels[0, -1]) == (255, 255, 255)
    for path in data["residual_dict"].values():
        rows = torch.load(tmp_path / path, weights_only=True)
        assert rows.shape == (1, 48) and rows.dtype == torch.float32 and not rows.requires_grad


def test_subjects_of_one_word_keep_their_own_places(model: Model, tmp_path: Path) -> None:
    """Both are "dog" in the file, so the colours say which."""
    pair = [(concept(model, "one", "dog", 0), 1.0), (concept(model, "two", "dog", 1), 1.0)]
    request = laid_out(Region("<two>", RIGHT), Region("<one>", LEFT))
    request = replace(request, prompt="a <one>, a dog and a <two>")
    write_config(tmp_path, model, request, pair)
    again = read_again(model, tmp_path, request)
    assert again.layout is not None
    assert [one.tokens for one in bind(again.layout, model.tokenize(again.prompt))] == [(8,), (2,)]
    assert [(one.name, one.position) for one in again.placed] == [("one", 2), ("two", 8)]


def test_a_subject_twice_is_named_twice_and_found_rows_travel(model: Model, pair: Any, tmp_path: Path) -> None:
    request = replace(REQUEST, prompt="a <my-cat> and a <my-cat>")
    write_config(tmp_path, model, request, pair[:1])
    again = read_again(model, tmp_path, request)
    assert [(one.name, one.position) for one in again.placed] == [("my-cat", 2), ("my-cat", 5)]
    assert again.layout is None and len(list((tmp_path / "residuals").iterdir())) == 1
    second = write_config(tmp_path / "b", model, replace(again, layout=Layout((Region("cat", LEFT, 1),))))
    assert len(second.files) == 3
    third = read_again(model, tmp_path / "b", request)
    assert third.placed == again.placed and third.layout is not None and third.layout.regions[0].occurrence == 1
    states = [make_scene(model, one).text.states for one in (again, replace(third, layout=None))]
    assert torch.equal(*states)


def test_rows_twice_at_one_token_are_two_subjects(model: Model, tmp_path: Path) -> None:
    from pipelines.placed import Placed

    one = Placed.of("cat", 2, torch.ones(1, 48))
    made = write_config(tmp_path / "x", model, replace(REQUEST, prompt="a cat", placed=(one, one)))
    assert len(made.files) == 4
    (config,) = read_config(tmp_path / "x" / "guidance.json")
    again, notes = config_request(model, config, REQUEST)
    assert [placed.position for placed in again.placed] == [2, 2]
    assert len(notes) == 1 and "'cat-2' is put on token 2, where 'cat' is already" in notes[0]


def test_a_start_noise_is_told(model: Model, tmp_path: Path) -> None:
    from pipelines.cutouts import StartNoise

    made = write_config(tmp_path / "x", model, replace(REQUEST, prompt="a cat", start=StartNoise(())))
    assert len(made.notes) == 1 and "plain noise" in made.notes[0]


def test_what_a_drawing_cannot_hold_is_told(model: Model, tmp_path: Path) -> None:
    wide = concept(model, "robot", "robot car", 0, count=2)
    request = laid_out(
        Region("<robot>", LEFT), Region("sand", Area.box((200, 0, 500, SIDE), (SIDE, SIDE))), mode="figure"
    )
    request = replace(request, prompt="a <robot> on sand")
    made = write_config(tmp_path, model, request, [(wide, 1.0)])
    assert ["covers another" in made.notes[0], "--figure" in made.notes[1], "2 tokens" in made.notes[2]] == [True] * 3
    again = read_again(model, tmp_path, request)
    assert again.layout is not None and again.layout.regions[0].area.mask.sum() == 200 * SIDE
    assert again.placed[0].rows.shape == (2, 48)


def test_what_cannot_be_exported_is_said(model: Model, pair: Any, tmp_path: Path) -> None:
    other = replace(pair[0][0], concept=replace(pair[0][0].concept, method="svdiff"))
    with pytest.raises(StudioError, match="holds residuals only, and 'my-cat' was learned by svdiff"):
        write_config(tmp_path / "a", model, REQUEST, [(other, 1.0)])
    buried = laid_out(Region("<my-cat>", RIGHT), Region("<my-dog>", Area.box((0, 0, SIDE, SIDE), (SIDE, SIDE))))
    with pytest.raises(StudioError, match="'<my-cat>' is covered whole"):
        write_config(tmp_path / "b", model, buried, pair)
    with pytest.raises(StudioError, match="'house' is not in the prompt"):
        write_config(tmp_path / "c", model, laid_out(Region("house", LEFT)), pair)
    assert not list(tmp_path.iterdir())
    write_config(tmp_path / "d", model, REQUEST, pair)
    with pytest.raises(StudioError, match="already there"):
        write_config(tmp_path / "d", model, REQUEST, pair)


def test_many_regions_have_colours_of_their_own_and_names_are_safe(model: Model, tmp_path: Path) -> None:
    boxes = [Area.box((n * 30, 0, n * 30 + 29, SIDE), (SIDE, SIDE)) for n in range(20)]
    request = replace(laid_out(*(Region("cat", box) for box in boxes)), prompt="a cat")
    made = write_config(tmp_path / "x", model, request)
    assert not made.notes and len(json.loads(made.files[0].read_text())[0]["color_context"]) == 20
    from pipelines.placed import Placed

    rows = [torch.full((1, 48), float(n)) for n in range(3)]
    placed = tuple(Placed.of(name, 2, row) for name, row in zip(("../up", "../up", "UP"), rows, strict=True))
    made = write_config(tmp_path / "y", model, replace(REQUEST, prompt="a cat", placed=placed))
    assert len({path.name.casefold() for path in made.files}) == 5
    assert all(path.resolve().is_relative_to((tmp_path / "y").resolve()) for path in made.files)
    again = read_again_noted(model, tmp_path / "y")
    assert [float(one.rows[0, 0]) for one in again.placed] == [0.0, 1.0, 2.0]


def read_again_noted(model: Model, folder: Path) -> Request:
    (config,) = read_config(folder / "guidance.json")
    return config_request(model, config, REQUEST)[0]


def test_by_command_from_a_picture_and_painted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "home"))
    base = str(tiny_folder(tmp_path / "tiny", "sd2"))

    def answer(*argv: str) -> Any:
        code = main([*argv, "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert code == 0, printed
        return printed

    from pipelines.model import load_model

    Library(Workspace(tmp_path / "home")).save(concept(load_model(base, device="cpu"), "my-cat", "cat", 0))
    paint = ["generate", "a <my-cat> on sand", "--concept", "my-cat:0.7", "--seed", "5", "--steps", "2"]
    paint += ["--base", base, "--device", "cpu", "--ramp", "--trim", "--recur", "1", "--negative", "a dog"]
    region = ["--region", "<my-cat>=0,0,0.5,1", "--region", "sand=0.5,0,1,1", "--guided-steps", "1"]
    shapes = {"plain": [], "drawn": [*region, "--figure", "--width", "96", "--height", "64", "--guidance", "7.1234567"]}
    shapes["silent"] = ["--region", "<my-cat>=0,0,0.5,1", "--guide", "0"]
    for name, more in shapes.items():
        answer(*paint, *more, "--out", str(tmp_path / name))
        (first,) = (tmp_path / name).glob("*.png")
        found = answer(
            "guidance", str(first), "--base", base, "--device", "cpu", "--out", str(tmp_path / name / "file")
        )
        assert found["files"][0] == str(tmp_path / name / "file" / "guidance.json")
        assert len(found["notes"]) == (name == "drawn")  # how regions are meant
        answer(*shlex.split(found["command"]), "--device", "cpu", "--out", str(tmp_path / name / "again"))
        (second,) = (tmp_path / name / "again").rglob("0*.png")
        one, other = (np.asarray(Image.open(path), np.int16) for path in (first, second))
        assert np.abs(one - other).mean() < (0.5 if name == "drawn" else 1e-9), name  # a drawing has a grid of its own
        layouts = [read_picture(path)["request"].get("layout") or {} for path in (first, second)]
        assert name != "drawn" or [one["mode"] for one in layouts] == ["figure"] * 2
        requests = [read_picture(path)["request"] for path in (first, second)]
        same = ("seeds", "steps", "ramp", "trim", "guidance", "negative", "scheduler", "width", "height")
        assert [requests[0][key] for key in same] == [requests[1][key] for key in same]
    assert main(["guidance", str(tmp_path / "plain" / "file" / "layout.png"), "--out", "x", "--json"]) == 2
    assert "carries no recipe" in json.loads(capsys.readouterr().out)["error"]
