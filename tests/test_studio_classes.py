"""Class pictures painted from the page: a set beside the photo sets, there at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import ClassWish, StudioError, Workspace, class_finder, class_pictures_of, read_dataset
from pipelines.class_masks import SURE as ENGINE_SURE
from pipelines.commands.prior import SURE as COMMAND_SURE
from pipelines.toybox.scenes import scene
from studio.class_pictures import EACH, MOST, SURE, Classes, called_alike, made_by, start_classes
from studio.datasets import CLASSES
from studio.session import Studio
from studio.tabs.classes import HOW, _choices, _detector, _live
from studio.work import Training, start_training
from tests.tiny import tiny_folder, tiny_model


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    yield studio
    studio.close()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of the tests sees nothing, so what attention says is given: the upper half is the noun's."""

    def scores(model: object, image: object, nouns: object, params: object) -> object:
        found = np.zeros((1, 10, 10), np.float32)
        found[0, :5] = 1
        return found

    monkeypatch.setattr("pipelines.masks.noun_scores", scores)


def test_they_become_a_set_that_training_takes(studio: Studio, seen: None) -> None:
    job = start_classes(studio, Classes({"my-cat": "cat", "my-dog": "dog"}, 1))
    assert job.title == "Paint class pictures: cat, dog" and made_by(studio, job) is None
    assert job.wait(300) and job.state == "done", job.error
    (made,) = studio.datasets.classes()
    assert made == made_by(studio, job) and made.title == "Class pictures: cat, dog (2)"
    assert studio.datasets.all() == [] and _choices(studio)[1:] == [(made.title, made.id)]
    assert f"choose “{made.title}”" in _live(studio)
    found = read_dataset(studio.datasets.folder(made.id), CLASSES)
    assert found.phrases == {"my-cat": "cat", "my-dog": "dog"}
    assert [picture.token for picture in class_pictures_of(found, short_side=64)] == ["<my-cat>", "<my-dog>"]
    assert not list(studio.workspace.root.glob(".arriving*"))


def test_stopped_they_are_a_set_of_what_is_done(studio: Studio, seen: None) -> None:
    job = start_classes(studio, Classes({"my-cat": "cat"}, 30))
    for _ in job.follow(every=0.01):
        if studio.view(job).step:
            assert studio.datasets.classes() == [] == studio.datasets.all()  # nothing by halves
            job.cancel()
    made = made_by(studio, job)
    assert (
        job.state == "stopped" and made is not None and f"what is done is kept: choose “{made.title}”" in _live(studio)
    )
    rows = read_dataset(studio.datasets.folder(made.id), CLASSES).rows
    assert 0 < len(rows) < 30 and made.title == f"Class pictures: cat ({len(rows)})"


def test_what_fails_is_told_and_leaves_nothing(studio: Studio) -> None:
    with pytest.raises(StudioError, match="no"), studio.datasets.arriving("cat-1", ["cat"]) as folder:
        folder.mkdir()
        (folder / "img_0.png").write_bytes(b"x")  # the file that names it comes last
        raise StudioError("no")
    assert not any(studio.workspace.datasets.iterdir()) and not list(studio.workspace.root.glob(".arriving*"))
    job = start_classes(studio, Classes({"my-cat": "cat"}, 1, detector="/no/such/folder"))
    assert job.wait(120) and job.state == "failed" and not job.is_bug and "problem" in _live(studio)
    assert studio.datasets.classes() == []


def test_what_cannot_be_is_told_before_it_is_queued(studio: Studio) -> None:
    for each in (0, MOST + 1):
        with pytest.raises(StudioError, match="pictures of each class can't be painted"):
            start_classes(studio, Classes({"my-cat": "cat"}, each))
    assert studio.jobs.jobs() == []
    with pytest.raises(StudioError, match="Name a detector"):
        _detector(studio, " ")  # real photos need a real one
    assert _detector(studio, " owl ") == "owl"
    studio.base.where = "toybox"
    assert _detector(studio, "") == "toybox"


def test_a_set_that_would_not_count_is_told(studio: Studio, seen: None) -> None:
    """On Toybox every preset has prior_weight 0: a chosen set used to be left out without a word."""
    job = start_classes(studio, Classes({"my-cat": "cat"}, 1))
    assert job.wait(300) and job.state == "done", job.error
    (made,) = studio.datasets.classes()
    wish = Training("example", "cat", "my-cat", "svdiff", {"prior_weight": 0.0, "steps": 1}, classes=made.id)
    with pytest.raises(StudioError, match="only where prior_weight is above 0.*Advanced.*Painted by the base"):
        start_training(studio, wish)
    assert [one.kind for one in studio.jobs.jobs()] == ["classes"] and "prior_weight" in HOW
    counted = start_training(studio, replace(wish, params={"prior_weight": 1.0, "steps": 1}))
    counted.cancel()
    assert counted.meta["classes"] == made.id


def test_the_page_the_command_and_the_engine_agree() -> None:
    assert SURE == ENGINE_SURE == COMMAND_SURE and ClassWish().each == EACH


def test_a_detector_cuts_out_the_one_thing() -> None:
    """Toybox's own, which comes with the repository; of another kind there is nothing in the picture."""
    model, one = tiny_model("sd1"), scene("test", 440_000, count=1)
    find = class_finder(model, "toybox")
    mask, true = find(one.image, one.toys[0]["category"]), one.masks[0]
    assert mask is not None and ((mask > 0) & true).sum() > 0.7 * ((mask > 0) | true).sum()
    assert find(one.image, "cup" if one.toys[0]["category"] != "cup" else "cat") is None


def test_class_pictures_belong_to_things_by_the_ids_of_their_photos(studio: Studio, tmp_path: Path) -> None:
    """Their phrases are others than the photos', as in MuDI's own sets."""
    sets = {}
    for file, words in (("metadata.jsonl", "olis blue {}"), ("class_metadata.jsonl", "{}")):
        folder = tmp_path / file.split(".")[0]
        folder.mkdir()
        rows: list[dict[str, object]] = [
            {"id": {"a": words.format("can"), "b": words.replace("olis", "hta").format("toy")}}
        ]
        for id, phrase in dict(rows[0]["id"]).items():  # type: ignore[call-overload]
            Image.new("RGB", (40, 30), "red").save(folder / f"{id}.png")
            Image.new("L", (40, 30), 255).save(folder / f"m{id}.png")
            rows.append(
                {"id": id, "file_name": f"{id}.png", "mask_path": f"m{id}.png", "text": f"A photo of a {phrase}"}
            )
        (folder / file).write_text("\n".join(json.dumps(row) for row in rows))
        sets[file], _ = studio.datasets.add(sorted(folder.iterdir()), "x")
    first, classes = sets.values()
    (second,) = studio.datasets.about(first)["with"]
    settings = {"steps": 1, "sample_every": 0, "checkpoint_every": 0, "prior_weight": 1.0, "rare_word": "olis hta"}
    wish = Training(
        first, "blue can", "blue-can", "svdiff", settings, base=studio.base.where, classes=classes,
        more=[{"photos": second, "noun": "blue toy", "name": "blue-toy"}],
    )  # fmt: skip
    job = start_training(studio, wish)
    assert job.wait(300) and job.state == "done", job.error
    copy = read_dataset(called_alike(studio, classes, {"a": "my-can", "b": "blue-toy"}), CLASSES)
    assert copy.phrases == {"my-can": "can", "blue-toy": "toy"} and [row.id for row in copy.rows] == list(copy.phrases)
    other = {"x": "my-can", "y": "blue-toy"}  # of another upload
    assert called_alike(studio, classes, other) == studio.datasets.folder(classes)
