"""`generate` on the command line: regions, files of prompts, configurations; exactly as many pictures as asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.__main__ import main
from pipelines.commands.generate import add
from pipelines.commands.layouts import read_layout
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.files import save_tensors
from pipelines.library import Library
from pipelines.pictures import read_picture
from pipelines.prompts import filled, read_prompts
from pipelines.workspace import Workspace
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base") / "tiny"))


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    """The pictures a command made."""
    code = main(["generate", *argv, "--json"])
    said = capsys.readouterr()
    assert code == 0, said
    pictures: list[dict[str, Any]] = json.loads(said.out)["pictures"]
    return pictures


def regions(*argv: str) -> Any:
    """What `read_layout` makes of arguments."""
    import argparse

    from pipelines.commands.arguments import Parser

    parser = Parser()
    commands: argparse._SubParsersAction[Parser] = parser.add_subparsers()
    add(commands, argv)
    return read_layout(parser.parse_args(["generate", "a prompt", *argv]))


def test_regions_are_colours_boxes_and_masks(tmp_path: Path) -> None:
    drawing = np.full((40, 60, 3), 255, np.uint8)
    drawing[:, :20] = (255, 0, 0)
    Image.fromarray(drawing).save(tmp_path / "drawing.png")
    Image.fromarray(np.uint8(drawing[..., 1] == 0) * 255).save(tmp_path / "mask.png")
    colour = ["--layout", str(tmp_path / "drawing.png"), "--region", "<my-cat>=#FF0000", "--region", "dog#2=255,0,0"]
    layout = regions(*colour, "--region", f"cup={tmp_path / 'mask.png'}", "--region", "ball=0,0.5,1,1")
    assert [(one.words, one.occurrence) for one in layout.regions] == [
        ("<my-cat>", None),
        ("dog", 1),
        ("cup", None),
        ("ball", None),
    ]
    assert [int(one.area.mask.sum()) for one in layout.regions] == [800, 800, 800, 512 * 256]
    assert (layout.strength, layout.steps, layout.negative, layout.mode) == (0.08, None, -1e8, "strict")
    other = regions(*colour, "--guide", "0.1", "--guided-steps", "7", "--outside", "-9", "--figure")
    assert (other.strength, other.steps, other.negative, other.mode) == (0.1, 7, -9.0, "figure")
    assert regions() is None


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--region", "cat"], "no region"),
        (["--region", "=0,0,1,1"], "no region"),
        (["--region", "cat=#ff0000"], "--layout IMAGE"),
        (["--region", "cat=0,0,2,1"], "from 0 to 1"),
        (["--region", "cat=0.5,0,0.5,1"], "has no area"),
        (["--region", "cat=gone.png"], "no file 'gone.png'"),
        (["--layout", "gone.png"], "--region WORD=COLOUR"),
        (["--layout", "gone.png", "--region", "cat=255,0,0"], "no file 'gone.png'"),
    ],
)
def test_a_region_that_cannot_be_meant(argv: list[str], says: str) -> None:
    with pytest.raises(StudioError, match=says):
        regions(*argv)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["a cat", "--prompt-file", "x.txt"], "exclude each other"),
        (["a cat", "--config", "x.json"], "exclude each other"),
        (["--prompt-file", "gone.txt"], "Cannot read 'gone.txt'"),
        (["--config", "gone.json"], "Cannot read 'gone.json'"),
        (["--config", "gone.json", "--region", "cat=0,0,1,1"], "brings its own layout"),
        (["a cat", "--recur", "99"], "can't be taken again 99 times"),
        (["a cat", "--region", "cat=0,0,1,1", "--guide", "-1"], "strength is 0 or more"),
    ],
)
def test_what_can_be_put_right_is_one_sentence(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *argv]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


def concept(name: str, noun: str) -> Concept:
    return Concept(name, (Subject(f"<{name}>", noun),), "residual", {"id": "x", "fingerprint": ""})


def test_a_file_of_prompts_is_filled_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa {} in the snow\r\n\n  {} and a {}  \n# no {x} gap\n", encoding="utf-8")
    cat, dog = concept("my-cat", "cat"), concept("my-dog", "dog")
    assert read_prompts(file, [cat]) == ["a <my-cat> in the snow", "<my-cat> and a <my-cat>", "# no {x} gap"]
    with pytest.raises(StudioError, match="prompts.txt, line 1: 1 times {} for 2 subjects"):
        read_prompts(file, [cat, dog])
    with pytest.raises(StudioError, match="line 1: nothing says"):
        read_prompts(file)
    file.write_text("{} and {}")
    assert read_prompts(file, [dog, cat]) == ["<my-dog> and <my-cat>"]
    file.write_text("\n \n")
    with pytest.raises(StudioError, match="has no prompt"):
        read_prompts(file)
    file.write_text("a {}\n\na <my-dog> and a <nosuch>\n")
    with pytest.raises(StudioError, match="prompts.txt, line 3: there is no concept <nosuch>"):
        read_prompts(file, [cat], {"<my-cat>", "<my-dog>"})
    assert filled("a {} here", [cat]) == "a <my-cat> here" and filled("plain", []) == "plain"


def test_every_prompt_gets_exactly_the_pictures_asked_for(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the count is no multiple of the batch."""
    workspace = Workspace(tmp_path / "workspace")
    from pipelines.model import load_model

    fingerprint = load_model(base).fingerprint
    saved = Concept("my-cat", (Subject("<my-cat>", "cat"),), "residual", {"id": "tiny", "fingerprint": fingerprint})
    Library(workspace).save(Trained(saved, {"residual": torch.randn(1, 32)}))
    (tmp_path / "prompts.txt").write_text("a {}\n\na {} in the snow\n")
    made = answer(
        capsys,
        *("--prompt-file", str(tmp_path / "prompts.txt"), "--concept", "my-cat", "--base", base),
        *("--count", "3", "--batch", "2", "--steps", "1", "--seed", "5", "--out", str(tmp_path / "out")),
        *("--region", "<my-cat>=0,0,0.5,1", "--trim", "--ramp", "--recur", "1"),
    )
    assert [one["seed"] for one in made] == [5, 6, 7] * 2
    files = sorted((tmp_path / "out").glob("*.png"))
    assert len(files) == 6
    requests = [read_picture(file)["request"] for file in files]
    assert [one["prompt"] for one in requests] == ["a <my-cat>"] * 3 + ["a <my-cat> in the snow"] * 3
    assert all(one["trim"] and one["ramp"] and one["recur"] == 1 and one["layout"] for one in requests)
    named = ("a <my-cat>", "--base", base, "--steps", "1", "--seed", "5", "--out", str(tmp_path / "named"))
    answer(capsys, *named)  # no need to say it twice
    answer(capsys, *named, "--concept", "my-cat:0.5")
    first, second = (read_picture(file)["attune"] for file in sorted((tmp_path / "named").glob("*.png")))
    assert [one["concepts"][0]["strength"] for one in (first, second)] == [1.0, 0.5]
    assert len(first["concepts"]) == len(second["concepts"]) == 1
    (tmp_path / "named.txt").write_text("a <my-cat>\n")  # a concept that only the file names, and a gap in a prompt
    for given in (("--prompt-file", str(tmp_path / "named.txt")), ("a {}", "--concept", "my-cat")):
        (one,) = answer(capsys, *given, "--base", base, "--steps", "1", "--out", str(tmp_path / given[0][-4:].strip()))
        recipe = read_picture(one["path"])
        assert recipe["request"]["prompt"] == "a <my-cat>" and recipe["attune"]["concepts"][0]["name"] == "my-cat"


