"""Measuring from the page: what is asked for reaches the engine, the report is kept, wrong wishes are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import (
    Concept,
    Identities,
    Likeness,
    Request,
    StudioError,
    Subject,
    Trained,
    Workspace,
    load_photos,
    make_pictures,
)
from pipelines.evaluate.protocol import Wish
from pipelines.toybox.photos import Shoot, shoot, write_photos
from studio.measure import photo_choices, start_identities, start_likeness
from studio.parts.report import report_markup
from studio.session import Studio
from studio.tabs import measure as tab
from studio.work import EXAMPLE, Look, start_masks, start_warming


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """Toybox with a residual of nothing for a cat, and two pictures made with it."""
    folder = tmp_path_factory.mktemp("measure")
    studio = Studio(Workspace(folder / "w"))
    start_warming(studio)
    studio.jobs.jobs()[-1].wait(120)
    base = studio.base.model
    assert base is not None
    about = {"id": "toybox", "fingerprint": base.fingerprint, "kind": "toybox"}
    concept = Concept("tom", (Subject("<tom>", "cat"),), "residual", about)
    studio.library.save(Trained(concept, {"residual": torch.zeros(1, 128)}))
    request = Request("a photo of a <tom>", seeds=(0, 1), steps=4)
    list(make_pictures(studio.workspace, base, request, [(studio.library.load("tom"), 1.0)]))
    write_photos(shoot(Shoot((7,), 2, category="cat")), folder / "photos")
    studio.photos, _ = studio.datasets.add(sorted((folder / "photos").glob("*.png")), "Tom")  # type: ignore[attr-defined]
    yield studio
    studio.close()


def test_a_concept_is_measured_and_shown(studio: Studio) -> None:
    job = start_likeness(studio, "tom", [studio.photos], Likeness(1, steps=4))  # type: ignore[attr-defined]
    job.wait(300)
    assert job.state == "done", job.error
    report = studio.view(job).result
    assert (
        report.table[0][:2] == ("prompt", "Identity (CLIP)") and len(report.table) == 11 and len(report.pictures) == 9
    )
    assert {"report.html", "report.csv", "pictures.csv", "pictures"} <= {path.name for path in report.folder.iterdir()}
    assert report.folder.is_relative_to(studio.workspace.root)
    markup = report_markup(report)
    assert markup.count("<img") == 9 and "data:image/png" in markup and "Toybox" in report.said
    shown, files = tab._result(studio)
    assert shown == markup and files["visible"]
    assert Path(tab._zipped(studio)).stat().st_size > 1000


def test_pictures_are_looked_at(studio: Studio) -> None:
    job = start_identities(studio, "", [EXAMPLE], Identities())
    job.wait(300)
    assert job.state == "done", job.error
    report = studio.view(job).result
    assert report.title == "tom" and len(report.pictures) == 2 and "spectral" in report.said
    assert [row[0] for row in report.table[1:]] == ["score", "counted", "success", "count errors"]
    assert all(path.is_file() for _, path in report.pictures)


def test_it_is_measured_as_the_command_measures(studio: Studio) -> None:
    """Own prompts, a strength and steps; a form, a matching and a threshold of Detect-and-Compare."""
    assert Likeness().steps == Wish(()).steps == 50
    given = {"strength": 0.5, "prompts": "a photo of a {}\n\na {} at night\n", "images": 1, "steps": 4}
    wish, strength = tab.likeness(given)
    assert wish == Likeness(1, 4, ("a photo of a {}", "a {} at night")) and strength == 0.5
    job = start_likeness(studio, "tom", [studio.photos], wish, strength)  # type: ignore[attr-defined]
    job.wait(300)
    assert job.state == "done" and job.title == "Measure tom at 0.5", job.error
    report = studio.view(job).result
    assert [row[0] for row in report.table[1:]] == ["all prompts", *wish.prompts] and "4 steps" in report.said
    with pytest.raises(StudioError, match="Own prompts, line 2: 'a cat' needs"):
        tab.likeness(given | {"prompts": "a {}\na cat"})

    looked = tab.identities({"form": "fro2", "match": "best", "threshold": 0.3, "second": " x "})
    assert looked == Identities("", "x", 0.3, "fro2", "best")
    job = start_identities(studio, "", [EXAMPLE], replace(looked, embedder=""))
    job.wait(300)
    assert job.state == "done", job.error
    assert "(fro2), rows by best matching" in studio.view(job).result.said
    with pytest.raises(StudioError, match="threshold of 1.5"):
        start_identities(studio, "", [EXAMPLE], Identities(threshold=1.5))


def test_a_detector_s_boxes_are_cut_out(studio: Studio) -> None:
    """Toybox's judge finds the cat, its segmenter the outline: nearly the true mask."""
    dataset = studio.photos  # type: ignore[attr-defined]
    folder = studio.datasets.folder(dataset)
    for old in folder.glob("*-masklabel*.png"):
        old.unlink()
    job = start_masks(studio, dataset, ["cat"], [], False, Look(detector="toybox"))
    job.wait(120)
    assert job.state == "done", job.error
    true = [scene.masks[0] for scene in shoot(Shoot((7,), 2, category="cat"))]
    found = [photo.masks[""] > 127 for photo in load_photos(folder)]
    assert all((mask & own).sum() / (mask | own).sum() > 0.7 for mask, own in zip(found, true, strict=True))
    with pytest.raises(StudioError, match="looks for words"):
        start_masks(studio, dataset, [], [], False, Look(detector="toybox"))


def test_what_cannot_be_measured_is_told(studio: Studio) -> None:
    for wish, says in (
        (lambda: start_likeness(studio, None, [EXAMPLE], Likeness()), "Choose the concept"),
        (lambda: start_likeness(studio, "tom", [], Likeness()), "Choose one photo set"),
        (lambda: start_identities(studio, "", [], Identities()), "should show tom. Choose the photo set"),
        (lambda: start_identities(studio, "gone/0", [EXAMPLE], Identities()), "not there any more"),
    ):
        with pytest.raises(StudioError, match=says):
            wish()
    job = start_likeness(studio, "tom", [EXAMPLE], Likeness(clip="/nowhere/clip"))
    job.wait(60)
    assert job.state == "failed" and "can't be loaded" in job.error
    assert (EXAMPLE in [id for _, id in photo_choices(studio)]) == studio.example.is_dir()
