"""Masks from marks and from a detector's boxes: what may be typed, what is cut out, what is written and what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import segmenter as segmenters
from pipelines.__main__ import main
from pipelines.errors import StudioError
from pipelines.evaluate.eyes import detector
from pipelines.evaluate.sights import Sight, apart, shared, widened
from pipelines.events import Event, Finished, Note
from pipelines.files import save_tensors
from pipelines.formats.mudi import photos_of, read_dataset, subjects_of
from pipelines.marked_masks import Finder, along, by_detector, segmented_masks
from pipelines.marks import Given, Marking, read_marks
from pipelines.mask_files import Wish
from pipelines.photos import Photo, load_photos
from pipelines.segmenter import Segmenter, load_segmenter
from pipelines.toybox.scenes import scene
from pipelines.toybox.segmenter import new_segmenter


def photo(name: str, size: tuple[int, int] = (64, 48)) -> Photo:
    return Photo(Path(name), np.zeros((size[1], size[0], 3), np.uint8), size=size)


PHOTOS = [photo("a.png"), photo("b=1.png"), photo("c.png"), photo("c.jpg")]


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Segmenter]:
    """The embedded segmenter's shape with random weights, where the program looks for the trained one."""
    torch.manual_seed(2)
    file = tmp_path / "segmenter.safetensors"
    save_tensors(file, new_segmenter().state_dict())
    monkeypatch.setattr(segmenters, "EMBEDDED", file)
    load_segmenter.cache_clear()
    yield load_segmenter()
    load_segmenter.cache_clear()


def last(events: Iterator[Event]) -> tuple[Any, list[str]]:
    *before, end = events
    assert isinstance(end, Finished)
    return end.value, [event.text for event in before if isinstance(event, Note)]


# What may be typed


def test_marks_of_one_thing_come_together() -> None:
    given = [
        Given("click", "a.png:10,20"),
        Given("click", "a:11.5,20"),
        Given("away", "a.png:0,0"),
        Given("box", "b=1.png:1,2,30,40"),
        Given("line", "c.png:0,0,5,5,9,1"),
    ]
    found = read_marks(given, PHOTOS)
    assert found["a.png", ""] == Marking(((10, 20), (11.5, 20)), ((0, 0),))
    assert found["b=1.png", ""].box == (1, 2, 30, 40)
    assert found["c.png", ""].lines == (((0, 0), (5, 5), (9, 1)),)
    named = read_marks([Given("box", "my-cat=b=1.png:1,2,30,40"), Given("click", "dog=b=1:3,4")], PHOTOS)
    assert set(named) == {("b=1.png", "my-cat"), ("b=1.png", "dog")}
    assert set(read_marks([Given("click", "a:3,4")], PHOTOS, ["cat"])) == {("a.png", "cat")}
    half = found["b=1.png", ""].scaled(0.5, 0.25)
    assert half.box == (0.5, 0.5, 15, 10)


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("click", "a.png", "is no click. Write --click FILE:X,Y in pixels of the photo, as in cat.png:120,80"),
        ("click", "a.png:1", "is no click"),
        ("click", "a.png:1,2,3", "is no click"),
        ("click", "a.png:nan,2", "is no click"),
        ("click", "a.png:1,x", "is no click"),
        ("line", "a.png:1,2", "is no line"),
        ("line", "a.png:1,2,3,4,5", "is no line"),
        ("box", "a.png:1,2,3", "is no box"),
        ("box", ":1,2,3,4", "no photo ''"),
        ("click", "z.png:1,2", "no photo 'z.png' in the folder. It has: a.png, b=1.png"),
        ("click", "c:1,2", "no photo 'c'"),  # c.png and c.jpg: which is meant?
        ("click", "cat=z.png:1,2", "no photo 'z.png'"),
        ("click", "a.png:65,2", r"a.png: \(65, 2\) is outside the photo of 64 x 48 pixels"),
        ("away", "a.png:1,2", "a.png: it is only said where it is not"),
        ("box", "a.png:5,5,5,20", "a.png: the box 5,5,5,20 has no area"),
        ("box", "a.png:9,5,5,20", "has no area"),
        ("box", "a.png:5,5,99,20", "outside the photo"),
    ],
)
def test_a_mark_that_cannot_be_meant_is_one_sentence(kind: str, text: str, says: str) -> None:
    with pytest.raises(StudioError, match=says):
        read_marks([Given(kind, text)], PHOTOS)