def test_every_line_of_a_file_has_its_own_concepts_and_is_checked_before_any_is_painted(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "workspace"))
    from pipelines.model import load_model

    known = {"id": "tiny", "fingerprint": load_model(base).fingerprint}
    for name, noun in (("my-cat", "cat"), ("my-dog", "dog")):
        saved = Concept(name, (Subject(f"<{name}>", noun),), "residual", known)
        Library(Workspace(tmp_path / "workspace")).save(Trained(saved, {"residual": torch.randn(1, 32)}))
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a <my-cat>\na red car\n\na <my-dog>\n")
    given = ("--prompt-file", str(file), "--base", base, "--steps", "1", "--out", str(out))

    def refused(*more: str) -> str:
        assert main(["generate", *given, *more]) == 2
        assert not list(out.glob("*.png"))
        return capsys.readouterr().err

    unheard = "error: prompts.txt, line 2: '<my-cat>' is not in the prompt"
    assert unheard in refused("--region", "<my-cat>=0,0,0.5,1") and unheard in refused("--attention", "<my-cat>")
    assert "error: prompts.txt, line 1: " in refused("--width", "101")

    def casts(*more: str) -> list[list[tuple[str, float]]]:
        made = [read_picture(one["path"])["attune"]["concepts"] for one in answer(capsys, *given, *more)]
        return [[(one["name"], one["strength"]) for one in cast] for cast in made]

    assert casts() == [[("my-cat", 1.0)], [], [("my-dog", 1.0)]]
    dog = ("my-dog", 0.5)
    assert casts("--concept", "my-dog:0.5") == [[dog, ("my-cat", 1.0)], [dog], [dog]]


