"""The evaluation: what is compared with what, masked and whole, the intervals, and what is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.__main__ import main
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.evaluate import report
from pipelines.evaluate.encoders import TOYBOX_CLIP, Clip, DinoClass, unit
from pipelines.evaluate.masked import photos_of
from pipelines.evaluate.painted import read_shown
from pipelines.evaluate.prompts import default_prompts, read_prompts, with_subject, without_subject
from pipelines.evaluate.protocol import Evaluation, Measured, Shown, Wish, alone, evaluate, evaluate_painted, measure
from pipelines.events import Event, Finished, Note, Picture, Snapshot
from pipelines.learned_tokens import learned_tokens
from pipelines.library import Library
from pipelines.photos import Photo
from pipelines.toybox.evaluation import clip_scores
from pipelines.workspace import Workspace
from tests.tiny import tiny_model

CAT = Subject("<my-cat>", "cat")


class Colours:
    """Pictures by their mean colour, texts by the colour they name: simple enough to know the answers."""

    name = "colours"
    blank = (0, 0, 0)

    def pictures(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        self.seen = [np.array(picture) for picture in pictures]
        return unit(np.stack([picture.reshape(-1, 3).mean(0) for picture in pictures]) + 1e-9)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.read = list(texts)
        return unit(np.array([[float(word in text) for word in ("red", "green", "blue")] for text in texts]) + 1e-9)


def plain(colour: tuple[int, int, int]) -> Picture:
    return np.full((8, 8, 3), colour, np.uint8)


RED, GREEN, YELLOW = plain((200, 0, 0)), plain((0, 200, 0)), plain((200, 200, 0))


def photo(picture: Picture, mask: NDArray[np.uint8] | None = None) -> Photo:
    return Photo(Path("x.png"), picture, {} if mask is None else {"": mask})


def test_all_pictures_against_all_photos_and_the_prompt_without_the_subject() -> None:
    clip = Colours()
    photos = [photo(RED), photo(GREEN)]
    shown = [Shown("a {} on a red sofa", (RED, YELLOW))]
    (found,) = measure(shown, photos, "green cat", clip)
    assert clip.read == ["on a red sofa", "a green cat on a red sofa"]
    half = 2**-0.5
    np.testing.assert_allclose(found.values["identity"], [0.5, half], atol=1e-6)
    np.testing.assert_allclose(found.values["text_bare"], [1, half], atol=1e-6)
    np.testing.assert_allclose(found.values["text_named"], [half, 1], atol=1e-6)
    assert list(found.values) == ["identity", "text_bare", "text_named"]
    (both,) = measure(shown, photos, "cat", clip, Colours())
    np.testing.assert_allclose(both.values["dino"], both.values["identity"])


def test_masks_take_the_background_out_of_the_comparison() -> None:
    """A red thing on green, learned and painted on blue: alike where it matters only."""
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 3:6] = 255
    on_green, on_blue = GREEN.copy(), plain((0, 0, 200))
    on_green[2:4, 3:6] = on_blue[2:4, 3:6] = (200, 0, 0)
    empty = np.zeros((8, 8), np.uint8)
    shown = [Shown("a {}", (on_blue, on_blue, on_blue), (mask, None, empty))]
    clip = Colours()
    (found,) = measure(shown, [photo(on_green, mask)], "cat", clip)
    assert found.values["identity"][0] < 0.2
    assert found.values["identity_masked"][0] == pytest.approx(1.0, abs=1e-6)
    assert np.isnan(found.values["identity_masked"][1:]).all()
    (whole,) = measure(shown, [photo(on_green)], "cat", clip)
    assert "identity_masked" not in whole.values  # a photo without a mask can't be compared


def test_a_subject_alone_is_cut_to_its_square() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 3:7] = 255
    cut = alone(RED, mask, (1, 2, 3))
    assert cut.shape == (4, 4, 3)
    assert (cut[1:3] == (200, 0, 0)).all() and (cut[[0, 3]] == (1, 2, 3)).all()
    assert (alone(RED, np.zeros((8, 8), np.uint8), (1, 2, 3)) == (1, 2, 3)).all()
    assert alone(RED, np.full((4, 4), 255, np.uint8), (0, 0, 0)).shape == (8, 8, 3)  # fitted


def test_prompts_and_their_texts(tmp_path: Path) -> None:
    assert without_subject("a photo of a {} on the moon") == "a photo of on the moon"
    assert without_subject("A photo of {} on the moon") == "A photo of on the moon"
    assert without_subject("an oil painting of my {}") == "an oil painting of"
    assert without_subject("{}") == "a photo of"
    assert with_subject("a {} in the snow", "cat") == "a cat in the snow"
    file = tmp_path / "prompts.txt"
    file.write_text("a {} in the snow\n\n  a {} at night \na {} in the snow\n")
    assert read_prompts(file) == ("a {} in the snow", "a {} at night")
    for text, reason in (("a {}\na cat\n", "line 2.*needs {} once"), ("\n", "has no prompts")):
        file.write_text(text)
        with pytest.raises(StudioError, match=reason):
            read_prompts(file)
    with pytest.raises(StudioError, match="can't be read"):
        read_prompts(tmp_path / "missing.txt")
    for kind in ("toybox", "sd1"):
        assert all(prompt.count("{}") == 1 for prompt in default_prompts(kind))


def test_intervals_cover_the_mean_at_their_rate_and_hold_prompts_together() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        one = report.figure([draw.normal(0, 1, 40)], seed)
        hits += one.low <= 0 <= one.high
        assert one.low < one.mean < one.high and one.count == 40
    assert 88 <= hits <= 99
    alike = [np.full(50, value) for value in (0.0, 1.0, 2.0)]  # the pictures of a prompt say nothing new
    grouped, loose = report.figure(alike), report.figure([np.concatenate(alike)])
    assert grouped.mean == loose.mean == 1.0
    assert grouped.high - grouped.low > 3 * (loose.high - loose.low)
    assert report.figure([np.array([np.nan, 2.0])]).count == 1
    nothing = report.figure([np.array([np.nan])])
    assert nothing.count == 0 and str(nothing) == "-"


def made() -> Evaluation:
    values = {
        "identity": np.array([0.5, 0.7]),
        "text_bare": np.array([0.2, 0.3]),
        "identity_masked": np.array([np.nan] * 2),
    }
    rows = (Measured("a <b> {}", values, (RED, GREEN)), Measured("a {} | x", values, (RED, GREEN)))
    return Evaluation("my-cat", "cat", "svdiff", {"clip": "c"}, rows, (YELLOW,), {"seed": 0})


def test_what_is_written(tmp_path: Path) -> None:
    files = report.write_report(tmp_path, [made()])
    assert [file.name for file in files] == ["report.csv", "pictures.csv", "report.md", "report.html"]
    rows = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert [row["prompt"] for row in rows] == ["all prompts", "a <b> {}", "a {} | x"]
    assert float(rows[0]["identity"]) == pytest.approx(0.6) and rows[0]["identity_n"] == "4"
    assert float(rows[0]["identity_low"]) <= 0.6 <= float(rows[0]["identity_high"])
    assert rows[0]["identity_masked"] == "" and rows[0]["identity_masked_n"] == "0"
    every = list(csv.DictReader((tmp_path / "pictures.csv").read_text().splitlines()))
    assert len(every) == 4 and float(every[1]["identity"]) == 0.7 and every[1]["identity_masked"] == ""
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;b&gt; &lt;my-cat&gt;" in page and "<b>" not in page and page.count("<img") == 5
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["0-0-0.png", "0-0-1.png", "0-1-0.png", "0-1-1.png", "0-photo-0.png"]
    table = (tmp_path / "report.md").read_text().splitlines()
    assert len(table) == 5 and "\\|" in table[4] and len(report.as_text([made()], overall=True)) == 3
    data = json.loads(json.dumps(report.as_json([made()]), allow_nan=False))
    assert data[0]["identity"]["n"] == 4 and "identity_masked" not in data[0]


def test_toybox_s_clip_is_the_default_and_agrees_with_its_own_scores() -> None:
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    texts = ["a photo of a red ball", "a cat in the snow"]
    clip = Clip()
    np.testing.assert_allclose(clip.pictures(pictures) @ clip.texts(texts).T, clip_scores(pictures, texts), atol=1e-5)
    assert clip.blank == (128, 128, 128) and clip.name == "Toybox's CLIP"
    with pytest.raises(StudioError, match="can't be loaded"):
        Clip("/nowhere/at-all").pictures(pictures)


def test_a_dino_is_read_by_its_class_token(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    found = DinoClass(str(tmp_path)).pictures([RED, GREEN])
    pixels = torch.tensor([[200.0, 0, 0], [0, 200, 0]])[:, :, None, None].expand(2, 3, 16, 16) / 127.5 - 1
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(found, unit(expected), atol=1e-5)
    DinoClass(str(tmp_path)).load()
    with pytest.raises(StudioError, match="can't look at a picture alone"):
        DinoClass(str(TOYBOX_CLIP)).load()
    with pytest.raises(StudioError, match="can't be loaded.*of that kind"):  # else its weights would be random
        Clip(str(tmp_path)).load()
    Clip().load()


def test_one_picture_has_no_interval() -> None:
    assert str(report.figure([np.array([0.5])])) == "0.5000"
    assert str(report.figure([np.array([0.25, 0.75])])).startswith("0.5000 [0.")


def test_it_paints_measures_and_reports_what_was_asked() -> None:
    model = tiny_model("sd1")
    with learned_tokens(model, [CAT]) as learned:
        tensors = learned.tensors()
    base = {"id": model.id, "fingerprint": model.fingerprint}
    trained = Trained(Concept("my-cat", (CAT,), "textual_inversion", base), tensors)
    wish = Wish(("a photo of a {}", "a {} in the snow"), images=2, steps=2)
    photos = [photo(RED)]
    events = list(evaluate(model, (trained, 1.0), photos, wish, Colours()))
    shots = [event.info for event in events if isinstance(event, Snapshot)]
    assert [(info["prompt"], info["seed"]) for info in shots] == [
        ("a photo of a {}", 0), ("a photo of a {}", 1), ("a {} in the snow", 0), ("a {} in the snow", 1),
    ]  # fmt: skip
    last = events[-1]
    assert isinstance(last, Finished)
    found = last.value
    assert [len(row.pictures) for row in found.rows] == [2, 2] and found.looks == {"clip": "colours"}
    assert found.settings["steps"] == 2 and found.method == "textual_inversion"
    for broken, reason in (
        (Wish(()), "no prompts"), (Wish(("a cat",)), "needs {} once"), (Wish(("a {}",), images=0), "0 pictures"),
    ):  # fmt: skip
        with pytest.raises(StudioError, match=reason):
            list(evaluate(model, (trained, 1.0), photos, broken, Colours()))
    with pytest.raises(StudioError, match="no photos"):
        list(evaluate(model, (trained, 1.0), [], wish, Colours()))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data", "."], "Name what to measure"),
        (["--data", "nowhere", "--concept", "x"], "no folder nowhere"),
        (["--data", ".", "--concept", "x:fast"], "no strength"),
    ],
)
def test_the_command_says_what_is_missing(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words, "--workspace", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


def concept_of_cat() -> Trained:
    return Trained(Concept("my-cat", (CAT,), "textual_inversion", {"id": "toybox", "fingerprint": ""}), {})


def finished(events: Iterable[Event]) -> Evaluation:
    *_, last = events
    assert isinstance(last, Finished)
    found: Evaluation = last.value
    return found


def test_masks_are_found_where_nobody_painted_any() -> None:
    """On a real base: every photo and picture gets one, painted ones stay, and the masked measure is taken."""
    model = tiny_model("sd1")
    with learned_tokens(model, [CAT]) as learned:
        tensors = learned.tensors()
    base = {"id": model.id, "fingerprint": model.fingerprint}
    trained = Trained(Concept("my-cat", (CAT,), "textual_inversion", base), tensors)
    painted = np.zeros((8, 8), np.uint8)
    painted[2:4, 2:4] = 255
    wish = Wish(("a photo of a {}",), images=2, steps=1, masked=True)
    events = list(evaluate(model, (trained, 1.0), [photo(RED), photo(GREEN, painted)], wish, Colours()))
    (row,) = finished(events).rows
    assert list(row.values) == ["identity", "text_bare", "text_named", "identity_masked"]
    assert any(isinstance(event, Note) and "attention" in event.text for event in events)
    plain = list(evaluate(model, (trained, 1.0), [photo(RED)], replace(wish, masked=False), Colours()))
    for one, other in zip(row.pictures, finished(plain).rows[0].pictures, strict=True):
        assert np.array_equal(one, other)  # looking for masks leaves the base as it was


def test_a_photo_in_which_the_subject_was_not_found_is_no_reference() -> None:
    mask, empty = np.full((8, 8), 255, np.uint8), np.zeros((8, 8), np.uint8)
    shown = [Shown("a {}", (RED,), (mask,))]
    (found,) = measure(shown, [photo(RED, mask), photo(GREEN, empty)], "cat", Colours())
    assert found.values["identity_masked"][0] == pytest.approx(1, abs=1e-6)
    (nowhere,) = measure(shown, [photo(RED, empty)], "cat", Colours())
    assert "identity_masked" not in nowhere.values


def test_of_several_subjects_only_its_own_mask_counts() -> None:
    mine, other = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    mine[:4], other[4:] = 255, 255
    both = replace(photo(RED), masks={"my-cat": mine, "dog": other}, path=Path("a.png"))
    (kept,) = photos_of([both, replace(both, shows=("dog",))], CAT)
    assert kept.masks == {"my-cat": mine} and list(both.masks) == ["my-cat", "dog"]
    assert photos_of([photo(RED, mine)], CAT)[0].masks[""] is mine
    with pytest.raises(StudioError, match="no photos"):
        photos_of([replace(both, shows=("dog",))], CAT)


def test_of_a_concept_with_several_subjects_one_is_measured_and_named() -> None:
    model, dog = tiny_model("sd1"), Subject("<my-dog>", "dog")
    with learned_tokens(model, [CAT, dog]) as learned:
        tensors = learned.tensors()
    base = {"id": model.id, "fingerprint": model.fingerprint}
    trained = Trained(Concept("both", (CAT, dog), "textual_inversion", base, {"with_noun": True}), tensors)
    wish = Wish(("a photo of a {}",), images=1, steps=1)
    for name, said, others in (("", CAT, dog), ("my-dog", dog, CAT), ("<my-dog>", dog, CAT)):
        note = f"Of 'both' {said.token} alone is measured, not {others.token}."
        events = list(evaluate(model, (trained, 1.0), [photo(RED)], replace(wish, subject=name), Colours()))
        before = list(evaluate_painted(trained, [photo(RED)], [Shown("a {}", (RED,))], Colours(), subject=name))
        for seen in (events, before):
            found = finished(seen)
            assert (found.subject, found.noun) == (said.token, said.noun)
            assert [event.text for event in seen if isinstance(event, Note)][0] == note
            assert {row["subject"] for row in report.as_json([found])} == {said.token}
    with pytest.raises(StudioError, match="'both' has no subject 'cow'. It has <my-cat>, <my-dog>"):
        list(evaluate(model, (trained, 1.0), [photo(RED)], replace(wish, subject="cow"), Colours()))


def pictures(folder: Path) -> Path:
    """Two of ours, of A1111, with a caption and a mask, and two that don't say."""
    from PIL import PngImagePlugin

    from pipelines.pictures import save_picture

    folder.mkdir()
    request = {"prompt": "a  <my-cat> on a red sofa", "negative": None, "steps": 1, "scheduler": "ddim", "guidance": 1}
    recipe = {"request": request | {"width": 8, "height": 8}, "concepts": [], "seed": 0, "versions": {"attune": "0"}}
    for name in ("1", "2"):
        save_picture(folder / f"{name}.png", RED, recipe | {"base": {"id": "x", "fingerprint": "f", "kind": "sd1"}})
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a <my-cat> at night\nSteps: 1, Sampler: DDIM, Seed: 3, Size: 8x8")
    Image.fromarray(GREEN).save(folder / "3.png", pnginfo=text)
    Image.fromarray(YELLOW).save(folder / "4.jpg")
    (folder / "4.txt").write_text("a {} at night")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5] = 255
    Image.fromarray(mask).save(folder / "4-masklabel.png")
    Image.fromarray(RED).save(folder / "5.png")
    Image.fromarray(RED).save(folder / "6.png")
    (folder / "6.txt").write_text("<my-cat> and <my-cat>")
    Image.fromarray(RED).save(folder / "all_images.png")
    return folder