def test_marks_say_which_of_several_masks_they_are_for() -> None:
    for text, says in (("a:1,2", "doesn't say which mask"), ("x=a:1,2", "no mask called 'x'.*cat, dog")):
        with pytest.raises(StudioError, match=says):
            read_marks([Given("click", text)], PHOTOS, ["cat", "dog"])
    with pytest.raises(StudioError, match="a.png: two boxes"):
        read_marks([Given("box", "a:1,2,9,9"), Given("box", "a:2,2,9,9")], PHOTOS)


def test_a_line_is_clicks_along_it() -> None:
    assert along([(0, 0), (8, 0), (8, 8)], 5) == [(0, 0), (4, 0), (8, 0), (8, 4), (8, 8)]
    assert along([(3, 3), (3, 3)], 2) == [(3, 3), (3, 3)]


# What a detector says


def test_one_thing_seen_twice_is_one_thing() -> None:
    sights = [Sight((0, 0, 10, 10), 0.4, 0), Sight((1, 0, 10, 10), 0.9, 1), Sight((20, 0, 30, 10), 0.5, 0)]
    assert [one.score for one in apart(sights)] == [0.9, 0.5]
    assert shared((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert shared((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert widened((1, 10, 60, 30), 0.05, (40, 64)) == (0, 8, 63.2, 32)


def test_the_judge_spots_what_is_named() -> None:
    one = next(
        s for s in (scene("test", n, count=2) for n in range(50)) if s.toys[0]["category"] != s.toys[1]["category"]
    )
    nouns = [toy["category"] for toy in one.toys]
    found = detector().spot(one.image, nouns)
    assert sorted(sight.query for sight in found) == [0, 1] and all(0 < sight.score <= 1 for sight in found)
    for sight in found:
        ys, xs = np.nonzero(one.masks[sight.query])
        assert shared(sight.box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)) > 0.5
    assert not detector().spot(one.image, ["nothing of this world"])


# Files


class Blocks:
    """A detector that finds blocks of one colour: red ones are cats, green ones dogs, larger ones surer."""

    name = "blocks"
    asked: list[tuple[str, ...]]

    def __init__(self) -> None:
        self.asked = []

    def find(self, picture: Any, queries: Sequence[str]) -> list[Any]:
        return [sight.box for sight in self.spot(picture, queries)]

    def spot(self, picture: Any, queries: Sequence[str]) -> list[Sight]:
        self.asked.append(tuple(queries))
        found = []
        for color in np.unique(picture.reshape(-1, 3), axis=0):
            word = "cat" if color[0] > 0 else "dog"
            if color.any() and word in queries:
                ys, xs = np.nonzero((picture == color).all(-1))
                box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
                found.append(Sight(box, len(xs) / picture[..., 0].size, queries.index(word)))
        return apart(found)


def folder(path: Path) -> Path:
    """a.png: a large and a small cat; b.png: a dog, whose mask a person made; c.png: nothing."""
    path.mkdir()
    pictures = {name: np.zeros((96, 64, 3), np.uint8) for name in "abc"}
    pictures["a"][10:60, 8:40], pictures["a"][70:80, 50:60] = (200, 0, 0), (100, 0, 0)
    pictures["b"][20:70, 16:56] = (0, 200, 0)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(path / f"{name}.png")
    painted = np.zeros((96, 64), np.uint8)
    painted[20:70, 16:56] = 255
    Image.fromarray(painted).save(path / "b-masklabel-dog.png")
    (path / "a.txt").write_text("a photo of a cat on the grass")
    return path


def test_the_surest_thing_of_a_noun_is_cut_out_and_the_rest_is_told(embedded: Segmenter, tmp_path: Path) -> None:
    data, blocks = folder(tmp_path / "photos"), Blocks()
    wish = Wish(data, ("cat", "dog"), names=("my-cat", "dog"))
    report, said = last(segmented_masks(embedded, wish, (), Finder(blocks, 0.05)))
    assert report["written"] == ["a-masklabel-my-cat.png"] and report["kept"] == ["b-masklabel-dog.png"]
    assert report["missing"] == [
        "a-masklabel-dog.png", "b-masklabel-my-cat.png", "c-masklabel-my-cat.png", "c-masklabel-dog.png",
    ]  # fmt: skip
    assert report["boxes"] == {"a-masklabel-my-cat.png": [8, 10, 40, 60]}
    assert blocks.asked == [("cat", "dog")] * 3  # they compete
    assert any("a.png shows 2 things like 'cat'" in text and "--box a.png:" in text for text in said)
    assert any("b-masklabel-dog.png was made by a person" in text for text in said)
    (a, b, _) = load_photos(data)
    embedded.look(a.image)
    asked = embedded.box((8 - 3.2, 10 - 4.8, 40 + 3.2, 60 + 4.8))  # 5 % of the photo on each side
    np.testing.assert_array_equal(a.masks["my-cat"], asked)
    assert (b.masks["dog"] == np.asarray(Image.open(data / "b-masklabel-dog.png"))).all()
    again, _ = last(segmented_masks(embedded, wish, (), Finder(blocks)))
    assert again["written"] == ["a-masklabel-my-cat.png"]  # ours may be made again


def test_marks_go_before_the_detector(embedded: Segmenter, tmp_path: Path) -> None:
    data = folder(tmp_path / "photos")
    wish = Wish(data, ("cat",))
    given = [Given("box", "a.png:48,68,62,82"), Given("click", "c.png:30,30"), Given("away", "c.png:2,2")]
    report, _ = last(segmented_masks(embedded, wish, given, Finder(Blocks())))
    assert report["written"] == ["a-masklabel.png", "c-masklabel.png"] and report["missing"] == ["b-masklabel.png"]
    assert "boxes" not in report
    a, _, c = load_photos(data)
    embedded.look(a.image)
    np.testing.assert_array_equal(a.masks[""], embedded.box((48, 68, 62, 82)))
    embedded.look(c.image)
    np.testing.assert_array_equal(c.masks[""], embedded.click([(30, 30), (2, 2)], [True, False]))
    alone, _ = last(segmented_masks(embedded, Wish(data), [Given("click", "b:30,30")]))
    assert alone["written"] == ["b-masklabel.png"] and alone["missing"] == []  # only what is marked


def test_marks_are_in_pixels_of_the_whole_photo(
    embedded: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the photo is looked at smaller than it is; the mask is as large as the photo."""
    from pipelines import marked_masks

    monkeypatch.setattr(marked_masks, "LOOKED_AT", 32)
    data = folder(tmp_path / "photos")
    last(segmented_masks(embedded, Wish(data), [Given("box", "a.png:8,10,40,60")]))
    (a, *_), (small, *_) = load_photos(data), load_photos(data, short_side=32)
    assert a.masks[""].shape == (96, 64)
    embedded.look(small.image)
    asked = Image.fromarray(embedded.box((4, 5, 20, 30))).resize((64, 96), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(a.masks[""], np.where(np.asarray(asked) > 127, 255, 0))


def test_a_class_picture_counts_when_it_shows_exactly_one(embedded: Segmenter, tmp_path: Path) -> None:
    two, one, none = load_photos(folder(tmp_path / "photos"))
    find = by_detector(embedded, Finder(Blocks(), 0.0))
    found = find(one.image, "dog")
    embedded.look(one.image)
    assert found is not None and np.array_equal(found, embedded.box((16, 20, 56, 70)))
    assert find(two.image, "cat") is None and find(none.image, "cat") is None


def test_detected_toys_are_cut_out_well() -> None:
    """On scenes that chose nothing: the judge finds nearly all toys, and the masks fit the true ones."""
    segmenter, overlaps, count = load_segmenter(), [], 0
    for number in range(30):
        one = scene("test", 440_000 + number, count=1 + number % 2)
        nouns = [toy["category"] for toy in one.toys]
        if len(set(nouns)) < len(nouns):
            continue
        segmenter.look(one.image)
        count += len(nouns)
        for sight in detector().spot(one.image, nouns):
            found, true = segmenter.box(sight.box) > 0, one.masks[sight.query]
            overlaps.append((found & true).sum() / (found | true).sum())
    assert len(overlaps) > 0.9 * count and np.mean(overlaps) > 0.8


def test_points_lines_and_boxes_together_are_asked_for_at_once(embedded: Segmenter) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    embedded.look(picture)
    both = embedded.click([(30, 30)], box=(10, 10, 50, 50))
    assert both.shape == (64, 64) and not np.array_equal(both, embedded.box((10, 10, 50, 50)))
    np.testing.assert_array_equal(embedded.click([], box=(10, 10, 50, 50)), embedded.box((10, 10, 50, 50)))
    for points, options, says in (
        ([], {}, "Click at least once"), ([(1, 1)], {"inside": [False]}, "Click at least once"),
        ([(70, 1)], {}, "outside the picture"), ([(1, 1)], {"box": (5, 5, 5, 9)}, "no area"),
    ):  # fmt: skip
        with pytest.raises(StudioError, match=says):
            embedded.click(points, **options)


def test_the_command_with_a_detector_writes_metadata_that_reads_back(
    embedded: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "photos"
    assert (
        main(["toybox", "photos", "--subject-seed", "2001", "--category", "cat", "--count", "2", "--out", str(data)])
        == 0
    )
    for mask in data.glob("*masklabel*"):
        mask.unlink()
    capsys.readouterr()
    line = ["masks", str(data), "--noun", "cat", "--detector", "toybox", "--metadata", "sks", "--json"]
    assert main([*line, "--workspace", str(tmp_path / "home")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["written"]) == 2 == len(report["boxes"]) and report["metadata"].endswith("metadata.jsonl")
    dataset = read_dataset(data)
    assert dataset.phrases == {"cat": "sks cat"} and [row.mask.name for row in dataset.rows] == report["written"]
    assert subjects_of(dataset)[1] == "sks" and all("<cat>" in (one.caption or "") for one in photos_of(dataset))
    rows = [json.loads(text) for text in (data / "metadata.jsonl").read_text().splitlines()[1:]]
    assert [row["box"] for row in rows] == list(report["boxes"].values())
    assert main(line) == 2 and "already there" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--detector", "toybox"], "A detector looks for words"),
        (["--noun", "cat", "--by", "segmenter"], "knows no words"),
        (["--noun", "cat", "--segmenter", "x.pth"], "needs boxes or clicks"),
        (["--noun", "cat", "--detector", "toybox", "--by", "attention"], "go to Segment Anything"),
        (["--noun", "cat", "--detector", "toybox", "--threshold", "2"], "0 to 1"),
        (["--noun", "cat", "--detector", "toybox", "--margin", "-1"], "0 to 0.5"),
        (["--noun", "cat", "--detector", "toybox", "--segmenter", "gone.pth"], "no file 'gone.pth'"),
        (["--noun", "cat", "--metadata", "sks hta"], "a rare word for each of 1 nouns"),
        (["--noun", "cat", "--noun", "dog", "--metadata", "sks sks"], "no two alike"),
        (["--noun", "cat", "--metadata", "sks", "--out", "x"], "Leave --out out"),
        (["--click", "a.png:1,1", "--metadata", "sks"], "Name it with --noun"),
        (["--click", "a.png:1,1", "--soft"], "--soft and --set are for masks by attention"),
        (["--noun", "cat", "--detector", "google/owlv2-base-patch16-ensemble"], "only Toybox's own world"),
        (["--click", "a.png:20,20", "--base", "runwayml/stable-diffusion-v1-5"], "only Toybox's own world"),
        (["--noun", "cat", "--detector", "toybox", "--set", "steps=3"], "--soft and --set are for masks by attention"),
        (["--discover", "--click", "a.png:1,1"], "one of the two"),
        (["--click", "a.png:900,1"], "a.png: (900, 1) is outside the photo"),
        (["--click", "no/name=a.png:1,1"], "can't name a concept"),
    ],
)
def test_what_can_be_put_right_is_one_sentence(
    argv: list[str], says: str, embedded: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "photos")
    before = sorted(path.name for path in data.iterdir())
    assert main(["masks", str(data), *argv]) == 2
    said = capsys.readouterr().err
    assert says in said and said.splitlines()[-1].startswith("error: ")
    assert before == sorted(path.name for path in data.iterdir())
