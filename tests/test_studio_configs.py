"""Configurations of Cones 2 in the studio: opened from an upload, all of it painted as one job, and written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import StudioError, Workspace, make_pictures
from studio.asked import asked, filled
from studio.configs import _gathered, asked_elements, export, set_aside, start_opening
from studio.parts.painter import drawing
from studio.prompt_files import start_lines
from studio.session import Studio
from tests.test_studio_layouts import concept, controls, left_and_right
from tests.tiny import tiny_folder


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"))
    yield studio
    studio.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    yield studio
    studio.close()


def config(folder: Path, **changed: Any) -> list[Path]:
    """A Cones 2 configuration with a drawing in a folder beside it, uploaded as a browser does: flat."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (255, 192, 0), (255, 0, 0)
    Image.fromarray(image).save(folder / "beach.png")
    data = {
        "prompt": "a cat and a dog", "residual_dict": {}, "subject_list": [], "layout": "../layouts/beach.png",
        "color_context": {"255,192,0": ["cat", 2.5], "255,0,0": ["dog", 3.5]}, "weight_negative": -1e8,
        "guidance_weight": 0.1, "guidance_steps": 20,
    }  # fmt: skip
    (folder / "guidance.json").write_text(json.dumps([data | changed]))
    return [folder / "guidance.json", folder / "beach.png"]


def opened_first(studio: Studio, job: Any) -> dict[str, Any]:
    return {"request": studio.view(job).result["requests"][0]}