def test_pictures_that_are_there_are_read_by_their_prompts(tmp_path: Path) -> None:
    notes: list[str] = []
    shown = read_shown(pictures(tmp_path / "painted"), CAT, notes)
    assert [(one.prompt, len(one.pictures)) for one in shown] == [("a {} on a red sofa", 2), ("a {} at night", 2)]
    assert [mask is not None for mask in shown[1].masks] == [False, True]
    assert [note.split()[0] for note in notes] == ["5.png", "6.png"] and "say <my-cat> once" in notes[0]
    with pytest.raises(StudioError, match="painted from a prompt with <my-dog>"):
        read_shown(saved(tmp_path / "other", RED), Subject("<my-dog>", "dog"))


def saved(folder: Path, *images: Picture) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def test_they_are_measured_like_painted_ones(tmp_path: Path) -> None:
    shown = read_shown(pictures(tmp_path / "painted"), CAT)
    found = finished(evaluate_painted(concept_of_cat(), [photo(RED)], shown, Colours()))
    (sofa, night) = found.rows
    np.testing.assert_allclose(sofa.values["identity"], [1, 1], atol=1e-6)
    np.testing.assert_allclose(night.values["identity"][0], 0, atol=1e-6)
    assert found.settings == {"pictures": 4, "painted": "before"} and "identity_masked" not in night.values
    own = finished(evaluate_painted(concept_of_cat(), [photo(RED, np.full((8, 8), 255, np.uint8))], shown, Colours()))
    assert np.isnan(own.rows[1].values["identity_masked"][0]) and own.rows[1].values["identity_masked"][1] > 0.5
    events = list(evaluate_painted(concept_of_cat(), [photo(RED)], shown, Colours(), masker=tiny_model("sd1")))
    assert "identity_masked" in finished(events).rows[0].values


def test_the_command_measures_pictures_without_painting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Workspace(tmp_path / "home")
    Library(home).save(Trained(concept_of_cat().concept, {"x": torch.zeros(1)}))
    painted, data = pictures(tmp_path / "painted"), saved(tmp_path / "photos", RED, YELLOW)
    line = ["evaluate", "--concept", "my-cat", "--data", str(data), "--pictures", str(painted)]
    line += ["--workspace", str(home.root), "--device", "cpu"]
    assert main([*line, "--out", str(tmp_path / "out"), "--json"]) == 0, capsys.readouterr()
    said = capsys.readouterr()
    rows = json.loads(said.out)["rows"]
    assert [row["prompt"] for row in rows] == ["all prompts", "a {} on a red sofa", "a {} at night"]
    assert rows[0]["identity"]["n"] == 4 and "5.png is left out" in said.err and "Loading the base" not in said.err
    assert (tmp_path / "out" / "report.html").is_file()
    for extra, reason in (
        (["--concept", "my-cat"], "--pictures are of one --concept"),
        (["--prompts", "x.txt"], "Leave --prompts out"),
    ):
        assert main([*line, *extra]) == 2 and reason in capsys.readouterr().err
