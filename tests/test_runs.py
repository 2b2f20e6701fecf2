"""Runs from a folder of photos to the library: recorded, watched, stopped, killed, resumed, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.attach import attached
from pipelines.concept import Concept, Trained
from pipelines.errors import StudioError
from pipelines.eventlog import read_events
from pipelines.events import Event, Finished, Heatmap, Note, Progress, Snapshot
from pipelines.files import lock
from pipelines.joblog import RUN_LOCK, history
from pipelines.library import Library
from pipelines.masks import mask_params
from pipelines.methods import get_method
from pipelines.model import Model
from pipelines.prior import class_pictures
from pipelines.runs import discard, train_concept, unfinished
from pipelines.workspace import Workspace
from tests.concepts import trained as trained_cat
from tests.test_data import CAT, photos
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with three photos, masks, one caption, and things that don't belong."""
    path = tmp_path / "photos"
    path.mkdir()
    for photo in photos():
        Image.fromarray(photo.image).save(path / photo.path.name)
        Image.fromarray(photo.masks[""]).save(path / f"{photo.path.stem}-masklabel.png")
    (path / "1.txt").write_text("a photo of a red cat on sand")
    (path / "truth.json").write_text("not even JSON")
    (path / "notes.doc").write_text("hello")
    return path


def start(workspace: Workspace, model: Model, folder: Path, **options: Any) -> Iterator[Event]:
    quick: dict[str, Any] = {"steps": 4, "batch_size": 1, "prior_weight": 0.0, "lr": 1e-2, "sample_every": 2}
    arguments = {"method": "svdiff", "noun": "cat", "name": "my-cat", "seed": 1} | options
    settings = quick | {"checkpoint_every": 1, "resolution": 32} | arguments.pop("params", {})
    params = get_method(arguments["method"]).Params(**settings)
    return train_concept(workspace, model, photos=folder, params=params, **arguments)


def stopped_after(events: Iterator[Event], step: int) -> None:
    while not (isinstance(event := next(events), Progress) and event.step == step):
        pass
    events.close()  # type: ignore[attr-defined]


def tensors(trained: Any) -> dict[str, torch.Tensor]:
    assert isinstance(trained, Trained)
    return trained.tensors


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["svdiff", "residual"])
def test_a_whole_run(workspace: Workspace, model: Model, folder: Path, method: str) -> None:
    events = list(start(workspace, model, folder, method=method, masks=True))
    samples = [event for event in events if isinstance(event, Snapshot) and event.kind == "sample"]
    heat = [event for event in events if isinstance(event, Heatmap)]
    assert [sample.info["step"] for sample in samples] == [2, 4] == [found.step for found in heat]
    assert all(sample.image is not None and sample.image.shape == (64, 64, 3) for sample in samples)
    assert not np.array_equal(samples[0].image, samples[1].image)  # type: ignore[arg-type]
    assert all(found.token == "<my-cat>" and found.values.max() > 0 for found in heat)
    assert all(0 < sample.info["inside"] < 1 for sample in samples)
    assert [event.text[:9] for event in events if isinstance(event, Note)] == ["notes.doc"]
    last = events[-1]
    assert isinstance(last, Finished)
    (concept,) = Library(workspace).concepts()
    assert concept == last.value.concept and concept.name == "my-cat" and concept.params["masked_loss"] is True
    assert set(concept.recipe["photos"]) >= {"0.png", "0-masklabel.png", "1.txt"} and "steps_done" not in concept.recipe
    kept = Library(workspace).load("my-cat")
    assert equal(kept.tensors, last.value.tensors)
    with attached(model, [(kept, 1.0)]):
        assert "<my-cat>" in model.placeholders
    entry = Library(workspace).find("my-cat")
    assert entry.preview is not None and len(Library(workspace).log("my-cat")) >= 4
    (run,) = [path for path in workspace.runs.iterdir() if path.is_dir()]
    recorded = list(read_events(run))
    assert [type(event) for event in recorded] == [type(event) for event in events]
    assert not (run / "photos").exists() and not (run / "checkpoints").exists() and not unfinished(workspace)
    assert history(workspace)[0].state == "done"


def test_samples_change_nothing(workspace: Workspace, model: Model, folder: Path) -> None:
    results = [
        list(start(workspace, model, folder, name=f"cat-{every}", params={"sample_every": every}))[-1].value  # type: ignore[union-attr]
        for every in (0, 1)
    ]
    assert equal(results[0].tensors, results[1].tensors)
    previews = [Library(workspace).find(f"cat-{every}").preview for every in (0, 1)]
    assert previews[0] is not None and previews[1] is not None  # a photo where no sample was painted
    assert previews[0].read_bytes() != previews[1].read_bytes()


