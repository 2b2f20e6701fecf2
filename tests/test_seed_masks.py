"""iSeg without a noun: points, lines and boxes as seeds, spread by self-attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.__main__ import main
from pipelines.attention.refine import normalised, transition
from pipelines.attention.seeds import away_columns, cell_links, room, seed_columns, spread, touched
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Heatmap
from pipelines.marks import Given, Marking
from pipelines.mask_files import Wish, is_ours
from pipelines.model import Model
from pipelines.photos import load_photos
from pipelines.seed_masks import seed_masks, seed_params, seeded_masks
from tests.tiny import tiny_folder, tiny_model

GRID, SIZE = (4, 6), (60, 40)  # cells of 10 x 10 pixels
QUICK = ["draws=1", "steps=2"]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def picture(height: int = 64, width: int = 96) -> Any:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def last(events: Iterator[Event]) -> Any:
    (*_, event) = events
    assert isinstance(event, Finished)
    return event.value


def cells(column: torch.Tensor) -> list[tuple[int, int]]:
    return [(int(row), int(across)) for row, across in torch.nonzero(column.reshape(GRID))]


def test_a_point_is_its_cell_and_a_box_all_of_its_cells() -> None:
    columns = seed_columns(Marking(clicks=((35, 12), (60, 40))), SIZE, GRID)
    assert columns.shape == (24, 2) and cells(columns[:, 0]) == [(1, 3)] and cells(columns[:, 1]) == [(3, 5)]
    boxed = seed_columns(Marking(box=(10, 0, 40, 20)), SIZE, GRID)
    assert cells(boxed[:, 0]) == [(row, across) for row in (0, 1) for across in (1, 2, 3)]
    tiny = Marking(box=(21, 11, 22, 12))
    assert cells(seed_columns(tiny, SIZE, GRID)[:, 0]) == [(1, 2)] == cells(room(tiny, SIZE, GRID))
    assert room(Marking(clicks=((1, 1),)), SIZE, GRID).all()
    assert away_columns(Marking(away=((5, 5),)), SIZE, GRID).shape == (24, 1)
    assert away_columns(Marking(), SIZE, GRID).shape == (24, 0)


def test_a_line_is_a_column_for_every_cell_it_touches() -> None:
    assert touched(((5, 5), (55, 5)), SIZE, GRID) == [(0, across) for across in range(6)]
    assert touched(((5, 5), (5, 35), (25, 35)), SIZE, GRID) == [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]
    assert seed_columns(Marking(lines=(((5, 5), (55, 5)),)), SIZE, GRID).shape == (24, 6)


def test_each_column_is_refined_by_itself_and_then_averaged() -> None:
    draw = torch.Generator().manual_seed(0)
    links = transition(torch.rand(24, 24, generator=draw).softmax(1), 0.1)
    columns = seed_columns(Marking(clicks=((5, 5), (55, 35))), SIZE, GRID)
    expected = torch.zeros(24)
    for column in columns.T:
        one = column[:, None]
        for _ in range(3):
            one = normalised(links @ normalised(one))
        expected += (one[:, 0] / one.max()) / 2
    found = spread(links, columns, 3)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_mark_finds_the_cells_that_look_at_each_other() -> None:
    label = torch.zeros(GRID, dtype=torch.long)
    label[1:3, 1:4] = 1
    links = transition((label.flatten()[:, None] == label.flatten()[None]).float() + 0.01, 0.1)
    found = spread(links, seed_columns(Marking(clicks=((25, 15),)), SIZE, GRID), 10)
    assert ((found > 0.5) == (label.flatten() == 1)).all()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_marks_compete_and_nothing_is_left_on_the_model(kind: str) -> None:
    model = tiny_model(kind)
    processors, state = list(map(id, model.unet.attn_processors.values())), torch.get_rng_state()
    params = seed_params(model.kind, QUICK)
    marks = {"a": Marking(clicks=((10, 10),)), "b": Marking(box=(50, 30, 90, 60), away=((20, 50),))}
    found = seed_masks(model, picture(), marks, params)
    assert list(found) == ["a", "b"] and len(found["a"].shares) == 4  # two things, what is not b, the background
    assert not (found["a"].binary() & found["b"].binary()).any() and found["a"].binary().shape == (64, 96)
    assert not found["b"].soft[:, 0].any()  # outside its box
    assert processors == list(map(id, model.unet.attn_processors.values()))
    assert torch.equal(state, torch.get_rng_state())
    links, grid = cell_links(model, picture(), params)
    assert links.shape == (grid[0] * grid[1],) * 2
    torch.testing.assert_close(links.sum(1), torch.ones(len(links)))


def test_only_marked_photos_get_files(model: Model, tmp_path: Path) -> None:
    for name in "abc":
        Image.fromarray(picture(80, 120)).save(tmp_path / f"{name}.png")
    painted = np.full((80, 120), 255, np.uint8)
    Image.fromarray(painted).save(tmp_path / "b-masklabel.png")
    given = [Given("click", "a.png:100,70"), Given("line", "b:3,4,50,60")]
    events = list(seeded_masks(model, Wish(tmp_path, settings=tuple(QUICK)), given))
    assert last(iter(events)) == {"written": ["a-masklabel.png"], "kept": ["b-masklabel.png"], "missing": []}
    assert sum(isinstance(event, Heatmap) for event in events) == 2
    assert is_ours(tmp_path / "a-masklabel.png") and load_photos(tmp_path)[0].masks[""].shape == (80, 120)
    with pytest.raises(StudioError, match="a.png: .* outside the photo of 120 x 80"):
        list(seeded_masks(model, Wish(tmp_path), [Given("click", "a.png:121,70")]))


def test_the_command_takes_marks_for_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = tiny_folder(tmp_path / "base"), tmp_path / "photos"
    data.mkdir()
    Image.fromarray(picture()).save(data / "a.png")
    line = ["masks", str(data), "--by", "attention", "--base", str(base), "--device", "cpu"]
    quick = ["--set", "draws=1", "--set", "steps=1", "--workspace", str(tmp_path / "home")]
    assert main([*line, *quick, "--click", "my-cat=a.png:20,20", "--box", "dog=a.png:50,10,90,60"]) == 0
    assert {path.name for path in data.iterdir()} == {"a.png", "a-masklabel-my-cat.png", "a-masklabel-dog.png"}
    assert "2 masks are in" in capsys.readouterr().out


@pytest.mark.slow
def test_marks_find_toys_on_scenes_that_chose_no_setting() -> None:
    from pipelines.model import load_model
    from pipelines.toybox.scenes import scene
    from pipelines.toybox.segmenter import box_of, click_on

    model = load_model("toybox", device="cpu")
    clicked, boxed = [], []
    for number in range(20):
        one = scene("test", 430_000 + number, count=1 + number % 2)
        for true in (mask for mask in one.masks if mask.sum() >= 12):
            click = Marking(clicks=(click_on(true, np.random.default_rng(number)),))
            left, top, right, bottom = map(float, box_of(true))
            for marking, found in ((click, clicked), (Marking(box=(left, top, right, bottom)), boxed)):
                seen = seed_masks(model, one.image, {"it": marking})["it"].binary()
                found.append((seen & true).sum() / (seen | true).sum())
    assert np.mean(clicked) > 0.45 and np.mean(boxed) > 0.7