def test_a_configuration_is_painted_with_its_own_defaults_and_again(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tensors(tmp_path / "cat.safetensors", {"residual": torch.randn(1, 32)})
    Image.new("RGB", (768, 768), (255, 0, 0)).save(tmp_path / "layout.png")
    config = {
        "prompt": "a cat.",
        "residual_dict": {"<cat2>": "cat.safetensors"},
        "color_context": {"255,0,0": ["cat", 2.5]},
        "guidance_steps": 50,
        "guidance_weight": 0.08,
        "weight_negative": -1e8,
        "layout": "layout.png",
        "subject_list": [["<cat2>", 1]],
    }
    (tmp_path / "guidance.json").write_text(json.dumps([config]))
    code = main(
        ["generate", "--config", str(tmp_path / "guidance.json"), "--base", base, "--steps", "2"]
        + ["--out", str(tmp_path / "out"), "--guide", "0.05"]
    )
    said = capsys.readouterr()
    assert code == 0 and "token 1, which is 'a'; 'cat' would be token 2" in said.err
    folder = tmp_path / "out" / "cat2" / "a_cat"
    files = sorted(folder.glob("0*.png"))
    assert [read_picture(file)["attune"]["seed"] for file in files] == [0, 1, 2, 3]
    request = read_picture(files[1])["request"]
    assert (request["scheduler"], request["recur"], request["guidance"]) == ("euler", 1, 7.5)
    assert request["layout"]["strength"] == 0.05 and (folder / "all_images.png").is_file()
    legacy = ("--config", str(tmp_path / "guidance.json"), "--base", base, "--steps", "2", "--count", "2")
    made = answer(capsys, *legacy, "--guide", "0.05", "--legacy-names", "--out", str(tmp_path / "theirs"))
    theirs = tmp_path / "theirs" / "<cat2>" / "a_cat."
    assert [one["path"] for one in made] == [str(theirs / "0.png"), str(theirs / "1.png")]
    assert (theirs / "1.png").read_bytes() == files[1].read_bytes() and (theirs / "all_images.png").is_file()
    assert main(["generate", *legacy, "--legacy-names"]) == 2 and "--out DIR" in capsys.readouterr().err
    answer(capsys, "--again", str(files[1]), "--base", base, "--out", str(tmp_path / "again"))
    assert (tmp_path / "again" / "0001.png").read_bytes() == files[1].read_bytes()
