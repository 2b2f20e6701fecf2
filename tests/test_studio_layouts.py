"""Layouts in the studio: what the painter sends, what the engine gets, and the way back from a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import (
    Area,
    Concept,
    Heatmap,
    Layout,
    Preview,
    Progress,
    Region,
    Request,
    StudioError,
    Subject,
    Trained,
    Workspace,
    get_method,
)
from pipelines.__main__ import main
from pipelines.evaluate.claims.decoupling import NEGATIVE
from studio.asked import MOST_CONCEPTS, asked, filled
from studio.kept import Kept
from studio.layouts import found_layout, layout_of, layout_values, shape
from studio.parts.painter import Drawn, drawing, regions
from studio.render import View, fold
from studio.session import Studio
from studio.tabs.layout import COLLAGE

PROMPT = "a photo of a cat and a dog and another dog"


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"))
    yield studio
    studio.close()


def left_and_right() -> list[Drawn]:
    mask = np.zeros((32, 64), bool)
    mask[4:20, 2:30] = True
    return [Drawn("cat", mask, None, 2.5), Drawn("dog", np.roll(mask, 33, 1), 1, 4.0)]


def controls(**changed: Any) -> dict[str, Any]:
    """The Generate tab as it is when it opens, with a prompt."""
    plain = {
        "prompt": PROMPT, "words": [], "concepts": [], "seed": "7", "count": 1, "layout": "", "layout_on": True,
        "placed": [], "negative": "", "steps": 4, "guidance": 7.5, "scheduler": "ddim", "width": 0, "height": 0,
        "apart": "never", "guide": 0.08, "guided_steps": "", "outside": -1e8, "figure": False, "recur": 0,
        "ramp": False, "trim": False, "start": None, "start_photos": [], "start_strength": "",
        "start_sizes": "", "counted": "",
    }  # fmt: skip
    return plain | {f"strength-{number}": 1.0 for number in range(MOST_CONCEPTS)} | changed


def test_a_drawing_comes_back_as_it_was() -> None:
    for mask in (np.zeros((5, 7), bool), np.ones((5, 7), bool), np.eye(7, dtype=bool), ~np.eye(7, dtype=bool)):
        (back,) = regions(drawing([Drawn("cat", mask, 2, -1.5)]))
        assert (back.mask == mask).all() and (back.words, back.occurrence, back.weight) == ("cat", 2, -1.5)
    assert regions("") == regions(None) == [] and drawing([]) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"size": [10**9, 10**9]}, {"size": [0, 4]}, {"size": "ab"}, {"size": [2.0, 2]}, {"regions": 3},
        {"regions": [1]},
        {"regions": [{"words": "x", "occurrence": None, "weight": 1, "runs": [10**12]}]},
        {"regions": [{"words": "x", "occurrence": None, "weight": 1, "runs": [-1, 5]}]},
        {"regions": [{"words": "x", "occurrence": "1", "weight": 1, "runs": [4]}]},
        {"regions": [{"words": "x", "occurrence": None, "weight": 1, "runs": [4]}] * 100},
    ],
)  # fmt: skip
def test_what_no_painter_sends_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StudioError, match="draw again"):
        regions(json.dumps({"size": [2, 2], "regions": []} | change))
    with pytest.raises(StudioError, match="draw again"):
        regions("{" + json.dumps(change))


def test_a_painted_layout_reaches_the_request_and_comes_back(studio: Studio) -> None:
    values = controls(layout=drawing(left_and_right()), guided_steps="3", figure=True, recur=2, ramp=True)
    request, _, _ = asked(studio, values)
    assert request.layout is not None and request.seeds == (7,)
    cat, dog = request.layout.regions
    assert (cat.words, cat.occurrence, dog.words, dog.occurrence, dog.weight) == ("cat", None, "dog", 1, 4.0)
    assert (request.layout.steps, request.layout.mode, request.recur, request.ramp) == (3, "figure", 2, True)
    again, _, _ = asked(studio, controls() | filled(studio, {"request": request.to_json()}))
    assert again == request
    plain = filled(studio, {"request": Request(PROMPT).to_json()})
    assert plain["layout_on"] is False and "layout" not in plain and plain["recur"] == 0
    assert asked(studio, values | {"layout_on": False})[0].layout is None


def test_a_layout_of_another_tool_keeps_its_pixels() -> None:
    """Boxes of the command line are drawn on 512 x 512, Cones 2's layouts on 768 x 768."""
    box = Area.box([100, 50, 333, 401], (768, 768))
    given = Layout((Region("cat", box), Region("dog", Area.box([0, 0, 3, 3], (4, 4)))), steps=0)
    values = controls() | layout_values(given.to_json())
    back = layout_of(values)
    assert back is not None and back.regions[0].area == box and back.steps == 0
    assert back.regions[1].area == Area.box([0, 0, 576, 576], (768, 768))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "a cat alone"}, "'dog', which is not in the prompt"),
        ({"guide": None}, "strength is empty"),
        ({"guide": -1}, "0 or more"),
        ({"guided_steps": "some"}, "'some' steps"),
        ({"outside": 5}, "0 or less"),
        ({"layout": drawing([Drawn("cat", np.zeros((4, 4), bool))])}, "empty"),
        ({"layout": drawing([Drawn("", np.ones((4, 4), bool))])}, "no word"),
    ],
)
def test_a_layout_that_cannot_be_is_told(studio: Studio, change: dict[str, Any], words: str) -> None:
    with pytest.raises(StudioError, match=words):
        asked(studio, controls(layout=drawing(left_and_right())) | change)


