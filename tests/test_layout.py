"""Layouts: colours, boxes and masks; which token a region means; what can't be drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import StudioError
from pipelines.layout import Area, Layout, Region, bind, colour_areas, contested, labels
from pipelines.request import Request
from pipelines.text import Tokenized
from tests.tiny import tiny_model

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def drawn(size: tuple[int, int], background: tuple[int, int, int], *boxes: Any) -> Image.Image:
    """Boxes of ((left, top, right, bottom), colour), corners included, on a picture of (width, height)."""
    image = Image.new("RGB", size, background)
    for corners, colour in boxes:
        image.paste(colour, (corners[0], corners[1], corners[2] + 1, corners[3] + 1))
    return image


def layout(*words: str, occurrences: tuple[int | None, ...] = ()) -> Layout:
    area = Area.box((0, 0, 1, 1), (2, 2))
    wanted = occurrences or (None,) * len(words)
    return Layout(tuple(Region(word, area, place) for word, place in zip(words, wanted, strict=True)))


@pytest.fixture(scope="module")
def prompt() -> Tokenized:
    """start a dog , a toy cat and a dog end: 0 1 2 3 4 5 6 7 8 9 10"""
    return tiny_model().tokenize("a dog, a toy cat and a dog")


def tokens(found: Layout, prompt: Tokenized) -> list[tuple[int, ...]]:
    return [one.tokens for one in bind(found, prompt)]


def test_colours_are_matched_exactly_and_alpha_is_ignored() -> None:
    image = drawn((12, 8), WHITE, ((2, 1, 5, 6), RED), ((6, 1, 6, 6), (255, 253, 253))).convert("RGBA")
    image.putpixel((2, 1), (255, 0, 0, 0))
    area = colour_areas(image, [RED])[RED]
    assert (area.height, area.width) == (8, 12)
    assert area.mask.sum() == 4 * 6 and area.mask[1:7, 2:6].all()
    stretched = colour_areas(image, [RED], (16, 24))[RED]
    assert stretched.mask.shape == (16, 24) and 0 < stretched.mask.sum() < 96  # blended edges belong to nothing
    flat = drawn((12, 8), WHITE, ((2, 1, 5, 6), RED)).convert("P")
    assert colour_areas(flat, [RED], (16, 24))[RED].mask.sum() == 96  # a palette keeps its colours


def test_a_colour_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(StudioError, match=r"colour 0,255,0.*It has: 255,255,255, 255,0,0"):
        colour_areas(drawn((12, 8), WHITE, ((2, 1, 5, 6), RED)), [GREEN])


def test_boxes_are_pixels_of_the_drawing() -> None:
    area = Area.box((1, 2, 3, 5), (6, 4))
    assert area.mask.sum() == 6 and area.mask[2:5, 1:3].all()
    for corners in ((1, 2, 1, 5), (-1, 0, 2, 2), (0, 0, 5, 6), (0, 0, float("nan"), 1), (0, 0, 1)):
        with pytest.raises(StudioError, match="box"):
            Area.box(corners, (6, 4))


def test_a_word_is_found_by_its_characters_and_its_occurrence(prompt: Tokenized) -> None:
    assert tokens(layout("dog"), prompt) == [(2, 9)]
    assert tokens(layout("toy cat"), prompt) == [(5, 6)]
    assert tokens(layout("DOG", occurrences=(1,)), prompt) == [(9,)]
    with pytest.raises(StudioError, match="there is no number 3"):
        bind(layout("dog", occurrences=(2,)), prompt)
    with pytest.raises(StudioError, match="'house' is not in the prompt"):
        bind(layout("house"), prompt)


def test_regions_of_the_same_word_get_occurrences_of_their_own(prompt: Tokenized) -> None:
    assert tokens(layout("dog", "dog"), prompt) == [(2,), (9,)]
    assert tokens(layout("dog", "dog", occurrences=(1, None)), prompt) == [(9,), (2,)]
    assert tokens(layout("dog", "dog", occurrences=(None, 0)), prompt) == [(9,), (2,)]
    assert tokens(layout("dog,", "dog"), prompt) == [(2, 3), (9,)]  # the longer words first, as a person means them
    assert tokens(layout("cat", "toy cat"), prompt) == [(6,), (5, 6)]  # nothing is left, so it is shared
    assert tokens(layout("cat", "cat"), prompt) == [(6,), (6,)]
    assert contested(layout("dog", "cat", "dog", occurrences=(0, None, 1)), prompt) == []
    (told,) = contested(replace(layout("dog,", "dog"), strength=0.1), prompt)
    assert "'dog,' has token 2 and 3, 'dog' has token 9" in told


def test_it_travels_in_a_request() -> None:
    mask = np.random.default_rng(0).random((13, 7)) < 0.5
    sent = Layout((Region("cat", Area.of(mask), 1, 2.0), Region("dog", Area.of(~mask))), 0.1, 7, -5.0, "figure")
    request = Request("a cat and a dog", layout=sent, recur=1, ramp=True, trim=True)
    back = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert back == request and back.layout is not None
    assert np.array_equal(back.layout.regions[0].area.mask, mask)
    plain = Request("a cat").to_json()
    assert not {"layout", "apart", "placed", "recur", "ramp", "trim"} & set(plain)  # as older versions wrote it
    assert Request.from_json(plain) == Request("a cat")


def test_a_damaged_layout_is_refused() -> None:
    good = layout("cat").to_json()
    area = good["regions"][0]["area"]
    for broken in ([10**6, 10**6, area[2]], [2, 3, area[2] + "A"], [2, 200, area[2]], ["2", 2, area[2]], [2, 2, "%"]):
        with pytest.raises(StudioError, match="damaged"):
            Layout.from_json(good | {"regions": [good["regions"][0] | {"area": broken}]})
    for change in ({"mode": "no"}, {"strength": -1.0}, {"negative": 3.0}, {"strength": float("nan")}, {"steps": -1}):
        with pytest.raises(StudioError):
            Layout.from_json(good | change)


def test_what_makes_no_sense_is_said() -> None:
    empty = Region("cat", Area.of(np.zeros((4, 4))))
    for regions, says in (((), "no regions"), ((empty,), "'cat' is empty"), ((replace(empty, words=" "),), "no word")):
        with pytest.raises(StudioError, match=says):
            Layout(regions).check()
    with pytest.raises(StudioError, match="mask"):
        Area.of(np.zeros((4, 4, 3)))


def test_labels_say_who_shares_a_pixel() -> None:
    left, top = Area.box((0, 0, 2, 4), (4, 4)), Area.box((0, 0, 8, 4), (8, 8))
    numbers, meaning = labels({"left": left, "top": top}, (8, 8))
    assert meaning[numbers[0, 0]] == {"left", "top"} and meaning[numbers[7, 7]] == set()
    assert meaning[numbers[7, 0]] == {"left"} and meaning[numbers[0, 7]] == {"top"}
    counts = np.bincount(numbers.ravel())
    assert counts.sum() == 64 and sorted(counts) == [16, 16, 16, 16]