def test_a_stopped_run_is_kept_and_goes_on_to_the_same_end(workspace: Workspace, model: Model, folder: Path) -> None:
    *_, expected = start(workspace, model, folder, name="other")
    stopped_after(start(workspace, model, folder), 2)
    library = Library(workspace)
    partial = library.load("my-cat")
    assert partial.concept.recipe["steps_done"] == 2 and partial.concept.recipe["steps"] == 4
    assert not equal(partial.tensors, expected.value.tensors)  # type: ignore[union-attr]
    (run,) = unfinished(workspace)
    assert run.name == "my-cat" and run.done == 2 and run.recipe.subjects[0].noun == "cat"
    shutil.rmtree(folder)  # the run has its own copies
    stopped_after(start(workspace, model, folder, resume=True), 3)
    assert library.load("my-cat").concept.recipe["steps_done"] == 3 and len(library.concepts()) == 2
    events = list(start(workspace, model, folder, resume=True, run_id=run.id))
    assert equal(events[-1].value.tensors, expected.value.tensors)  # type: ignore[union-attr]
    assert [concept.name for concept in library.concepts()] == ["my-cat", "other"] and not library.trashed()
    assert "steps_done" not in library.load("my-cat").concept.recipe and not unfinished(workspace)
    steps = [event.step for event in read_events(workspace.runs / run.id) if isinstance(event, Progress)]
    assert steps == [1, 2, 3, 4]


def test_a_run_without_end_goes_on_after_a_crash(workspace: Workspace, model: Model, folder: Path) -> None:
    """As after kill -9: nothing was closed, and the log is ahead of the newest checkpoint and torn."""
    *_, expected = start(workspace, model, folder, name="other", params={"checkpoint_every": 2})
    events = start(workspace, model, folder, params={"checkpoint_every": 2})
    while not (isinstance(event := next(events), Progress) and event.step == 3):
        pass
    (run,) = [path for path in workspace.runs.iterdir() if path.name.startswith("my-cat")]
    crashed = Workspace(workspace.root.parent / "crashed")
    shutil.copytree(run, crashed.runs / run.name)
    events.close()  # type: ignore[attr-defined]
    with open(crashed.runs / run.name / "events.jsonl", "ab") as log:
        log.write(b'{"event": "Progr')
    assert [left.done for left in unfinished(crashed)] == [2]
    *_, resumed = start(crashed, model, folder, resume=True, params={"checkpoint_every": 2})
    assert equal(resumed.value.tensors, expected.value.tensors)  # type: ignore[union-attr]
    steps = [event.step for event in read_events(crashed.runs / run.name) if isinstance(event, Progress)]
    assert steps == [1, 2, 3, 4]


def test_stopping_before_the_first_step_keeps_nothing(workspace: Workspace, model: Model, folder: Path) -> None:
    (folder / "extra.png").write_bytes((folder / "0.png").read_bytes())
    Image.new("RGB", (20, 20)).save(folder / "small.png")
    events = start(workspace, model, folder)
    notes = [note.text for note in (next(events), next(events)) if isinstance(note, Note)]
    assert "notes.doc" in notes[0] and "small.png has only 20 pixels" in notes[1]
    events.close()  # type: ignore[attr-defined]
    assert not Library(workspace).concepts() and [run.done for run in unfinished(workspace)] == [0]
    (run,) = unfinished(workspace)
    *_, last = start(workspace, model, folder, resume=True, run_id=run.id)
    assert isinstance(last, Finished)


def test_throwing_a_run_away(workspace: Workspace, model: Model, folder: Path) -> None:
    stopped_after(start(workspace, model, folder), 1)
    (run,) = unfinished(workspace)
    with lock(workspace.runs / run.id / RUN_LOCK):
        assert not unfinished(workspace)  # somebody trains it
        with pytest.raises(StudioError, match="still training"):
            discard(workspace, run.id)
        with pytest.raises(StudioError, match="training already"):
            list(start(workspace, model, folder, resume=True, run_id=run.id))
    discard(workspace, run.id)
    assert not unfinished(workspace) and not Library(workspace).concepts()
    for hostile in ("../concepts", "/etc", ""):
        with pytest.raises(StudioError):
            discard(workspace, hostile)


def test_a_second_concept_of_that_name_gets_another(workspace: Workspace, model: Model, folder: Path) -> None:
    names = []
    for _ in range(2):
        *_, last = start(workspace, model, folder, params={"steps": 1})
        assert isinstance(last, Finished)
        names.append(last.value.concept.name)
    assert names[0] == "my-cat" and len(set(names)) == 2 and len(Library(workspace).concepts()) == 2