def several(studio: Studio, folder: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    """What the page keeps of a configuration that was opened: the usual element, and others that differ from it."""
    files = config(folder)
    (one,) = json.loads(files[0].read_text())
    files[0].write_text(json.dumps([one, *(one | change for change in changes)]))
    job = start_opening(studio, files)
    assert job.wait(120) and job.state == "done", job.error
    return studio.view(job).result | {"shown": controls() | filled(studio, opened_first(studio, job))}


def test_all_pictures_of_a_configuration_are_painted_as_one_job(tiny: Studio, tmp_path: Path) -> None:
    plain = {"prompt": "a dog", "color_context": {"255,0,0": ["dog", 2.0]}, "guidance_steps": 0}
    opened = several(tiny, tmp_path, plain)
    assert opened["notes"] == [] and opened["numbers"] == [1, 2]
    values = opened["shown"] | {"steps": 2, "seed": "7", "count": 2}
    lines = asked_elements(tiny, values, opened)
    assert [line.request.prompt for line in lines] == ["a cat and a dog", "a dog"]
    assert {line.request.seeds for line in lines} == {(7, 8)} and {line.request.steps for line in lines} == {2}
    assert lines[0].request.layout is not None and lines[0].request.recur == 1
    assert lines[1].request.layout is None and lines[1].request.recur == 0
    painted = start_lines(tiny, lines)
    assert painted.wait(300) and painted.state == "done", painted.error
    assert len(tiny.view(painted).result) == 4 and "2 prompts of guidance.json" in painted.title


def test_what_is_set_after_opening_counts_for_every_picture(tiny: Studio, tmp_path: Path) -> None:
    """What isn't, is as each element has it."""
    tiny.library.save(concept("toby"))
    changes = {"prompt": "a dog and a cat", "guidance_weight": 0.05, "guidance_steps": 30, "weight_negative": -5.0}
    opened = several(tiny, tmp_path, changes)
    for line, guide, steps, outside in zip(
        asked_elements(tiny, opened["shown"], opened), (0.1, 0.05), (20, 30), (-1e8, -5.0), strict=True
    ):
        layout = line.request.layout
        assert layout and (layout.strength, layout.steps, layout.negative) == (guide, steps, outside)
        assert (line.request.recur, line.request.ramp, line.request.trim, layout.mode) == (1, False, False, "strict")
    chosen = {
        "ramp": True, "trim": True, "recur": 3, "figure": True, "guide": 0.07, "guided_steps": "9", "outside": -3,
        "apart": "always", "negative": "fog", "steps": 12, "words": ["dog"], "concepts": ["toby"], "strength-0": 0.5,
    }  # fmt: skip
    for line in asked_elements(tiny, opened["shown"] | chosen, opened):
        request, layout = line.request, line.request.layout
        assert layout and (layout.strength, layout.steps, layout.negative, layout.mode) == (0.07, 9, -3, "figure")
        assert (request.ramp, request.trim, request.recur, request.apart) == (True, True, 3, True)
        assert (request.negative, request.steps) == ("fog", 12)
        assert line.concepts == [("toby", 0.5)] and line.words == ("dog",)
    off = asked_elements(tiny, opened["shown"] | {"layout_on": False}, opened)
    assert [line.request.layout for line in off] == [None, None]


def test_what_a_picture_is_of_stays_the_files(tiny: Studio, tmp_path: Path) -> None:
    """Prompt, drawing and residuals; but residuals can be left out. A picture without a drawing gets nobody else's."""
    torch.save(torch.zeros(1, 32), tmp_path / "mug.pt")
    files = config(tmp_path, residual_dict={"mug": "mug.pt"}, subject_list=[["mug", 2]])
    (one,) = json.loads(files[0].read_text())
    files[0].write_text(json.dumps([one | {"guidance_steps": 0}, one | {"subject_list": [["mug", 5]]}]))
    job = start_opening(tiny, [*files, tmp_path / "mug.pt"])
    assert job.wait(120) and job.state == "done", job.error
    before = {"guide": 0.3, "layout": drawing(left_and_right())}  # from the page before the file was opened
    opened = tiny.view(job).result
    opened |= {"shown": controls(**before) | filled(tiny, opened_first(tiny, job))}
    for changed, residuals in (
        ({}, [[2], [5]]),
        ({"prompt": "a mug", "layout": "", "layout_on": True}, [[2], [5]]),
        ({"placed": [{"name": "another"}]}, [[2], [5]]),
        ({"placed": []}, [[], []]),
    ):
        values = opened["shown"] | changed
        first, second = (line.request for line in asked_elements(tiny, values, opened))
        assert [[one.position for one in each.placed] for each in (first, second)] == residuals
        assert first.prompt == second.prompt == "a cat and a dog" and first.layout is None
        assert second.layout is not None and second.layout.strength == 0.1
        assert ("Generate paints" in set_aside(values, opened)) == ("prompt" in changed)


def test_a_later_picture_that_cannot_be_is_left_out_and_told(tiny: Studio, tmp_path: Path) -> None:
    """The first one opens all the same, and the others keep their numbers."""
    opened = several(
        tiny, tmp_path, {"layout": "other.png"}, {"layout": ""}, {"layout": "elsewhere/beach.png"},
        {"layout": "../../../../../beach.png"}, {"prompt": "a dog"}, {"prompt": "a dog and a cat"},
    )  # fmt: skip
    assert opened["numbers"] == [1, 7] and len(opened["requests"]) == 2
    told = {note.removeprefix("Picture ")[0]: note for note in opened["notes"]}
    assert list(told) == list("23456") and all("of guidance.json is left out: " in note for note in told.values())
    for number, says in (
        ("2", "'other.png'. Choose that file too"), ("3", "it names no layout"), ("4", "called the same"),
        ("5", "called the same"), ("6", "guidance.json, line 1: "),
    ):  # fmt: skip
        assert says in told[number]
    opened["requests"][1] |= {"prompt": "a <nobody>"}
    with pytest.raises(StudioError, match="guidance.json, picture 7: There is no concept <nobody>"):
        asked_elements(tiny, opened["shown"], opened)
    with pytest.raises(StudioError, match="guidance.json, line 1: it names no layout. Write"):
        start_opening(tiny, config(tmp_path, layout=""))


def test_a_configuration_of_cones_opens_with_its_files(tmp_path: Path) -> None:
    files = config(tmp_path)
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    try:
        with pytest.raises(StudioError, match=r"layouts/beach.png.*together"):
            start_opening(studio, files[:1])
        with pytest.raises(StudioError, match="one guidance configuration"):
            start_opening(studio, files[1:])
        job = start_opening(studio, files)
        assert job.wait(120) and job.state == "done", job.error
        values = controls() | filled(studio, opened_first(studio, job))
        request, _, _ = asked(studio, values)
        assert request.layout is not None and request.prompt == "a cat and a dog" and request.seeds == (7,)
        assert [(one.words, one.weight) for one in request.layout.regions] == [("cat", 2.5), ("dog", 3.5)]
        assert (request.layout.strength, request.layout.steps, request.recur, request.scheduler) == (
            0.1,
            20,
            1,
            "euler",
        )
        assert request.steps == 50
        with pytest.raises(StudioError, match="far away"):
            start_opening(studio, config(tmp_path, layout="../../../../../beach.png"))
        with pytest.raises(StudioError, match="far away"):
            start_opening(studio, config(tmp_path, layout=str(tmp_path / "beach.png")))
    finally:
        studio.close()


def test_a_picture_is_exported_and_a_configuration_may_name_a_concept(tmp_path: Path) -> None:
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    try:
        bound = {"prompt": "a <toby> and a dog", "color_context": {"255,192,0": ["<toby>", 2.5]}}
        with pytest.raises(StudioError, match=r"layouts/beach.png.*together"):  # the concept keeps to it all the same
            start_opening(studio, config(tmp_path, **bound, guidance_weight=0)[:1])
        files = config(tmp_path, **bound)
        job = start_opening(studio, files)
        assert job.wait(120) and job.state == "failed" and "guidance.json, line 1: The prompt says <toby>" in job.error
        trained = concept("toby")
        base = studio.base.identity()
        studio.library.save(replace(trained, concept=replace(trained.concept, base_model=base)))
        opened = start_opening(studio, files)
        assert opened.wait(120) and opened.state == "done", opened.error
        request, cast, _ = asked(studio, controls(steps=1) | filled(studio, opened_first(studio, opened)))
        assert [name for name, _ in cast] == ["toby"] and request.layout is not None
        painted = replace(request, steps=1, recur=0)
        loaded = [(studio.library.load(name), strength) for name, strength in cast]
        list(make_pictures(studio.workspace, studio.base.model, painted, loaded, out=tmp_path / "out"))
        job = export(studio, tmp_path / "out" / "0001.png")
        assert job.wait(120) and job.state == "done", job.error
        result = studio.view(job).result
        with zipfile.ZipFile(result["zip"]) as archive:
            names = sorted(Path(name).name for name in archive.namelist())
            archive.extractall(tmp_path / "back")
        assert names == ["guidance.json", "layout.png", "toby.pt"] and result["notes"] == []
        back = [path for path in (tmp_path / "back").rglob("*") if path.is_file()]
        again = start_opening(studio, back)
        assert again.wait(120) and again.state == "done", again.error
        assert studio.view(again).result["requests"][0]["placed"][0]["at"] == 2
        with pytest.raises(StudioError, match="carries no recipe"):
            export(studio, tmp_path / "beach.png")
    finally:
        studio.close()


def test_files_of_one_name_are_never_taken_for_each_other(studio: Studio, tmp_path: Path) -> None:
    """The original trainer calls every subject's file residual.pt, and an upload comes without its folders."""
    names = {"mug": "./outputs/mug/residual.pt", "dog": "outputs/dog/residual.pt"}
    subjects = [["mug", 2], ["dog", 5]]
    files = config(tmp_path, residual_dict=names, subject_list=subjects)
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
        torch.save(torch.zeros(1, 32), tmp_path / folder / "residual.pt")
    uploads = [tmp_path / folder / "residual.pt" for folder in ("1", "2")]
    for given in (uploads, uploads[:1]):
        with pytest.raises(
            StudioError, match="'outputs/dog/residual.pt', 'outputs/mug/residual.pt'.*Rename them"
        ) as told:
            start_opening(studio, [*files, *given])
        assert "Choose" not in str(told.value)
    with pytest.raises(StudioError, match="names '../layouts/beach.png'.*together.*Rename them"):
        start_opening(studio, [files[0], *uploads])
    one = {"mug": "outputs/mug/residual.pt", "dog": "./outputs/mug/residual.pt"}  # the same file, written in two ways
    files = config(tmp_path, residual_dict=one, subject_list=subjects)
    with pytest.raises(StudioError, match="'residual.pt' was chosen more than once"):
        start_opening(studio, [*files, *uploads])
    assert len(_gathered(studio, [*files, uploads[0]])[0][1].subjects) == 2
    with pytest.raises(StudioError, match="beach.png', 'outputs/mug/residual.pt'.*Choose them"):
        start_opening(studio, files[:1])
    for path in (f"{'x' * 300}/residual.pt", "a\0b/residual.pt"):
        files = config(tmp_path, residual_dict={"mug": path}, subject_list=subjects[:1])
        with pytest.raises(StudioError, match="no usable path"):
            start_opening(studio, [*files, uploads[0]])
