"""Detect-and-Compare: the paper's own matrices, who stands for whom, count errors apart, and eyes of several kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.__main__ import main
from pipelines.errors import StudioError
from pipelines.evaluate.detect_compare import (
    Comparison,
    detect_and_compare,
    matched,
    own_similarity,
    references,
    score,
    similarity,
    summary,
)
from pipelines.evaluate.eyes import Dino, Owl, Pair, ToyboxEyes, eyes, squared
from pipelines.toybox.scenes import compose, place, stream, subject
from tests.tiny import tiny_tokenizer

# Figure 14 of the paper
GT = np.array([[0.78, 0.28], [0.28, 0.77]])
GOOD = np.array([[0.72, 0.26], [0.29, 0.71]])
SINGLE = np.array([[0.27, 0.74], [0.25, 0.71]])


@pytest.mark.parametrize(
    ("seen", "norm", "value"),
    [
        (GOOD, "spectral", 0.933),
        (GOOD, "fro", 0.912),
        (GOOD, "fro2", 0.992),
        (SINGLE, "spectral", 0.313),
        (SINGLE, "fro", 0.310),
        (SINGLE, "fro2", 0.524),
    ],
)
def test_the_published_matrices(seen: NDArray[Any], norm: Any, value: float) -> None:
    assert score(seen, GT, norm) == pytest.approx(value, abs=6e-4)
    assert score(GT, GT, norm) == 1


def test_an_unknown_norm_is_told() -> None:
    with pytest.raises(StudioError, match="There is no norm 'nuc'. Choose one of: spectral, fro, fro2"):
        score(GOOD, GT, "nuc")  # type: ignore


def test_similarities_are_means_over_photos() -> None:
    a = np.array([[1.0, 0.0], [0.6, 0.8]])
    b = np.array([[0.0, 1.0]])
    np.testing.assert_allclose(own_similarity([a, b]), [[(1 + 0.6 + 0.6 + 1) / 4, 0.4], [0.4, 1.0]])  # self-pairs count
    np.testing.assert_allclose(similarity(np.array([[1.0, 0.0]]), [a, b]), [[0.8, 0.0]])


def test_columns_choose_their_rows_in_turn() -> None:
    tempting = np.array([[0.9, 0.8], [0.85, 0.1]])
    assert matched(tempting) == (0, 1) and matched(tempting, "best") == (1, 0)
    assert matched(GOOD[::-1]) == (1, 0) and matched(np.eye(3)[[2, 0, 1]], "best") == (1, 2, 0)


class Plain:
    """Eyes that find blocks of one colour, and know things by their colour."""

    name = "plain"

    def find(self, picture: Any, queries: Sequence[str]) -> list[Any]:
        found = []
        for color in np.unique(picture.reshape(-1, 3), axis=0):
            if tuple(color) != (255, 255, 255):
                ys, xs = np.nonzero((picture == color).all(-1))
                found.append((float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)))
        return found

    def embed(self, views: Sequence[Any]) -> Any:
        cut = [picture if box is None else picture[int(box[1]) :, int(box[0]) :] for picture, box in views]
        return np.array([one[0, 0].astype(np.float32) for one in cut])


def blocks(*colors: tuple[int, int, int]) -> Any:
    picture = np.full((40, 40 * len(colors), 3), 255, np.uint8)
    for number, color in enumerate(colors):
        picture[10:30, 40 * number + 10 : 40 * number + 30] = color
    return picture


RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def photo(color: tuple[int, int, int]) -> Any:
    return np.full((20, 20, 3), color, np.uint8)


def test_pictures_are_judged_whole() -> None:
    known = references(Plain(), {"cat": [photo(RED)] * 2, "cat ": [photo(GREEN)]})
    assert known.queries == ("cat", "cat") and np.allclose(known.own, np.eye(2))
    good = detect_and_compare(Plain(), blocks(GREEN, RED), known)
    assert good.score == pytest.approx(1) and good.counted and good.each_its_own and good.norm == "spectral"
    np.testing.assert_allclose(good.similar, np.eye(2))
    single = detect_and_compare(Plain(), blocks(RED, (100, 0, 0)), known, norm="fro", match="best")
    assert single.counted and not single.each_its_own and single.score == pytest.approx(1 - np.sqrt(2))
    few, many = (detect_and_compare(Plain(), picture, known) for picture in (blocks(RED), blocks(RED, GREEN, BLUE)))
    assert (few.score, many.score) == (0, 0) and not few.counted and many.similar is None and not many.each_its_own
    told = summary([good, few, many])
    assert told == pytest.approx(
        {
            "n": 3,
            "norm": "spectral",
            "score": 1 / 3,
            "score_counted": 1.0,
            "count_errors": 2 / 3,
            "too_few": 1 / 3,
            "too_many": 1 / 3,
            "success": 1 / 3,
        }
    )
    assert summary([few])["score_counted"] is None
    assert good.to_json()["similar"] == [[1.0, 0.0], [0.0, 1.0]] and few.to_json()["similar"] is None


def test_missing_photos_and_pictures_are_told() -> None:
    with pytest.raises(StudioError, match="no photos of dog"):
        references(Plain(), {"cat": [photo(RED)], "dog": []})
    with pytest.raises(StudioError, match="no photos of any subject"):
        references(Plain(), {})
    with pytest.raises(StudioError, match="no pictures to judge"):
        summary([])


def test_toyboxs_judge_tells_two_subjects_of_one_kind_apart() -> None:
    """On drawn pictures the truth is known: right ones score high, the same toy twice and one toy alone do not."""
    own = [subject(seed, "car") for seed in (11, 12)]

    def drawn(toys: Sequence[Any], number: int) -> Any:
        rng = stream("test", 900_000 + number)
        return compose(place(list(toys), rng), "grass", rng).image

    judge = eyes()
    assert isinstance(judge, ToyboxEyes)
    known = references(judge, {f"car {n}": [drawn([toy], 10 * n + i) for i in range(3)] for n, toy in enumerate(own)})
    assert np.diag(known.own).min() > 0.8 > known.own[0, 1]
    results: dict[str, list[Comparison]] = {}
    for number in range(4):
        for what, toys in (("both", own), ("twice", [own[0], own[0]]), ("one", [own[0]])):
            seen = detect_and_compare(judge, drawn(toys, 100 + number), known)
            results.setdefault(what, []).append(seen)
    means = {what: summary(found) for what, found in results.items()}
    assert means["both"]["score"] > 0.6 > means["twice"]["score"] > -0.5
    assert means["both"]["success"] >= 0.75 and means["twice"]["success"] <= 0.25
    assert means["one"]["count_errors"] == means["one"]["too_few"] == 1
    empty = judge.embed([(np.full((64, 64, 3), 255, np.uint8), None)])
    assert not empty.any()


def tiny_owl(folder: Path) -> Path:
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    config = Owlv2Config(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def tiny_dino(folder: Path) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, mlp_ratio=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 36}, crop_size=crop).save_pretrained(folder)
    return folder


def test_models_for_real_photos_are_eyes_too(tmp_path: Path) -> None:
    both = eyes(str(tiny_owl(tmp_path / "owl")), str(tiny_dino(tmp_path / "dino")), threshold=0.0)
    assert isinstance(both, Pair) and both.name.endswith("dino") and "owl + " in both.name
    picture = np.random.default_rng(0).integers(0, 256, (96, 100, 3), dtype=np.uint8)
    found = both.find(picture, ["a cat", "a dog"])
    assert isinstance(both.detector, Owl)
    processor, model = both.detector._parts
    with torch.no_grad():
        inputs = processor(text=[["a cat", "a dog"]], images=[picture], return_tensors="pt")
        x, y, width, height = (model(**inputs).pred_boxes[0] * 100).T  # the padded square's side
    edges = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1).clamp(min=0)
    edges = edges.minimum(torch.tensor([100.0, 96.0, 100.0, 96.0]))
    seen = [box for box in edges.tolist() if box[2] - box[0] >= 1 and box[3] - box[1] >= 1]
    assert 0 < len(found) == len(seen)  # one a patch, unsuppressed, without those in the padding
    np.testing.assert_allclose(found, seen, atol=1e-3)
    assert isinstance(both.embedder, Dino)
    both.detector.threshold = 1.0
    assert both.find(picture, ["a cat"]) == []
    looks = both.embed([(picture, None), (picture, (10.0, 5.0, 40.0, 35.0)), (picture[5:35, 10:40], None)])
    assert looks.shape == (3, 16) and np.isfinite(looks).all()
    np.testing.assert_allclose(looks[1], looks[2], atol=1e-5)  # a box is as its own picture
    assert np.abs(looks[0] - looks[1]).max() > 1e-4


def test_a_box_is_set_on_a_white_square() -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    cut = squared(picture, (2.0, 3.0, 12.0, 7.0))
    assert cut.shape == (10, 10, 3) and not cut[3:7].any() and (cut[:3] == 255).all() and (cut[7:] == 255).all()
    assert squared(picture, None).shape == (20, 30, 3)


def test_eyes_that_cannot_see_are_told(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="only finds things"):
        eyes("some/owl")
    with pytest.raises(StudioError, match="both finds and compares"):
        eyes("toybox", "some/dino")
    lost = eyes(str(tmp_path / "nowhere"), str(tmp_path / "nowhere"))
    with pytest.raises(StudioError, match="can't be loaded"):
        lost.find(np.zeros((8, 8, 3), np.uint8), ["cat"])
    with pytest.raises(StudioError, match="can't be loaded"):
        lost.embed([(np.zeros((8, 8, 3), np.uint8), None)])


# A folder of pictures, and the command


def saved(folder: Path, **pictures: Any) -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


def compared(tmp_path: Path, **options: Any) -> Any:
    from pipelines.evaluate.comparison import Known, compare, read_pictures
    from pipelines.events import Finished

    many = blocks(RED, GREEN, BLUE)
    folder = saved(tmp_path / "in", good=blocks(RED, GREEN), mixed=blocks(RED, (100, 0, 0)), many=many, all_images=many)
    known = [Known("<tom>", "cat", (photo(RED),)), Known("max", "cat", (photo(GREEN), photo(GREEN)))]
    *_, last = compare(Plain(), read_pictures(folder), known, **options)
    assert isinstance(last, Finished)
    return last.value


def test_a_folder_is_judged_with_count_errors_apart(tmp_path: Path) -> None:
    found = compared(tmp_path)
    assert [one.path.stem for one in found.pictures] == ["good", "many", "mixed"]  # and not the sheet of them all
    good, many, mixed = found.results
    assert good.score == pytest.approx(1) and many.score == 0 and not many.counted and not mixed.each_its_own
    assert set(good.boxes) == {(10, 10, 30, 30), (50, 10, 70, 30)} and len(many.boxes) == 3 and many.rows == ()
    assert good.boxes[good.rows[0]] == (10, 10, 30, 30)  # red is the first subject
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["summary"]["count_errors"] == pytest.approx(1 / 3) and data["own"] == [[1.0, 0.0], [0.0, 1.0]]
    assert data["subjects"][1] == {"name": "max", "query": "cat", "photos": 2}
    assert [one["count"] for one in data["pictures"]] == [2, 3, 2] and data["measured_with"] == "plain"
    assert compared(tmp_path / "other", norm="fro2").results[2].score == pytest.approx(-1)


def test_subjects_that_look_alike_are_told(tmp_path: Path) -> None:
    from pipelines.evaluate.comparison import Known, compare
    from pipelines.events import Note
    from pipelines.photos import Photo

    twins = [Known("a", "cat", (photo(RED),)), Known("b", "cat", (photo(RED),))]
    events = list(compare(Plain(), [Photo(Path("x.png"), blocks(RED, GREEN))], twins))
    assert any(isinstance(event, Note) and "b and a are as alike" in event.text for event in events)
    with pytest.raises(StudioError, match="one name"):
        list(compare(Plain(), [Photo(Path("x.png"), blocks(RED))], [twins[0], twins[0]]))


def test_the_report_shows_boxes_in_their_subjects_colours(tmp_path: Path) -> None:
    import csv

    from pipelines.evaluate.compare_report import as_text, drawn, write_report

    found = compared(tmp_path)
    files = write_report(tmp_path / "out", found)
    assert [file.name for file in files] == ["compare.json", "compare.csv", "compare.md", "compare.html"]
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["found"] for row in rows] == ["2", "3", "2"] and rows[1]["own_max"] == ""
    assert float(rows[0]["own_<tom>"]) == 1
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;tom&gt;" in page and "<tom>" not in page and page.count("<img") == 3
    assert "3 found, 2 wanted" in page and "mixed up" in page and page.index("good.png") < page.index("many.png")
    text = "\n".join(as_text(found))
    assert "spectral" in text and "0% / 33%" in text
    good = drawn(found.pictures[0].image, found.results[0])
    assert good.shape == (160, 320, 3)  # enlarged four times
    assert tuple(good[40, 60]) == (0xD7, 0x26, 0x3D) and tuple(good[40, 220]) == (0x1B, 0x77, 0xD1)
    assert tuple(drawn(found.pictures[1].image, found.results[1])[60, 30]) == (0x66,) * 3  # nobody's


def test_the_command_judges_toybox_and_other_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [subject(seed, "car") for seed in (11, 12)]

    def made(toys: Sequence[Any], number: int) -> Any:
        rng = stream("test", 900_000 + number)
        return compose(place(list(toys), rng), "grass", rng).image

    pictures = saved(tmp_path / "pictures", a=made(own, 1), b=made(own[:1], 2))
    photos = [
        saved(tmp_path / f"{n}=x", **{str(i): made([toy], 10 * n + i) for i in range(3)}) for n, toy in enumerate(own)
    ]
    line = [
        "compare",
        str(pictures),
        "--subject",
        f"tom:car={photos[0]}",
        "--subject",
        f"max:car={photos[1]}",
        "--json",
    ]
    assert main([*line, "--device", "cpu"]) == 2
    assert "not known to be of it" in json.loads(capsys.readouterr().out)["error"]
    assert main([*line, "--detector", "toybox", "--form", "squared", "--out", str(tmp_path / "out")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["summary"]["too_few"] == 0.5 and data["summary"]["norm"] == "fro2" and len(data["files"]) == 4
    assert (tmp_path / "out" / "pictures" / "0001.png").is_file()
    owl, dino = tiny_owl(tmp_path / "owl"), tiny_dino(tmp_path / "dino")
    assert main([*line, "--detector", str(owl), "--embedder", str(dino), "--threshold", "0", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["measured_with"] == f"{owl} + {dino}"


def test_toyboxs_own_pictures_are_known_by_their_recipe(tmp_path: Path) -> None:
    from pipelines.evaluate.comparison import from_toybox, read_pictures
    from pipelines.pictures import save_picture

    request = {"prompt": "x", "negative": None, "steps": 1, "scheduler": "ddim", "guidance": 1, "width": 8, "height": 8}
    recipe = {"request": request, "concepts": [], "seed": 0, "versions": {"attune": "0"}}
    for name, kind in (("a", "toybox"), ("b", "sd1")):
        (tmp_path / name).mkdir()
        base = {"id": name, "fingerprint": "f" * 16, "kind": kind}
        save_picture(tmp_path / name / "1.png", blocks(RED), recipe | {"base": base})
        assert from_toybox(read_pictures(tmp_path / name)) == (kind == "toybox")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--subject NAME=DIR"),
        (["--subject", "cat"], "'cat' is no subject"),
        (["--subject", "=x"], "is no subject"),
        (["--subject", "cat=nowhere"], "no folder 'nowhere' with photos of cat"),
        (["--subject", "cat={}", "--subject", "cat:dog={}"], "one name"),
        (["--subject", "cat={}", "--threshold", "3"], "0 to 1"),
        (["--subject", "cat={}", "--detector", "toybox", "--embedder", "x"], "both finds and compares"),
        (["--subject", "cat={}", "--detector", "x/y"], "only finds things"),
        (["--subject", "cat={}", "--form", "nuclear"], "invalid choice"),
    ],
)
def test_the_command_says_what_is_missing(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "in", a=blocks(RED))
    assert main(["compare", str(folder), *(text.format(folder) for text in argv)]) == 2
    assert says in capsys.readouterr().err


def test_mudis_folder_has_the_photos_of_each_subject(tmp_path: Path) -> None:
    from PIL import Image

    from pipelines.evaluate.comparison import subject_photos

    lines: list[dict[str, Any]] = [{"id": {"a": "sks can", "b": "hta toy"}}]
    for id, color in (("a", RED), ("b", GREEN)):
        Image.fromarray(photo(color)).save(tmp_path / f"{id}.png")
        Image.fromarray(np.full((20, 20), 255, np.uint8)).save(tmp_path / f"mask_{id}.png")
        phrase = lines[0]["id"][id]
        lines.append(
            {"id": id, "file_name": f"{id}.png", "mask_path": f"mask_{id}.png", "text": f"a photo of a {phrase}"}
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (found,) = subject_photos(tmp_path, "b")
    assert tuple(found[0, 0]) == GREEN
    with pytest.raises(StudioError, match="no subject 'c'. It has: a, b"):
        subject_photos(tmp_path, "c")