def test_a_word_that_another_concept_has_is_told(workspace: Workspace, model: Model, folder: Path) -> None:
    """The names differ, the words don't: this one gets another word, and not in silence."""
    Library(workspace).save(trained_cat("both", "<my-cat>"))
    events = list(start(workspace, model, folder, params={"steps": 1}))
    assert events[-1].value.concept.name == "my-cat"  # type: ignore[union-attr]
    assert [subject.token for subject in events[-1].value.concept.subjects] == ["<my-cat-2>"]  # type: ignore[union-attr]
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("<my-cat> belongs to another concept" in note and "write <my-cat-2>" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "my cat"}, "can't name a concept"),
        ({"name": "../../x"}, "can't name a concept"),
        ({"noun": " "}, "noun is empty"),
        ({"noun": "dog"}, "does not name 'dog'"),
        ({"method": "magic"}, "no method 'magic'"),
        ({"seed": -1}, "can't be a seed"),
        ({"resume": True}, "no stopped run of 'my-cat'"),
        ({"run_id": "../../etc"}, "not the id"),
        ({"params": {"resolution": 33}}, "multiples of 4"),
    ],
)
def test_bad_wishes_leave_nothing_behind(
    workspace: Workspace, model: Model, folder: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(StudioError, match=words):
        params = options.get("params", {})
        if options.get("method") == "magic":
            known = get_method("svdiff").Params()
            list(train_concept(workspace, model, photos=folder, params=known, noun="cat", name="x", **options))
        list(start(workspace, model, folder, **options | {"params": params}))
    assert not list(workspace.runs.iterdir()) and not Library(workspace).concepts()


def test_bad_photos_leave_nothing_behind(workspace: Workspace, model: Model, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for bad, words in ((folder, r"broken\.png is broken"), (folder / "nowhere", "no folder")):
        with pytest.raises(StudioError, match=words):
            list(start(workspace, model, bad))
    assert not list(workspace.runs.iterdir())


def test_missing_masks_are_found_by_attention(
    workspace: Workspace, model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "2-masklabel.png").unlink()
    params = mask_params(model.kind).model_copy(update={"threshold": 0.0, "draws": 1, "steps": 1})
    monkeypatch.setattr("pipelines.masks.mask_params", lambda kind, **_: params)  # random weights see nothing clearly
    events = list(start(workspace, model, folder, masks=True))
    (told,) = [event.text for event in events if isinstance(event, Note) and "attention" in event.text]
    assert told.startswith("Masks of 1 photos were found")
    assert [event.step for event in events if isinstance(event, Progress) and event.stage == "masks"] == [1]
    assert list((workspace.root / "masks").glob("*.safetensors"))
    both = {"noun": ["cat", "cat"], "name": ["one", "two"], "params": {"rare_word": "sks ohw"}}
    with pytest.raises(StudioError, match=r"2\.png shows several things called 'cat'"):
        list(start(workspace, model, folder, masks=True, **both))


def test_a_full_disk_is_said_before_anything_starts(
    workspace: Workspace, model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "free_bytes", lambda self: 1000)
    with pytest.raises(StudioError, match="disk is too full for this run"):
        list(start(workspace, model, folder))
    assert not list(workspace.runs.iterdir())


def test_class_pictures_are_painted_once(workspace: Workspace, model: Model, folder: Path) -> None:
    def painted(events: Iterator[Event]) -> int:
        return sum(isinstance(event, Progress) and event.stage == "class pictures" for event in events)

    with_prior = {"prior_weight": 1.0, "prior_count": 6, "steps": 2, "sample_every": 0}
    first = list(start(workspace, model, folder, params=with_prior))
    assert painted(iter(first)) == 2  # two groups of four
    assert all("prior" in event.values for event in first if isinstance(event, Progress) and event.stage == "shifts")
    files = sorted((workspace.root / "prior").rglob("*.png"))
    assert len(files) == 6
    before = [path.read_bytes() for path in files]
    again = list(start(workspace, model, folder, name="again", params=with_prior))
    assert painted(iter(again)) == 0 and equal(first[-1].value.tensors, again[-1].value.tensors)  # type: ignore[union-attr]
    files[1].write_bytes(b"damaged")
    repaired = class_pictures(model, CAT, 6, workspace.root / "prior", size=32)
    assert painted(repaired) == 1 and [path.read_bytes() for path in files] == before
    none = list(start(workspace, model, folder, name="none", params={"steps": 1, "sample_every": 0}))
    (step,) = [event for event in none if isinstance(event, Progress)]
    assert painted(iter(none)) == 0 and "prior" not in step.values


def test_the_recipe_is_json_and_the_concept_fits_the_schema(workspace: Workspace, model: Model, folder: Path) -> None:
    stopped_after(start(workspace, model, folder), 1)
    (path,) = workspace.runs.glob("*/run.json")
    data = json.loads(path.read_text())
    assert data["name"] == "my-cat" and data["source"] == str(folder) and len(data["files"]["0.png"]) == 64
    assert data["base"] == {"id": model.id, "fingerprint": model.fingerprint, "kind": "sd1"}
    (concept,) = Library(workspace).concepts()
    assert Concept.from_json(json.loads(json.dumps(concept.to_json()))) == concept
