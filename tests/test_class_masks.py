"""Class pictures with masks: what was found is kept with its mask, what was not is told, all of it is read again."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.__main__ import build_parser
from pipelines.class_masks import STAGE, ClassWish, by_attention, class_finder, masked_class_pictures
from pipelines.commands import masks, prior
from pipelines.commands.terminal import Terminal
from pipelines.errors import StudioError
from pipelines.events import Finished, Note, Progress
from pipelines.formats import mudi
from pipelines.mask_files import Wish
from tests.tiny import tiny_model

WISH = ClassWish(each=2, tries=2, steps=1, size=32)
CLASSES = {"a": "cat", "b": "dog"}


def finder(*missed: int) -> Any:
    """Finds a block in every picture, but not in those of these numbers (from 0)."""
    seen: list[Any] = []

    def find(picture: Any, noun: str) -> Any:
        seen.append((noun, picture))
        mask = np.zeros(picture.shape[:2], np.uint8)
        mask[8:20, 8:24] = 255
        return None if len(seen) - 1 in missed else mask

    find.seen = seen
    return find


def test_they_are_painted_masked_and_read_again(tmp_path: Path) -> None:
    find = finder(1)
    *events, last = masked_class_pictures(tiny_model("sd1"), CLASSES, find, tmp_path / "x", WISH)
    assert isinstance(last, Finished) and last.value == tmp_path / "x" / mudi.CLASS_FILE
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 1, 2, 3, 4]
    assert [noun for noun, _ in find.seen] == ["cat", "dog", "dog", "cat", "dog"]  # the second one is tried again
    found = mudi.read_dataset(tmp_path / "x", mudi.CLASS_FILE)
    assert found.phrases == CLASSES and [row.id for row in found.rows] == ["a", "a", "b", "b"]
    pictures = mudi.class_pictures_of(found)
    assert [one.words for one in pictures] == ["A photo of a cat"] * 2 + ["A photo of a dog"] * 2
    assert [one.token for one in pictures] == ["<a>"] * 2 + ["<b>"] * 2
    assert all(one.mask is not None and int((one.mask > 128).sum()) == 12 * 16 for one in pictures)
    assert np.array_equal(pictures[1].image, find.seen[3][1]) and np.array_equal(pictures[2].image, find.seen[2][1])
    assert len({one.image.tobytes() for one in pictures}) == 4
    with pytest.raises(StudioError, match="already there"):
        list(masked_class_pictures(tiny_model("sd1"), CLASSES, find, tmp_path / "x", WISH))


def test_what_never_comes_out_right_is_told(tmp_path: Path) -> None:
    events = list(masked_class_pictures(tiny_model("sd1"), CLASSES, finder(2, 3), tmp_path / "x", WISH))
    assert [event.text for event in events if isinstance(event, Note)] == [
        "Picture 2 of 'cat' never showed exactly one; it was left out."
    ]
    assert len(mudi.read_dataset(tmp_path / "x", mudi.CLASS_FILE).rows) == 3
    with pytest.raises(StudioError, match="never painted exactly one cat"):
        list(masked_class_pictures(tiny_model("sd1"), CLASSES, finder(0, 1), tmp_path / "y", WISH))
    assert not (tmp_path / "y").exists()


def test_mudis_numbers_stand_where_nobody_says_otherwise(tmp_path: Path) -> None:
    wish = ClassWish()
    assert (wish.each, wish.tries, wish.words("dog")) == (
        50,
        10,
        "A photo of a dog, simple background, full body shot.",
    )
    assert wish.negative == "anime, cartoon, graphic, text, painting, crayon, graphite, abstract glitch, blurry"
    line = ["prior", str(tmp_path / "x"), "--noun", "dog"]
    options = build_parser(line).parse_args(line)
    assert (options.count, options.tries, options.steps, prior.SURE) == (50, 10, 50, 0.4)


def test_a_detector_is_surer_of_class_pictures_whose_boxes_are_not_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MuDI: 0.4 there; in photos 0.2, and boxes 5 % of the photo larger."""
    monkeypatch.setattr("pipelines.segmenter.check_segmenter", lambda *_: None)  # no checkpoint of hundreds of MB here
    painted = inspect.getclosurevars(class_finder(tiny_model("sd1"), "some/owl")).nonlocals["finder"]
    assert (painted.detector.threshold, painted.margin) == (0.4, 0.0)
    line = ["masks", str(tmp_path), "--noun", "dog", "--detector", "some/owl", "--device", "cpu"]
    options = build_parser(line).parse_args(line)
    work = masks._segmented(options, Wish(tmp_path, ("dog",)), [], Terminal(as_json=True))
    photographed = inspect.getgeneratorlocals(work)["finder"]
    assert (photographed.detector.threshold, photographed.margin) == (0.2, 0.05)


def test_the_prompt_says_article_and_class_and_nothing_in_it_is_a_format() -> None:
    wish = ClassWish(prompt="{} {} {x} %s")
    assert wish.words("owl {0}") == "an owl {0} {x} %s"
    with pytest.raises(StudioError, match="{} twice"):
        ClassWish(prompt="a {}").check(Path("nowhere"))
    with pytest.raises(StudioError, match="At least one picture"):
        ClassWish(each=0).check(Path("nowhere"))


@pytest.mark.parametrize(("share", "taken"), [(0.0, False), (0.01, False), (0.3, True), (0.95, False)])
def test_attention_finds_only_what_can_be_cut_out(share: float, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of the tests sees nothing, so what attention says is given: so many rows are the noun's."""

    def seen(model: Any, image: Any, nouns: Any, params: Any) -> Any:
        scores = np.zeros((1, 100, 10), np.float32)
        scores[0, : round(share * 100)] = 1
        return scores

    monkeypatch.setattr("pipelines.masks.noun_scores", seen)
    mask = by_attention(tiny_model("sd1"))(np.zeros((100, 100, 3), np.uint8), "cat")
    assert (mask is not None) == taken
    assert mask is None or (mask.shape == (100, 100) and abs((mask > 128).mean() - share) < 0.02)


def test_stopped_it_keeps_what_can_be_used(tmp_path: Path) -> None:
    for steps, rows in ((1, 0), (2, 2), (3, 3)):
        folder = tmp_path / str(steps)
        work = masked_class_pictures(tiny_model("sd1"), CLASSES, finder(), folder, WISH)
        for _ in range(steps):
            next(work)
        work.close()  # type: ignore[attr-defined]
        assert (folder / mudi.CLASS_FILE).exists() == bool(rows)
        assert not rows or len(mudi.read_dataset(folder, mudi.CLASS_FILE).rows) == rows


def test_a_stop_comes_in_after_each_try(tmp_path: Path) -> None:
    """And not only after all tries of a picture; progress is said then, too."""
    find = finder(1, 2, 3)
    work = masked_class_pictures(tiny_model("sd1"), {"a": "cat"}, find, tmp_path / "x", replace(WISH, tries=9))
    for painted, step in enumerate((1, 1, 1), start=1):
        assert next(work) == Progress(STAGE, step, 2) and len(find.seen) == painted
    work.close()  # type: ignore[attr-defined]
    assert len(find.seen) == 3 and len(mudi.read_dataset(tmp_path / "x", mudi.CLASS_FILE).rows) == 1
