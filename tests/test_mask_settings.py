"""The Masks part of the Train tab has what the command `masks` has: settings, soft masks, marks, MuDI's folder."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import Finder, MaskParams, StudioError, Workspace, load_photos, mask_params, read_dataset
from pipelines.commands.masks import SURE
from pipelines.mask_files import Wish
from studio.photo_masks import as_mudi
from studio.session import Studio
from studio.tabs.mask_settings import by_attention, by_detector
from studio.work import EXAMPLE, Look, start_masks, start_outline
from tests.tiny import tiny_folder

DETECTOR = ["", "", None, None]


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    yield studio
    studio.close()


def photo_set(studio: Studio, folder: Path) -> str:
    """Two photos; the first has a mask and a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:48] = 255
    Image.fromarray(mask).save(folder / "a-masklabel.png")
    (folder / "a.txt").write_text("A photo of <my-cat> at night")
    return studio.datasets.add(sorted(folder.iterdir()), "two")[0]


def test_the_form_gives_what_differs_from_the_bases_own(studio: Studio) -> None:
    usual = list(mask_params(studio.base.kind).model_dump().values())
    assert by_attention(studio, [*DETECTOR, False, *usual]) == Look()
    changed = dict(zip(MaskParams.model_fields, usual, strict=True)) | {
        "draws": 2,
        "articles": True,
        "prompt": "a=b {}",
    }
    look = by_attention(studio, [*DETECTOR, True, *changed.values()])
    assert look.soft and set(look.settings) == {"draws=2", "articles=True", "prompt=a=b {}"}
    read = Wish(Path(), settings=look.settings).params(studio.base.kind)
    assert (read.draws, read.articles, read.prompt) == (2, True, "a=b {}")
    with pytest.raises(StudioError, match="timestep"):
        by_attention(studio, [*DETECTOR, False, 1000, *usual[1:]])


def test_the_detectors_numbers_are_the_commands(studio: Studio) -> None:
    with pytest.raises(StudioError, match="Name a detector"):
        by_detector(studio, DETECTOR)
    assert by_detector(studio, [" owl ", "", None, None]) == Look(detector="owl", sure=SURE, margin=Finder(None).margin)  # type: ignore[arg-type]
    assert by_detector(studio, ["owl", "sam.pth", 0.3, 0]) == Look(
        detector="owl", segmenter="sam.pth", sure=0.3, margin=0
    )
    for look, says in (
        (Look(detector="owl", sure=2), "threshold of 2"),
        (Look(detector="owl", margin=0.6), "0 to 0.5"),
    ):
        with pytest.raises(StudioError, match=says):
            start_masks(studio, EXAMPLE, ["cat"], [], False, look)


def test_soft_masks_and_settings_reach_the_search(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def scores(model: object, image: object, nouns: object, params: MaskParams) -> object:
        asked.append(params.draws)
        return np.linspace(0, 1, 100, dtype=np.float32).reshape(1, 10, 10)

    monkeypatch.setattr("pipelines.masks.noun_scores", scores)
    dataset = photo_set(studio, tmp_path / "photos")
    job = start_masks(studio, dataset, ["cat"], [], True, Look(soft=True, settings=("draws=2",)))
    assert job.wait(120) and job.state == "done", job.error
    masks = [photo.masks[""] for photo in load_photos(studio.datasets.folder(dataset))]
    assert set(asked) == {2} and all(len(np.unique(mask)) > 8 for mask in masks)


def test_a_click_can_ask_the_bases_attention(studio: Studio) -> None:
    image = np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)
    for at in ((60, 40), (20, 20, 90, 70)):
        job = start_outline(studio, image, at, "/no/segmenter", attention=True)
        assert job.wait(120)
        if job.state == "failed":  # a base of random weights
            assert "Nothing stands out" in job.error
        else:
            assert studio.view(job).result.shape == (80, 120)


def test_the_embedded_segmenter_is_asked_about_toybox_alone(studio: Studio) -> None:
    assert studio.base.where != "toybox"
    job = start_outline(studio, np.zeros((80, 120, 3), np.uint8), (60, 40), "")
    assert job.wait(60) and job.state == "failed" and "knows only Toybox's own world" in job.error


def test_a_set_is_handed_out_in_mudis_form(studio: Studio, tmp_path: Path) -> None:
    dataset = photo_set(studio, tmp_path / "photos")
    thing = {"photos": "", "noun": "cat", "name": "my-cat"}
    with zipfile.ZipFile(as_mudi(studio, dataset, [thing])) as file:
        file.extractall(tmp_path / "out")
    found = read_dataset(tmp_path / "out")
    assert found.phrases == {"my-cat": "sks cat"} and len(found.rows) == 1
    row = json.loads((tmp_path / "out/metadata.jsonl").read_text().splitlines()[1])
    assert row["file_name"] == "a.png" and row["box"] == [16, 8, 48, 40]
    assert row["text"] == "A photo of sks cat at night"
    assert not (studio.datasets.folder(dataset) / "metadata.jsonl").exists()
    with pytest.raises(StudioError, match="has a mask"):
        as_mudi(studio, dataset, [thing, thing | {"noun": "dog", "name": "my-dog"}])
