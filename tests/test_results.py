"""make_pictures: files, heat maps, history, and pictures made again bit for bit."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Heatmap, Note, Progress, Snapshot
from pipelines.fingerprint import content_hash
from pipelines.generate import generate
from pipelines.library import Library
from pipelines.model import Model
from pipelines.request import Request
from pipelines.results import again, delete_result, list_results, make_pictures, read_result, zip_results
from pipelines.workspace import Workspace
from tests.tiny import tiny_model

REQUEST = Request("a photo of a teapot in the snow", seeds=(1, 2, 3), steps=3, preview_every=0)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def kept(events: list[Event], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def residual(model: Model) -> Trained:
    """A hand-made concept of the simplest method: one row added to the noun's state."""
    width = model.encode([""]).states.shape[-1]
    base = {"id": model.id, "fingerprint": model.fingerprint}
    concept = Concept("my-cat", (Subject("<my-cat>", "cat"),), "residual", base)
    torch.manual_seed(0)
    return Trained(concept, {"residual": 3 * torch.randn(1, width)})


def test_pictures_are_the_ones_generate_paints(workspace: Workspace, model: Model) -> None:
    events = list(make_pictures(workspace, model, REQUEST))
    pictures = kept(list(generate(model, REQUEST)), Snapshot)
    saved = [pixels(event.path) for event in kept(events, Snapshot)]
    assert len(saved) == 3
    for one, other in zip(saved, pictures, strict=True):
        assert np.array_equal(one, other.image)
    last = events[-1]
    assert isinstance(last, Finished)
    assert [info["seed"] for info in last.value] == [1, 2, 3]
    progress = kept(events, Progress)
    assert [event.step for event in progress] == list(range(1, 10))
    assert {event.total for event in progress} == {9}


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_is_saved_and_leaves_the_pictures_alone(workspace: Workspace, model: Model, batch: int) -> None:
    request = replace(REQUEST, width=96, batch=batch)
    plain = [event.image for event in kept(list(make_pictures(workspace, model, request)), Snapshot)]
    events = list(make_pictures(workspace, model, request, attention=("teapot", "snow")))
    assert all(np.array_equal(a, b.image) for a, b in zip(plain, kept(events, Snapshot), strict=True))
    heats = kept(events, Heatmap)
    assert [heat.token for heat in heats] == ["teapot", "snow"] * 3
    assert not np.array_equal(heats[0].values, heats[2].values)  # each picture has its own row
    result = list_results(workspace)[0]
    for picture, heat in zip(result.pictures, heats[1::2], strict=True):
        attention = picture["attention"]
        assert pixels(result.folder / attention["overlays"]["snow"]).shape == (64, 96, 3)
        with np.load(result.folder / attention["file"], allow_pickle=False) as arrays:
            assert np.allclose(arrays["heat"][1, attention["row"]], heat.values)
    assert len(kept(events, Note)) == 1


def test_a_word_that_is_not_there_is_named_before_any_work(workspace: Workspace, model: Model) -> None:
    with pytest.raises(StudioError, match="teapot"):
        next(iter(make_pictures(workspace, model, REQUEST, attention=("dragon",))))
    assert list_results(workspace) == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
