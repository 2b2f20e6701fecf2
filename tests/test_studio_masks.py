"""Masks in the studio: found by attention, painted by hand, and never a person's work lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import StudioError, Workspace, load_preset
from studio.parts.painter import Drawn, drawing, regions
from studio.photo_masks import (
    Opened,
    layers,
    mask_drawing,
    photo_of,
    save_changes,
    save_masks,
    thing_names,
    unused_masks,
    with_outline,
)
from studio.session import Studio
from studio.tabs import things
from studio.work import EXAMPLE, Training, start_masks, start_training, with_rare_words
from tests.tiny import tiny_folder


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    yield studio
    studio.close()


def two_photos(studio: Studio, folder: Path) -> str:
    """A set of two: one wider than it is shown, one turned by its EXIF tag."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (600, 900, 3), np.uint8)).save(folder / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "turned.jpg", exif=turned)
    dataset, _ = studio.datasets.add([folder / "wide.png", folder / "turned.jpg"], "two")
    return dataset


def painted(studio: Studio, dataset: str, photo: str, name: str = "") -> tuple[list[str], str]:
    """The upper half is marked for `name`."""
    shown = photo_of(studio, dataset, photo)
    names = layers(shown, [name, "other"] if name else [])
    marks = []
    for one in regions(mask_drawing(shown, names)):
        mask = one.mask.copy()
        mask[: len(mask) // 2] |= one.words == name
        marks.append(Drawn(one.words, mask))
    return names, drawing(marks)


def test_a_painted_mask_is_saved_at_the_photos_size_and_upright(studio: Studio, tmp_path: Path) -> None:
    dataset = two_photos(studio, tmp_path)
    for photo, size in (("wide.png", (900, 600)), ("turned.jpg", (40, 60))):
        names, value = painted(studio, dataset, photo)
        (file,) = save_masks(studio, dataset, photo, names, value)
        with Image.open(studio.datasets.folder(dataset) / file) as image:
            assert image.size == size and set(np.unique(np.asarray(image))) == {0, 255}
        loaded = photo_of(studio, dataset, photo).masks[""]
        assert loaded[: len(loaded) // 2 - 1].min() == 255 and loaded[len(loaded) // 2 + 1 :].max() == 0
        assert save_masks(studio, dataset, photo, *painted(studio, dataset, photo)) == []  # nothing was changed


def test_an_emptied_mask_goes_to_the_trash_and_names_are_no_paths(studio: Studio, tmp_path: Path) -> None:
    dataset = two_photos(studio, tmp_path)
    names, value = painted(studio, dataset, "wide.png", "my-cat")
    assert names == ["my-cat", "other"]
    assert save_masks(studio, dataset, "wide.png", names, value) == ["wide-masklabel-my-cat.png"]
    shown = photo_of(studio, dataset, "wide.png")
    assert layers(shown, ["my-cat"]) == [
        "",
        "my-cat",
    ]  # one thing now: its mask has no name, and this one stays in view
    gone = drawing([Drawn("my-cat", np.zeros(shown.image.shape[:2], bool))])
    assert save_masks(studio, dataset, "wide.png", ["my-cat"], gone) == ["wide-masklabel-my-cat.png"]
    assert photo_of(studio, dataset, "wide.png").masks == {}
    assert list(studio.workspace.trash.rglob("wide-masklabel-my-cat.png"))
    full = drawing([Drawn("x", np.ones(shown.image.shape[:2], bool))])
    for forged in ("../../x", "a/b", "x" * 99):
        with pytest.raises(StudioError, match="can't name a mask"):
            save_masks(studio, dataset, "wide.png", [forged], full)
    with pytest.raises(StudioError, match="not of this photo"):
        save_masks(studio, dataset, "turned.jpg", ["x"], full)
    with pytest.raises(StudioError, match="not in the set"):
        photo_of(studio, dataset, "../w/config")
    with pytest.raises(StudioError, match="example"):
        photo_of(studio, EXAMPLE, "0001.png")


def test_only_what_a_person_changed_is_written(studio: Studio, tmp_path: Path) -> None:
    """A photo that is left is saved; a mask that was found while it was open and untouched stays."""
    dataset = two_photos(studio, tmp_path)
    shown = photo_of(studio, dataset, "wide.png")
    names = layers(shown, ["my-cat", "other"])
    opened = Opened(dataset, "wide.png", tuple(names), mask_drawing(shown, names))
    assert save_changes(studio, None, "") == [] == save_changes(studio, opened, opened.before)
    _, value = painted(studio, dataset, "wide.png", "my-cat")
    save_masks(studio, dataset, "wide.png", *painted(studio, dataset, "wide.png", "my-dog"))  # meanwhile
    assert save_changes(studio, opened, value) == ["wide-masklabel-my-cat.png"]
    assert set(photo_of(studio, dataset, "wide.png").masks) == {"my-cat", "my-dog"}
    with pytest.raises(StudioError, match="not of this photo"):
        save_changes(studio, opened, "")


def test_masks_are_found_and_a_persons_are_kept(studio: Studio, tmp_path: Path) -> None:
    dataset = two_photos(studio, tmp_path)
    save_masks(studio, dataset, "wide.png", *painted(studio, dataset, "wide.png"))
    mine = (studio.datasets.folder(dataset) / "wide-masklabel.png").read_bytes()
    job = start_masks(studio, dataset, ["cat"], ["my-cat"], overwrite=False)
    assert job.wait(120) and job.state == "done", job.error
    found = studio.view(job).result
    assert found["kept"] == ["wide-masklabel.png"]
    assert (studio.datasets.folder(dataset) / "wide-masklabel.png").read_bytes() == mine
    assert set(found["written"] + found["missing"]) == {"turned-masklabel.png"}
    job = start_masks(studio, dataset, ["cat", "dog"], ["my-cat", "my-dog"], overwrite=False)
    assert job.wait(120) and job.state == "done", job.error
    names = {name for each in ("written", "missing") for name in studio.view(job).result[each]}
    assert names == {f"{photo}-masklabel-{name}.png" for photo in ("wide", "turned") for name in ("my-cat", "my-dog")}
    with pytest.raises(StudioError, match="one name"):
        start_masks(studio, dataset, ["cat", "dog"], ["x", "x"], overwrite=False)


def test_things_without_a_word_say_what_they_are_called(studio: Studio, tmp_path: Path) -> None:
    """Their masks are learned from under these names alone, and other names are told of."""
    found = {"written": ["a-masklabel-thing10.png", "a-masklabel-thing2.png"], "kept": ["b-masklabel-thing1.png"]}
    assert thing_names(found) == ["thing1", "thing2", "thing10"]
    assert thing_names({"written": ["a-masklabel.png", "a-masklabel-dog.png"], "kept": []}) == [] == thing_names(None)
    dataset = two_photos(studio, tmp_path)
    for name in ("thing1", "thing2"):
        shown = photo_of(studio, dataset, "wide.png")
        full = drawing([Drawn(name, np.ones(shown.image.shape[:2], bool))])
        save_masks(studio, dataset, "wide.png", [name], full)
    example = {"photos": EXAMPLE, "noun": "cat", "name": "my-cat"}
    tom = example | {"photos": dataset, "name": "tom"}
    assert "of thing1 and thing2, and nothing here is called so" in unused_masks(studio, [example, tom])
    assert unused_masks(studio, [tom, tom | {"name": "thing2"}]) == "" == unused_masks(studio, [example])
    save_masks(studio, dataset, "wide.png", *painted(studio, dataset, "wide.png"))
    assert unused_masks(studio, [tom]) == ""  # one has no name: it is anybody's


def test_an_outline_joins_what_is_painted() -> None:
    mask, found = np.zeros((4, 6), bool), np.zeros((4, 6), np.uint8)
    mask[0], found[1] = True, 255
    (both,) = regions(with_outline(drawing([Drawn("", mask)]), 0, found))
    assert both.mask[:2].all() and not both.mask[2:].any()
    with pytest.raises(StudioError):
        with_outline(drawing([Drawn("", mask)]), 1, found)
    with pytest.raises(StudioError):
        with_outline(drawing([Drawn("", mask)]), 0, found[:2])


def test_several_things_of_a_form() -> None:
    most = things.MOST
    given = [
        2,
        "cat",
        "dog",
        *[""] * (most - 2),
        "my-cat",
        "<my-dog>",
        *[None] * (most - 2),
        "set-b",
        *[""] * (most - 2),
    ]
    first, second = things.read(given)
    assert first == {"photos": "", "noun": "cat", "name": "my-cat"}
    assert second == {"photos": "set-b", "noun": "dog", "name": "my-dog"}
    assert things.read_of("set-a", given) == [first] and things.read_of("set-b", given) == [first, second]
    things.complete([first, second])
    with pytest.raises(StudioError, match="thing 2 a name"):
        things.complete([first, second | {"name": ""}])
    with pytest.raises(StudioError, match="What is it"):
        things.complete([first | {"noun": ""}])
    with pytest.raises(StudioError, match="'<my cat!>' can't name a concept"):
        things.complete([first | {"name": "my cat!"}])
    with pytest.raises(StudioError, match="can't share a name"):
        things.complete([first, second | {"name": "My-Cat"}])


def test_two_things_train_in_one_run(studio: Studio, tmp_path: Path) -> None:
    """From a set each; the wish is stored with the run and names both."""
    a = two_photos(studio, tmp_path)
    b, _ = studio.datasets.add([tmp_path / "wide.png"], "another")
    settings = {"steps": 2, "sample_every": 0, "checkpoint_every": 0, "prior_weight": 0, "rare_word": "sks"}
    wish = Training(
        a, "cat", "my-cat", "svdiff", settings, base=studio.base.where,
        more=[{"photos": b, "noun": "dog", "name": "my-dog"}],
    )  # fmt: skip
    wish, told = with_rare_words(studio, wish)
    assert wish.params["rare_word"] == "sks olis" and "sks olis" in told
    job = start_training(studio, wish)
    assert job.title == "Train my-cat and my-dog"
    assert job.wait(300) and job.state == "done", job.error
    (concept,) = studio.library.concepts()
    assert [(each.token, each.noun) for each in concept.subjects] == [("<my-cat>", "cat"), ("<my-dog>", "dog")]
    assert Training(**job.meta).things()[1]["photos"] == b


def test_a_folder_of_mudi_becomes_a_set_for_each_subject(studio: Studio, tmp_path: Path) -> None:
    folder = tmp_path / "mudi"
    folder.mkdir()
    rows = [{"id": {"a": "olis drink can", "b": "hta plush"}}]
    mask = np.zeros((30, 40), np.uint8)
    mask[5:20, 5:20] = 255
    for id, phrase in rows[0]["id"].items():
        Image.new("RGB", (40, 30), "red").save(folder / f"{id}.png")
        Image.fromarray(mask).save(folder / f"mask_{id}.png")
        rows.append(
            {"id": id, "file_name": f"{id}.png", "mask_path": f"mask_{id}.png", "text": f"A photo of a {phrase}"}
        )
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    first, (told,) = studio.datasets.add(sorted(folder.iterdir()), "x")
    assert "<drink-can> (drink can) and <plush> (plush)" in told
    about = studio.datasets.about(first)
    (second,) = about["with"]
    assert (about["noun"], about["name"], about["rare"]) == ("drink can", "drink-can", "olis")
    assert studio.datasets.about(second)["with"] == [first]
    (photo,) = studio.datasets.photos(first)
    assert photo.caption == "A photo of a <drink-can>" and list(photo.masks) == [""]
    wish = Training(
        first, "drink can", "drink-can", "segmix", {"rare_word": "sks"},
        more=[{"photos": second, "noun": "plush", "name": "plush"}],
    )  # fmt: skip
    assert with_rare_words(studio, wish)[0].params["rare_word"] == "olis hta"
    enough = [load_preset("segmix", name).model_dump() for name in ("default", "toybox")]  # 5 and 4 words of its own
    for params in enough:
        told = with_rare_words(studio, replace(wish, params=params))
        assert told[0].params["rare_word"] == "olis hta" and "olis hta" in told[1]
    alone = replace(wish, method="svdiff", params=load_preset("svdiff", "default").model_dump(), more=())
    assert with_rare_words(studio, alone)[0].params["rare_word"] == "olis"
    twins = replace(wish, more=[{"photos": "", "noun": "plush", "name": "plush"}])
    assert with_rare_words(studio, twins)[0].params["rare_word"] == "olis sks"
    written = replace(wish, params={"rare_word": "zyx qwe"})  # by a person
    assert with_rare_words(studio, written) == (written, "")
    (folder / "a.png").unlink()
    with pytest.raises(StudioError, match=r"line 2.*a\.png"):
        studio.datasets.add(sorted(folder.iterdir()), "x")
    assert len(studio.datasets.all()) == 2


def test_class_pictures_are_added_and_learned_beside(studio: Studio, tmp_path: Path) -> None:
    """They are no photo set, and an id of another name stands for the thing of its noun."""
    photos, before = two_photos(studio, tmp_path), len(studio.datasets.all())
    folder = tmp_path / "classes"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "1.png")
    Image.new("L", (40, 30), 255).save(folder / "m1.png")
    rows = [{"id": {"x": "cat"}}, {"id": "x", "file_name": "1.png", "mask_path": "m1.png", "text": "A photo of a cat"}]
    (folder / "class_metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    added, (told,) = studio.datasets.add(sorted(folder.iterdir()), "x")
    assert "Class pictures" in told and len(studio.datasets.all()) == before
    assert [(each.id, each.title) for each in studio.datasets.classes()] == [(added, "1 of cat")]
    settings = {"steps": 2, "sample_every": 0, "checkpoint_every": 0, "prior_weight": 1.0, "prior_count": 1}
    wish = Training(photos, "cat", "my-cat", "svdiff", settings, base=studio.base.where, classes=added)
    job = start_training(studio, wish)
    assert job.wait(300) and job.state == "done", job.error
    assert not list((studio.workspace.root / "prior").glob("**/*.png")), "the base painted none"
    wrong = Training(photos, "dog", "my-dog", "svdiff", settings, base=studio.base.where, classes=added)
    job = start_training(studio, wrong)
    assert job.wait(300) and job.state == "failed" and "class_metadata.jsonl, line 1 names x" in str(job.error)
    (folder / "m1.png").unlink()
    with pytest.raises(StudioError, match=r"line 2.*m1\.png"):
        studio.datasets.add(sorted(folder.iterdir()), "x")
