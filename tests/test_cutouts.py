"""Start noise as a part of the request: painted, written into the picture, and painted again bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.__main__ import main
from pipelines.collage import Piece
from pipelines.concept import Concept, Subject, Trained
from pipelines.cutouts import FOLDER, Cutout, StartNoise, chosen, cutouts_of, filled
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Snapshot
from pipelines.generate import generate
from pipelines.layout import Area, Layout, Region
from pipelines.library import Library
from pipelines.model import Model
from pipelines.pictures import read_picture
from pipelines.recipe import again
from pipelines.request import Request
from pipelines.results import make_pictures
from pipelines.schedulers import SCHEDULERS
from pipelines.start_noise import mask_layout, mean_shift, random_layout, start_of
from pipelines.workspace import Workspace
from tests.test_collage import A as RED
from tests.test_collage import B as GREEN
from tests.test_collage import piece as block
from tests.tiny import tiny_folder, tiny_model

A, B = "cat", "dog"


def piece(name: str, height: int = 60, width: int = 40) -> Piece:
    return replace(block(RED if name == A else GREEN, height, width), name=name)


CUTOUTS = cutouts_of([piece(A), piece(A, 30, 50), piece(B)])
START = StartNoise(CUTOUTS)
REQUEST = Request(f"a {A} and a {B}", seeds=(3, 8), steps=3, width=64, height=48, preview_every=0)
SIZE = (48, 64)
PIECES = {A: [piece(A), piece(A, 30, 50)], B: [piece(B)]}


def left_half() -> Area:
    return Area.box((0, 0, 32, 48), SIZE)


def right_half() -> Area:
    return Area.box((32, 0, 64, 48), SIZE)


PLACES = (Region(A, left_half()), Region(B, right_half()))


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def painted(model: Model, request: Request) -> list[Any]:
    return [event.image for event in generate(model, request) if isinstance(event, Snapshot)]


def last(events: Iterator[Event]) -> Any:
    (*_, event) = events
    assert isinstance(event, Finished)
    return event.value


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 12, 16, generator=torch.Generator().manual_seed(1))


def test_a_cut_out_is_its_piece_to_the_pixel() -> None:
    draw = np.random.default_rng(0)
    one = replace(piece(A), image=draw.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    one = replace(one, mask=draw.integers(0, 256, (7, 9), dtype=np.uint8))
    back = Cutout.of(one).piece
    assert np.array_equal(back.image, one.image) and np.array_equal(back.mask, one.mask) and back.name == A
    assert Cutout.of(one) == Cutout.of(one) and Cutout.of(one) != Cutout.of(piece(A))
    assert len(cutouts_of([one, one])) == 1


def test_strength_nought_is_the_plain_noise_and_needs_no_pixels(model: Model) -> None:
    hashes = tuple(replace(one, png=b"") for one in CUTOUTS)
    plain = painted(model, REQUEST)
    for start in (replace(START, gamma=0.0), StartNoise(hashes, 0.0)):
        for a, b in zip(plain, painted(model, replace(REQUEST, start=start)), strict=True):
            assert np.array_equal(a, b)
    assert not np.array_equal(plain[0], painted(model, replace(REQUEST, start=START))[0])
    with pytest.raises(StudioError, match="cut-out of 'cat'.*not in this workspace"):
        painted(model, replace(REQUEST, start=StartNoise(hashes)))


def test_the_layout_is_by_chance_in_its_own_places_or_in_the_requests(model: Model) -> None:
    def begun(request: Request) -> torch.Tensor:
        start = start_of(model, request)
        assert start is not None
        return start(noise(), (3, 8))

    random = mean_shift(model, REQUEST, random_layout(PIECES, SIZE), 2.0)
    assert torch.equal(begun(replace(REQUEST, start=START)), random(noise(), (3, 8)))
    halves = {A: np.zeros(SIZE, np.uint8), B: np.zeros(SIZE, np.uint8)}
    halves[A][:, :32] = halves[B][:, 32:] = 255
    placed = mean_shift(model, REQUEST, mask_layout(PIECES, halves, SIZE), 3.0)(noise(), (3, 8))
    own = replace(REQUEST, start=replace(START, places=PLACES, gamma=3.0))
    assert torch.equal(begun(own), placed)
    layout = Layout((*PLACES, Region("tree", left_half())))
    led = replace(REQUEST, layout=layout, start=replace(START, in_layout=True, gamma=3.0))
    assert torch.equal(begun(led), placed)
    anywhere = replace(led, start=replace(START, gamma=3.0))  # a layout alone doesn't decide where things begin
    assert not torch.equal(begun(anywhere), placed)
    coarse = (Region(A, Area.of(np.array([[1, 0]]))), Region(B, Area.of(np.array([[0, 1]]))))  # stretched
    assert torch.equal(begun(replace(own, start=replace(own.start, places=coarse))), placed)  # type: ignore[type-var]
    small = begun(replace(REQUEST, start=replace(START, sizes=((A, 0.5),))))
    assert not torch.equal(small, random(noise(), (3, 8)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_is_made_again_from_itself(model: Model, tmp_path: Path, name: str) -> None:
    """The recipe holds hashes alone; the workspace has the cut-outs. In a batch, too."""
    workspace = Workspace(tmp_path / "home")
    start = replace(START, places=PLACES) if name == "euler" else START
    request = replace(REQUEST, start=start, scheduler=name, batch=2)
    last(make_pictures(workspace, model, request, out=tmp_path / "out"))
    first, second = sorted((tmp_path / "out").glob("*.png"))
    recipe = read_picture(second)["request"]["start"]
    assert recipe["cutouts"] == [[one.word, one.sha256] for one in CUTOUTS] and recipe["gamma"] == 2.0
    assert len(list((workspace.root / FOLDER).iterdir())) == 3
    wanted = again(second).request
    assert wanted.start == start and not any(one.png for one in wanted.start.cutouts)
    last(make_pictures(workspace, model, wanted, out=tmp_path / "again"))
    assert (tmp_path / "again" / "0001.png").read_bytes() == second.read_bytes() != first.read_bytes()


def test_what_is_gone_or_has_changed_is_told(model: Model, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    kept = filled(workspace, START)
    assert kept == START
    hashes = replace(START, cutouts=tuple(replace(one, png=b"") for one in CUTOUTS))
    assert [one.png for one in filled(workspace, hashes).cutouts] == [one.png for one in CUTOUTS]
    file = tmp_path / FOLDER / f"{CUTOUTS[0].sha256}.png"
    file.write_bytes(CUTOUTS[1].png)
    with pytest.raises(StudioError, match="has changed"):
        filled(workspace, hashes)
    shutil.rmtree(tmp_path / FOLDER)
    with pytest.raises(StudioError, match="not in this workspace"):
        last(make_pictures(workspace, model, replace(REQUEST, start=hashes), out=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    "broken",
    [
        {"cutouts": [[A, "../../secret"]]},
        {"cutouts": [[A, "f" * 63]]},
        {"cutouts": [[1, "f" * 64]]},
        {"cutouts": []},
        {"gamma": "much"},
        {"gamma": 21},
        {"in_layout": 1},
        {"places": [[A, None, 2.5, "x"]]},
        {"sizes": [[A, 2]]},
    ],
)
def test_a_damaged_recipe_is_told(broken: dict[str, Any]) -> None:
    data = replace(REQUEST, start=replace(START, places=PLACES, sizes=((A, 0.5),))).to_json()
    assert Request.from_json(json.loads(json.dumps(data))).start == replace(START, places=PLACES, sizes=((A, 0.5),))
    with pytest.raises(StudioError):
        Request.from_json(data | {"start": data["start"] | broken})
    assert "start" not in REQUEST.to_json()


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (replace(START, gamma=-1.0), "2 is usual"),
        (replace(START, gamma=float("nan")), "2 is usual"),
        (StartNoise(()), "needs photos"),
        (replace(START, places=PLACES[:1]), "No place is marked for dog"),
        (replace(START, in_layout=True), "No place is marked for cat, dog"),
        (replace(START, places=(*PLACES, Region("<c>", left_half()))), "for '<c>', of which no photo"),
        (replace(START, sizes=((A, 1.5),)), "'cat' can't begin at 1.5"),
        (replace(START, sizes=(("<c>", 0.5),)), "'<c>' can't begin"),
    ],
)
def test_what_cannot_be_laid_out_is_told(start: StartNoise, says: str) -> None:
    with pytest.raises(StudioError, match=says):
        replace(REQUEST, start=start).check()


def test_a_prompt_begins_with_whom_it_names() -> None:
    every = replace(START, places=PLACES, sizes=((A, 0.5), (B, 0.7)))
    one = chosen(every, f"a {B} in the snow")
    assert one.words == [B] and one.places == PLACES[1:] and one.sizes == ((B, 0.7),)
    assert chosen(every, f"{A} and {B}") == every
    with pytest.raises(StudioError, match="names none of cat, dog"):
        chosen(every, "a tree")


# The command


def folder(path: Path) -> Path:
    """Two photos, each with a mask of my-cat and one of my-dog; and one without."""
    path.mkdir()
    draw = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path / f"{number}.png")
        for place, name in enumerate(("my-cat", "my-dog") if number < 2 else ()):
            mask = np.zeros((64, 64), np.uint8)
            mask[10:50, 32 * place + 4 : 32 * place + 26] = 255
            Image.fromarray(mask).save(path / f"{number}-masklabel-{name}.png")
    return path


def test_the_command_paints_with_start_noise_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, photos, home = str(tiny_folder(tmp_path / "base")), folder(tmp_path / "photos"), str(tmp_path / "home")
    common = ["--base", base, "--workspace", home, "--device", "cpu"]
    from pipelines.model import load_model

    print_ = load_model(base).fingerprint
    for name, noun in (("my-cat", "cat"), ("my-dog", "dog")):
        saved = Concept(name, (Subject(f"<{name}>", noun),), "residual", {"id": "tiny", "fingerprint": print_})
        Library(Workspace(home)).save(Trained(saved, {"residual": torch.randn(1, 32)}))
    prompt = "a <my-cat> and a <my-dog>"
    line = ["generate", prompt, *common, "--seed", "4", "--steps", "2", "--json", "--start-photos", str(photos)]
    line += ["--concept", "my-cat", "--concept", "my-dog"]
    regions = ["--region", "tree=0,0,0.5,1"]
    cases: dict[str, list[str]] = {
        "plain": ["--start-noise"],
        "strong": ["--start-noise", "4", "--start-size", "<my-cat>=0.5"],
        "placed": ["--start-noise", "--start-place", "<my-cat>=0,0,0.5,1", "--start-place", "<my-dog>=0.5,0,1,1"],
        "elsewhere": ["--start-noise", *regions],
    }
    prompts = {"elsewhere": "a tree, <my-cat> and a <my-dog>"}
    found = {}
    for name, extra in cases.items():
        line[1] = prompts.get(name, prompt)
        assert main([*line, *extra, "--out", str(tmp_path / name)]) == 0, capsys.readouterr()
        found[name] = read_picture(tmp_path / name / "0001.png")["request"]["start"]
    assert [one["gamma"] for one in found.values()] == [2.0, 4.0, 2.0, 2.0]
    assert all(len(one["cutouts"]) == 4 for one in found.values())
    assert found["strong"]["sizes"] == [["<my-cat>", 0.5]] and len(found["placed"]["places"]) == 2
    assert not any(one["in_layout"] for one in found.values())
    shutil.rmtree(photos)  # they aren't needed any more
    for name in cases:
        again_ = [
            "generate",
            "--again",
            str(tmp_path / name / "0001.png"),
            *common,
            "--out",
            str(tmp_path / "again" / name),
        ]
        assert main(again_) == 0, capsys.readouterr()
        assert (tmp_path / "again" / name / "0001.png").read_bytes() == (tmp_path / name / "0001.png").read_bytes()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--start-photos", "{photos}"], "are for --start-noise"),
        (["--start-noise"], "needs photos with masks"),
        (["--start-noise", "--start-photos", "gone"], "no folder 'gone'"),
        (["--start-noise", "--start-photos", "x=gone"], "no folder 'gone'"),
        (["--start-noise", "lots", "--start-photos", "{photos}"], "'lots' is no strength"),
        (["--start-noise", "99", "--start-photos", "{photos}"], "2 is usual"),
        (["--start-noise", "--start-photos", "{photos}", "--start-size", "<my-cat>"], "is no size"),
        (["--start-noise", "--start-photos", "{photos}", "--start-size", "<my-cat>=3"], "up to 1"),
        (["--start-noise", "--start-photos", "<no>={photos}"], "No prompt names '<no>'"),
        (["--start-noise", "--start-photos", "{photos}", "--start-place", "<my-cat>=0,0,1,1"], "for <my-dog>"),
        (["--start-noise", "--start-photos", "{empty}"], "has a mask. Make masks first"),
        (["--start-noise", "--start-photos", "{unnamed}"], "don't say whose they are"),
        (["--start-noise", "--config", "x.json"], "exclude each other"),
        (["--start-noise", "--again", "x.png"], "takes the start noise from the picture"),
    ],
)
def test_what_can_be_put_right_is_one_sentence(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, empty, unnamed = folder(tmp_path / "photos"), tmp_path / "empty", tmp_path / "unnamed"
    for path in (empty, unnamed):
        path.mkdir()
        shutil.copy(photos / "0.png", path / "0.png")
    shutil.copy(photos / "0-masklabel-my-cat.png", unnamed / "0-masklabel.png")
    given = [text.format(photos=photos, empty=empty, unnamed=unnamed) for text in argv]
    base = tiny_folder(tmp_path / "base") if any("{" in text for text in argv) else "toybox"
    assert main(["generate", "<my-cat> and <my-dog>", *given, "--base", str(base)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.splitlines()[-1].startswith("error: ")


def test_mudis_folder_is_cut_out_by_the_subjects_in_order(tmp_path: Path) -> None:
    from pipelines.commands.starts import _pieces

    photos = folder(tmp_path / "photos")
    lines: list[Any] = [{"id": {"a": "sks cat", "b": "hta dog"}}]
    for id, name, phrase in (("a", "my-cat", "sks cat"), ("b", "my-dog", "hta dog")):
        mask = f"0-masklabel-{name}.png"
        lines.append({"id": id, "file_name": "0.png", "mask_path": mask, "text": f"a photo of a {phrase}"})
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    duo = Concept("duo", (Subject("<tom>", "cat"), Subject("<max>", "dog")), "segmix", {"id": "x", "fingerprint": ""})
    found = list(_pieces(str(photos), [duo], 64))
    assert [one.name for one in found] == ["<tom>", "<max>"] and found[0].mask.shape == (40, 22)
    assert [one.name for one in _pieces(str(photos), [], 64)] == ["<a>", "<b>"]
    swapped = Concept("duo", (Subject("<b>", "dog"), Subject("<a>", "cat")), "segmix", {"id": "x", "fingerprint": ""})
    assert [one.name for one in _pieces(str(photos), [swapped], 64)] == ["<a>", "<b>"]  # an id is its own name
    with pytest.raises(StudioError, match="several subjects, so '<tom>' can't be all"):
        list(_pieces(f"<tom>={photos}", [duo], 64))
