"""PNG metadata: ours and A1111's, written and read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.errors import StudioError
from pipelines.pictures import a1111_text, read_a1111, read_picture, save_picture
from pipelines.request import Request

IMAGE = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)


def recipe(**changes: Any) -> dict[str, Any]:
    request = Request("a <my-cat>, 50% {off}", negative="blurry", seeds=(5,), width=96, height=64, guidance=7.0)
    return {
        "request": request.to_json() | changes,
        "seed": 5,
        "base": {"id": "owner/base, v1", "fingerprint": "0123456789abcdef"},
        "concepts": [{"name": "my-cat", "strength": 0.8}],
        "versions": {"attune": "0.1.0"},
    }


def test_the_picture_and_both_texts_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    save_picture(path, IMAGE, recipe())
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), IMAGE)
    known = read_picture(path)
    assert known["attune"] == recipe()
    assert Request.from_json(known["request"]) == Request.from_json(recipe()["request"])
    assert known["parameters"] == (
        "a <my-cat>, 50% {off}\nNegative prompt: blurry\n"
        "Steps: 25, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 96x64, Model hash: 0123456789, "
        'Model: "owner/base, v1", Attune concepts: "my-cat:0.8", Version: Attune 0.1.0'
    )


def test_the_bytes_depend_on_nothing_but_the_recipe(tmp_path: Path) -> None:
    save_picture(tmp_path / "1.png", IMAGE, recipe())
    save_picture(tmp_path / "2.png", IMAGE, recipe())
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


@pytest.mark.parametrize(
    "prompt", ["", "猫 on the 雪", "two\nlines", 'say "hi", \\ and: that', "nul \0 and \x1f", "🎨" * 300]
)
def test_any_prompt_survives(tmp_path: Path, prompt: str) -> None:
    save_picture(tmp_path / "x.png", IMAGE, recipe(prompt=prompt, negative=None))
    assert read_picture(tmp_path / "x.png")["request"]["prompt"] == prompt


def test_other_tools_find_every_field_with_their_own_pattern() -> None:
    """The pattern with which A1111 and its forks split the last line."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    fields = dict(pattern.findall(a1111_text(recipe()).split("\n")[-1]))
    assert fields["Sampler"] == "DDIM"
    assert fields["Model"] == '"owner/base, v1"'
    assert fields["Version"] == "Attune 0.1.0"


def test_a_picture_of_another_tool_gives_what_can_be_understood(tmp_path: Path) -> None:
    texts = PngInfo()
    texts.add_text(
        "parameters",
        "a cat\nin the snow\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 42, "
        "Size: 512x768, Model: x, Clip skip: 2",
    )
    Image.fromarray(IMAGE).save(tmp_path / "x.png", pnginfo=texts)
    known = read_picture(tmp_path / "x.png")
    assert known["attune"] is None
    assert known["request"] == {
        "prompt": "a cat\nin the snow",
        "negative": "dog",
        "scheduler": "dpmpp_2m",
        "steps": 20,
        "seeds": (42,),
        "guidance": 6.5,
        "width": 512,
        "height": 768,
    }


@pytest.mark.parametrize("text", ["", "a prompt", "Steps: x, Seed: -1, Size: 9", "a\nSteps: 99999999999999999999999"])
def test_strange_texts_are_read_without_complaint(text: str) -> None:
    assert set(read_a1111(text)) <= {"prompt", "negative"}


@pytest.mark.parametrize("text", ["[]", "{", '{"request": 3}', "[" * 100_000])
def test_a_damaged_recipe_gets_a_sentence(tmp_path: Path, text: str) -> None:
    texts = PngInfo()
    texts.add_text("attune", text)
    Image.fromarray(IMAGE).save(tmp_path / "x.png", pnginfo=texts)
    with pytest.raises(StudioError, match="damaged"):
        read_picture(tmp_path / "x.png")


def test_what_is_no_png_gets_a_sentence(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "x.jpg")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    for name, word in (("x.jpg", "not a readable PNG"), ("x.png", "not a readable PNG"), ("y.png", "no file 'y.png'")):
        with pytest.raises(StudioError, match=word):
            read_picture(tmp_path / name)