def test_again_is_bit_identical(workspace: Workspace, model: Model, tmp_path: Path, batch: int, scheduler: str) -> None:
    trained = residual(model)
    library = Library(workspace)
    library.save(trained)
    request = replace(
        REQUEST, prompt="a photo of <my-cat> in the snow", negative="dog", batch=batch, scheduler=scheduler
    )
    list(make_pictures(workspace, model, request, [(trained, 0.7)], attention=("snow",)))
    first = list_results(workspace)[0].paths[1]
    library.rename("my-cat", "another name")
    recipe = again(first)
    recipe.check(model)
    fresh = tiny_model()  # nothing cached, nothing left over
    concepts = recipe.find_concepts(library)
    list(make_pictures(workspace, fresh, recipe.request, concepts, recipe.attention, out=tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["0001.png"]
    one = pixels(first)
    assert (tmp_path / "out" / "0001.png").read_bytes() == first.read_bytes()  # pixels and recipe
    plain = kept(list(generate(model, replace(recipe.request, prompt="a photo of cat in the snow"))), Snapshot)
    assert not np.array_equal(one, plain[0].image)  # the concept did take part


def test_again_without_concepts_gives_the_same_file(workspace: Workspace, model: Model, tmp_path: Path) -> None:
    list(make_pictures(workspace, model, REQUEST))
    first = list_results(workspace)[0].paths[2]
    list(make_pictures(workspace, model, again(first).request, out=tmp_path))
    assert first.read_bytes() == (tmp_path / "0001.png").read_bytes()


def test_again_wants_the_same_base_and_the_same_concept(workspace: Workspace, model: Model) -> None:
    trained = residual(model)
    request = replace(REQUEST, prompt="<my-cat>", seeds=(1,))
    list(make_pictures(workspace, model, request, [(trained, 1.0)]))
    recipe = again(list_results(workspace)[0].paths[0])
    with pytest.raises(StudioError, match="tiny-sd1-0"):
        recipe.check(tiny_model(seed=1))
    library = Library(workspace)
    with pytest.raises(StudioError, match="not in the library"):
        recipe.find_concepts(library)
    library.save(replace(trained, tensors={name: tensor + 1 for name, tensor in trained.tensors.items()}))
    with pytest.raises(StudioError, match="changed since"):
        recipe.find_concepts(library)


def test_a_picture_of_somebody_else_cannot_be_made_again(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(StudioError, match="no recipe"):
        again(tmp_path / "x.png")


def test_the_content_hash_ignores_the_name_alone(model: Model) -> None:
    trained = residual(model)
    renamed = replace(trained, concept=replace(trained.concept, name="x", created=0.0))
    other = replace(trained, concept=replace(trained.concept, params={"x": 1}))
    assert content_hash(renamed) == content_hash(trained) != content_hash(other)


def test_stopping_keeps_what_is_done(workspace: Workspace, model: Model) -> None:
    work = make_pictures(workspace, model, REQUEST, attention=("snow",))
    for event in work:
        if isinstance(event, Snapshot):
            break
    work.close()  # type: ignore[attr-defined]
    result = list_results(workspace)[0]
    assert len(result.pictures) == 1 and not result.complete
    for event in make_pictures(workspace, model, REQUEST):
        if isinstance(event, Progress):
            break
    assert len(list_results(workspace)) == 1  # a folder without pictures does not stay


def test_numbers_go_on_and_nothing_is_overwritten(workspace: Workspace, model: Model, tmp_path: Path) -> None:
    (tmp_path / "0007.png").write_bytes(b"mine")
    list(make_pictures(workspace, model, replace(REQUEST, seeds=(1, 2)), out=tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0007.png", "0008.png", "0009.png"]
    assert (tmp_path / "0007.png").read_bytes() == b"mine"
    assert list_results(workspace) == []


def test_history_is_listed_packed_and_deleted(workspace: Workspace, model: Model, tmp_path: Path) -> None:
    for seed in (1, 2):
        list(make_pictures(workspace, model, replace(REQUEST, seeds=(seed,)), attention=("snow",)))
    newer, older = list_results(workspace)
    assert (newer.pictures[0]["seed"], older.pictures[0]["seed"]) == (2, 1)
    assert newer.prompt == REQUEST.prompt and newer.complete
    zip_results(workspace, [newer.id, older.id], tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert len(archive.namelist()) == 6
        assert archive.read(f"{newer.id}/0001.png") == newer.paths[0].read_bytes()
    delete_result(workspace, newer.id)
    assert [result.id for result in list_results(workspace)] == [older.id]
    with pytest.raises(StudioError, match="no result"):
        delete_result(workspace, newer.id)
    with pytest.raises(StudioError, match="not the id"):
        delete_result(workspace, "../concepts")
    assert workspace.concepts.is_dir()


def test_a_record_cannot_point_out_of_its_folder(workspace: Workspace, model: Model, tmp_path: Path) -> None:
    list(make_pictures(workspace, model, replace(REQUEST, seeds=(1,))))
    result = list_results(workspace)[0]
    record = json.loads((result.folder / "result.json").read_text())
    record["pictures"][0]["file"] = "../../../secret.png"
    (result.folder / "result.json").write_text(json.dumps(record))
    assert list_results(workspace) == []
    with pytest.raises(StudioError, match="can't be read"):
        zip_results(workspace, [result.id], tmp_path / "x.zip")
    with pytest.raises(StudioError, match="can't be read"):
        read_result(workspace, result.id)


def test_a_full_disk_is_said_before_painting(
    workspace: Workspace, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "free_bytes", lambda: 1000)
    with pytest.raises(StudioError, match="disk is too full for the pictures"):
        next(iter(make_pictures(workspace, model, REQUEST)))
