"""The world: the same seed gives the same picture, and the truth is true."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from pipelines.errors import StudioError
from pipelines.toybox.photos import Shoot, shoot, write_photos
from pipelines.toybox.scenes import Placed, compose, scene, stream, subject
from pipelines.toybox.toys import SHAPES, random_toy
from pipelines.toybox.words import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS, TRUTHFUL, Wording, caption


def test_the_world_is_as_large_as_promised() -> None:
    assert len(CATEGORIES) >= 12 and len(COLORS) == 10 and len(PATTERNS) >= 3
    assert len(BACKGROUNDS) == 9 and "simple" in BACKGROUNDS
    assert set(SHAPES) == set(CATEGORIES)


def test_a_seed_is_a_picture_whatever_else_was_drawn() -> None:
    first = scene("train", 5)
    np.random.seed(0)
    scene("test", 6)
    again = scene("train", 5)
    assert np.array_equal(first.image, again.image) and first.toys == again.toys
    assert not np.array_equal(first.image, scene("test", 5).image)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_mask_covers_just_what_the_toy_changed(category: str) -> None:
    """Painting the toy changes the picture inside its mask, and outside only by a soft shadow and a soft edge."""
    toy = random_toy(stream("tune", 1), category)
    with_toy = compose([Placed(toy, 32, 58, 36)], "simple", stream("tune", 2))
    empty = compose([], "simple", stream("tune", 2))
    change = np.abs(with_toy.image.astype(int) - empty.image).max(axis=2)
    mask = with_toy.masks[0]
    assert 150 < mask.sum() < 36 * 36 * 1.1
    grown = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert change[~grown].max() < 100  # a shadow on white, no paint
    x0, y0, x1, y1 = with_toy.toys[0]["box"]
    inside = np.zeros_like(mask)
    inside[y0:y1, x0:x1] = True
    assert not mask[~inside].any() and mask[y0].any() and mask[:, x0].any()


def test_toys_in_front_hide_those_behind() -> None:
    toys = [random_toy(stream("tune", 3), "ball"), random_toy(stream("tune", 4), "cube")]
    both = compose([Placed(toys[0], 30, 56, 30), Placed(toys[1], 36, 60, 30)], "grass", stream("tune", 5))
    assert not (both.masks[0] & both.masks[1]).any()
    alone = compose([Placed(toys[0], 30, 56, 30)], "grass", stream("tune", 5))
    assert both.masks[0].sum() < alone.masks[0].sum()


def test_a_subject_stays_itself_and_keeps_an_asked_category() -> None:
    assert subject(7) == subject(7)
    assert subject(7) != subject(8)
    assert subject(7, "robot").category == "robot" and subject(7, "robot").colors == subject(7).colors
    with pytest.raises(StudioError, match="no 'dragon'"):
        subject(7, "dragon")


def test_captions_say_only_what_is_true() -> None:
    rng = np.random.default_rng(0)
    for seed in range(300):
        one = scene("tune", seed)
        said = caption(one.toys, one.background, rng, Wording())
        assert said.background in (None, one.background)
        for index, (start, stop), noun, color, pattern in said.said:
            toy = one.toys[index]
            assert said.text[start:stop] == noun == toy["category"]
            assert color in (None, toy["colors"][0]) and pattern in (None, toy["pattern"])
        for toy in one.toys:
            unnamed = {toy["accent_color"]} - set(toy["colors"])
            others = {color for other in one.toys for color in other["colors"]}
            assert not any(f" {color} " in said.text for color in unnamed - others)


def test_a_truthful_caption_names_everything() -> None:
    toys = [{"category": "cat", "colors": ["orange", "red"], "pattern": "striped", "box": [0, 0, 9, 9]}]
    text = caption(toys, "snow", np.random.default_rng(1), TRUTHFUL).text
    assert text in ("a photo of an orange striped cat in the snow", "an orange striped cat in the snow")


def test_photos_are_a_data_folder_with_truth(tmp_path) -> None:
    truth = write_photos(shoot(Shoot((7,), 5, "grass", prop=True)), tmp_path)
    assert json.loads((tmp_path / "truth.json").read_text()) == truth
    assert [p["background"] for p in truth["pictures"]] == ["grass"] * 5
    assert len({p["prop"] for p in truth["pictures"]}) == 1 and truth["pictures"][0]["prop"]
    boxes = {tuple(p["toys"][0]["box"]) for p in truth["pictures"]}
    assert len(boxes) > 3  # place and size vary
    for picture in truth["pictures"]:
        mask = cv2.imread(str(tmp_path / picture["mask"]), cv2.IMREAD_GRAYSCALE)
        assert set(np.unique(mask)) == {0, 255} and picture["toys"][0]["subject_seed"] == 7


def test_two_subjects_of_one_category_have_a_mask_each(tmp_path) -> None:
    truth = write_photos(shoot(Shoot((7, 9), 2, category="robot")), tmp_path)
    names = [toy["mask"] for toy in truth["pictures"][0]["toys"]]
    assert sorted(names) == ["0001-masklabel-robot7.png", "0001-masklabel-robot9.png"]
    assert all((tmp_path / name).exists() for name in names)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Shoot((1, 2, 3, 4, 5)), "don't fit"),
        (Shoot((3, 3)), "repeated"),
        (Shoot((1,), count=0), "1 to 1000"),
        (Shoot((1,), background="moon"), "no background 'moon'"),
    ],
)
def test_impossible_photos_are_refused(wish: Shoot, reason: str) -> None:
    with pytest.raises(StudioError, match=reason):
        shoot(wish)