def test_the_painter_has_the_shape_of_the_picture() -> None:
    assert shape(64, 0, 0) == [64, 64] and shape(512, 768, None) == [768, 512]
    assert shape(512, 10**6, -3) == [512, 512] and shape(512, 9000, 8) == [512, 512]


def test_found_regions_are_kept_beside_attention_and_can_be_taken() -> None:
    """A page that opens later sees them too, though attention of the same word came after."""
    where = np.zeros((4, 4), np.float32)
    where[:2] = 1
    image = np.zeros((8, 8, 3), np.uint8)
    kept = Kept()
    for event in (
        Progress("regions", 2, 2), Heatmap("<my-cat>", where, image, step=2), Progress("generate", 1, 1),
        Preview(image), Heatmap("<my-cat>", 1 - where, image),
    ):  # fmt: skip
        kept.add(event)
    view = fold(View(), kept.since(0))
    assert (view.regions["<my-cat>"].values == where).all() and (view.heatmaps["<my-cat>"].values == 1 - where).all()
    (taken,) = regions(found_layout(view.regions))
    assert taken.words == "<my-cat>" and taken.mask[:256].all() and not taken.mask[256:].any()
    with pytest.raises(StudioError, match="Keep concepts apart"):
        found_layout({})


def test_pictures_begin_as_a_collage_of_a_photo_set(studio: Studio, tmp_path: Path) -> None:
    mask = np.zeros((32, 64), np.uint8)
    mask[4:20, 2:30] = 255
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "a-masklabel-cat.png")
    bare, _ = studio.datasets.add([tmp_path / "a.png"], "bare")
    masked, _ = studio.datasets.add([tmp_path / "a.png", tmp_path / "a-masklabel-cat.png"], "masked")
    studio.library.save(concept("cat"))
    values = controls(prompt="a photo of <cat>", start_photos=[masked])
    request, _, _ = asked(studio, values)
    assert request.start is not None and request.start.words == ["<cat>"] and not request.start.in_layout
    assert request.start.gamma == 2 and request.start.cutouts[0].png
    drawn = drawing([replace(left_and_right()[0], words="<cat>")])
    placed, _, _ = asked(studio, values | {"layout": drawn, "start_strength": "1.5"})
    assert placed.start is not None and placed.start.in_layout and placed.start.gamma == 1.5
    sized, _, _ = asked(studio, values | {"start_sizes": "0.5"})
    assert sized.start is not None and sized.start.sizes == (("<cat>", 0.5),)
    again, _, _ = asked(studio, controls() | filled(studio, {"request": placed.to_json()}))
    assert again == placed
    for change, words in (
        ({"start_photos": [bare]}, "no masks"),
        ({"start_strength": "much"}, "'much'"),
        ({"start_sizes": "1 1"}, "write 1 numbers"),
    ):
        with pytest.raises(StudioError, match=words):
            asked(studio, values | change)


def test_the_papers_negative_prompt_is_said_with_start_noise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert f'--negative "{NEGATIVE}"' in " ".join(capsys.readouterr().out.split()) and NEGATIVE in COLLAGE


def test_three_concepts_are_counted_where_wished(studio: Studio) -> None:
    for name in ("one", "two", "three"):
        studio.library.save(concept(name))
    prompt = "a <one>, a <two> and a <three>"
    for word, says in (("", prompt), ("animals", f"3 animals: {prompt}")):
        request, concepts, _ = asked(studio, controls(prompt=prompt, counted=word))
        assert request.prompt == says and len(concepts) == 3


def concept(name: str) -> Trained:
    """One that is only named here."""
    base = {"id": "x", "fingerprint": ""}
    params = get_method("residual").Params().model_dump(mode="json")
    return Trained(
        Concept(name, (Subject(f"<{name}>", "cat"),), "residual", base, params), {"residual": torch.zeros(1, 32)}
    )
