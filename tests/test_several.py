"""Several subjects learned together: a folder each or one for all, masks apart, collages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.commands.train import _what
from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.errors import StudioError
from pipelines.events import Finished
from pipelines.formats.mudi import CLASS_FILE, read_dataset, write_dataset
from pipelines.latents import small_mask
from pipelines.library import Library
from pipelines.methods import Stage, get_method
from pipelines.model import Model
from pipelines.params import TrainParams
from pipelines.runs import train_concept
from pipelines.sources import Source
from pipelines.workspace import Workspace
from tests.test_data import photos
from tests.tiny import tiny_model

PAIR = (Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog"))
STAGE = Stage("test", 4, 2)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def test_each_photo_shows_its_own_subject(model: Model) -> None:
    one, two = photos(2)
    both = [replace(one, shows=("my-cat",)), replace(two, shows=("my-dog",))]
    made = prepare(model, both, TrainParams(masked_loss=True, random_crop=False), PAIR, seed=0)
    assert [source.caption for source in made.sources] == ["a photo of <my-cat>", "a photo of <my-dog>"]
    batch = made.batch(STAGE, 1)
    assert batch.shown is not None and batch.subject_masks is not None and batch.masks is not None
    assert sorted(batch.shown.tolist()) == [[False, True], [True, False]]
    assert torch.equal((batch.subject_masks.sum(dim=(2, 3)) > 0), batch.shown)
    assert torch.equal(batch.subject_masks.sum(dim=1, keepdim=True), batch.masks)


def test_named_masks_of_one_photo_stay_apart(model: Model) -> None:
    (photo,) = photos(1)
    dog = np.zeros((64, 64), np.uint8)
    dog[48:, 48:] = 255
    photo.masks = {"my-cat": photo.masks[""], "my-dog": dog}
    batch = prepare(model, [photo], TrainParams(random_crop=False), PAIR, seed=0).batch(Stage("test", 1), 1)
    assert batch.subject_masks is not None and batch.subject_masks.shape == (1, 2, 16, 16)
    expected = [small_mask(photo.masks[name], model.scale_factor) for name in ("my-cat", "my-dog")]
    assert torch.equal(batch.subject_masks[0], torch.cat(expected))


class _Halves:
    """A mixer: the left half of one picture, the right half of another; every other row stays as it is."""

    def check(self, sources: Sequence[Source]) -> None:
        if len(sources) < 2:
            raise StudioError("Two photos at least.")

    def mix(self, source: Source, others: Sequence[Source], chance: torch.Generator, side: int) -> Source:
        if torch.rand(1, generator=chance).item() < 0.5:
            return source
        other = others[int(torch.randint(len(others), (1,), generator=chance))]
        image = np.concatenate([255 - source.image[:side, : side // 2], other.image[:side, side // 2 : side]], axis=1)
        return Source(image, "a photo of <my-cat> and <my-dog>", (side, side), {}, ("<my-cat>", "<my-dog>"))


def test_collages_are_rows_of_their_own(model: Model) -> None:
    def rows(mixer: Any) -> Any:
        data = prepare(model, photos(3), TrainParams(), PAIR[:1], seed=0, mixer=mixer)
        return data, [data.batch(Stage("test", 6, 4), step) for step in range(1, 7)]

    data, mixed = rows(_Halves())
    again, repeated = rows(_Halves())
    captions = [caption for batch in mixed for caption in batch.captions]
    assert set(captions) == {"a photo of <my-cat>", "a photo of <my-cat> and <my-dog>"}
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(mixed, repeated, strict=True))
    plain_data, plain = rows(None)
    for batch, other in zip(mixed, plain, strict=True):
        assert torch.equal(batch.noise, other.noise) and torch.equal(batch.timesteps, other.timesteps)
        alike = [torch.equal(a, b) for a, b in zip(batch.latents, other.latents, strict=True)]
        assert alike == ["dog" not in caption for caption in batch.captions]
    assert len(data.latents._kept) <= len(plain_data.latents._kept) <= data.latents.encoded  # collages aren't kept


def test_what_cannot_be_mixed_is_told_before(model: Model) -> None:
    with pytest.raises(StudioError, match="Two photos"):
        prepare(model, photos(1), TrainParams(), PAIR[:1], seed=0, mixer=_Halves())


def test_collages_are_not_mirrored(model: Model) -> None:
    """Their captions may say who is on the left."""
    made = [
        prepare(model, photos(3), TrainParams(flip=flip, random_crop=False), PAIR[:1], seed=0, mixer=_Halves())
        for flip in (False, True)
    ]
    changed = {True: 0, False: 0}
    for step in range(1, 9):
        one, two = (data.batch(Stage("test", 8, 4), step) for data in made)
        for row, caption in enumerate(one.captions):
            changed["dog" in caption] += not torch.equal(one.latents[row], two.latents[row])
    assert changed[True] == 0 and changed[False] > 0


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for name, photo in zip(("cats", "dogs"), photos(2), strict=True):
        (tmp_path / name).mkdir()
        Image.fromarray(photo.image).save(tmp_path / name / "1.png")
        Image.fromarray(photo.masks[""]).save(tmp_path / name / "1-masklabel.png")
        made.append(tmp_path / name)
    return made


def _learn(root: Path, model: Model, folders: list[Path], **options: Any) -> Any:
    settings = {"steps": 2, "batch_size": 2, "prior_weight": 0.0, "rare_word": "sks ohw", "sample_every": 0}
    given: dict[str, Any] = {"noun": ["cat", "dog"], "name": ["my-cat", "my-dog"], "masks": True} | options
    params = get_method("svdiff").Params(**settings)
    return train_concept(Workspace(root / "w"), model, method="svdiff", photos=folders, params=params, seed=1, **given)


def test_a_run_with_a_folder_each(tmp_path: Path, model: Model, folders: list[Path]) -> None:
    last = list(_learn(tmp_path, model, folders))[-1]
    assert isinstance(last, Finished)
    (concept,) = Library(Workspace(tmp_path / "w")).concepts()
    assert concept.name == "my-cat-and-my-dog" and concept.subjects == PAIR
    assert set(concept.recipe["photos"]) == {
        f"{name}/1{mark}.png" for name in ("my-cat", "my-dog") for mark in ("", "-masklabel")
    }


def test_a_stopped_run_with_a_folder_each_goes_on(tmp_path: Path, model: Model, folders: list[Path]) -> None:
    whole = list(_learn(tmp_path / "a", model, folders))[-1]
    events = _learn(tmp_path / "b", model, folders)
    next(event for event in events if type(event).__name__ == "Progress")
    events.close()
    resumed = list(_learn(tmp_path / "b", model, folders, resume=True))[-1]
    assert isinstance(whole, Finished) and isinstance(resumed, Finished)
    for name, tensor in whole.value.tensors.items():
        assert torch.equal(tensor, resumed.value.tensors[name])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"noun": ["cat"]}, "2 names for 1 nouns"),
        ({"name": ["my-cat", "My-Cat"]}, "can't share a name"),
        ({"noun": ["a", "b", "c"], "name": ["a", "b", "c"]}, "2 folders of photos for 3 names"),
    ],
)
def test_what_doesnt_add_up(tmp_path: Path, model: Model, folders: list[Path], options: Any, told: str) -> None:
    with pytest.raises(StudioError, match=told):
        list(_learn(tmp_path, model, folders, **options))


def test_a_folder_in_mudis_form_says_itself_what_it_shows(tmp_path: Path) -> None:
    phrases = {"a": "olis drink can", "b": "hta plush"}
    shown = [replace(photo, shows=(name,), caption=None) for photo, name in zip(photos(2), phrases, strict=True)]
    write_dataset(tmp_path / "mudi", phrases, shown)

    def asked(**words: list[str]) -> Any:
        return Namespace(**({"data": [tmp_path / "mudi"], "noun": [], "name": [], "class_data": None} | words))

    what = _what(asked(), tmp_path / "one")
    assert (what.names, what.nouns, what.rare_word) == (["a", "b"], ["drink can", "plush"], "olis hta")
    named = _what(asked(name=["my-can", "my-toy"]), tmp_path / "two")
    assert [folder.name for folder in named.folders] == named.names == ["my-can", "my-toy"]
    assert all(list(folder.glob("*-masklabel.png")) for folder in named.folders)
    with pytest.raises(StudioError, match="2 subjects"):
        _what(asked(name=["one"]), tmp_path / "three")
    write_dataset(tmp_path / "classes", {"a": "can", "b": "plush"}, shown, CLASS_FILE)
    classes = _what(asked(name=["my-can", "my-toy"], class_data=tmp_path / "classes"), tmp_path / "five").classes
    found = read_dataset(classes, CLASS_FILE)
    assert found.phrases == {"my-can": "can", "my-toy": "plush"} and found.rows[1].id == "my-toy"
    write_dataset(tmp_path / "others", {"a": "can"}, shown[:1], CLASS_FILE)
    with pytest.raises(StudioError, match="Use the same ids in both"):
        _what(asked(class_data=tmp_path / "others"), tmp_path / "six")
    with pytest.raises(StudioError, match="metadata.jsonl, line 1"):
        _what(asked(noun=["zebra"]), tmp_path / "seven")
    with pytest.raises(StudioError, match="as the only --data"):
        _what(asked(data=[tmp_path, tmp_path / "mudi"], noun=["x", "y"], name=["x", "y"]), tmp_path / "eight")
    with pytest.raises(StudioError, match="--noun cat --name my-cat.*--discover"):
        _what(Namespace(data=[tmp_path], noun=[], name=["x"], method="extract"), tmp_path / "four")
