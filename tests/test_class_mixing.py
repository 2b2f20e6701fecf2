"""Class pictures are mixed like the photos beside them: Seg-Mix with masks, Cut-Mix without; nobody learns of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.concept import Subject
from pipelines.data import ClassPicture, Data, prepare
from pipelines.errors import StudioError
from pipelines.events import Finished, Note, Progress
from pipelines.formats.mudi import CLASS_FILE, write_dataset
from pipelines.methods import get_method, segmix, svdiff
from pipelines.mixers import CutMixer, SegMixer, of_classes
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.prior import class_pictures
from pipelines.runs import train_concept
from pipelines.workspace import Workspace
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")
PAIR = (CAT, DOG)
QUICK: dict[str, Any] = {"steps": 2, "batch_size": 4, "prior_weight": 1.0, "rare_word": "hta sks", "mix_chance": 0.5}
BLOCK = np.zeros((64, 64), np.uint8)
BLOCK[16:48, 20:44] = 255


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def photos() -> list[Photo]:
    chance = np.random.default_rng(3)
    return [
        Photo(
            Path(f"{name}.png"), chance.integers(0, 200, (64, 64, 3), np.uint8), {name: BLOCK}, None, (64, 64), (name,)
        )
        for name in ("my-cat", "my-dog")
    ]


def classes(masked: bool = True) -> list[ClassPicture]:
    """Two of each kind."""
    chance = np.random.default_rng(9)
    return [
        ClassPicture(
            chance.integers(0, 200, (64, 64, 3), np.uint8),
            f"a photo of a {one.noun}",
            one.token,
            BLOCK if masked else None,
        )
        for one in (CAT, DOG, CAT, DOG)
    ]


def data(model: Model, method: Any, params: Any, masked: bool = True) -> Data:
    mixers = {kind: getattr(method, kind)(params, PAIR) for kind in ("mixer", "class_mixer")}
    return prepare(model, photos(), params, PAIR, seed=1, prior=classes(masked), **mixers)


@pytest.mark.parametrize(
    ("method", "mix", "end"),
    [(segmix, "segmix", ", simple background."), (segmix, "cutmix", ""), (svdiff, "cutmix", "")],
)
def test_a_class_picture_is_mixed_when_its_photo_is(model: Model, method: Any, mix: str, end: str) -> None:
    params = method.Params(**QUICK, mix=mix)
    made, stage = data(model, method, params), method.stages(params)[0]
    mixed = 0
    for step in range(1, 7):
        batch = made.batch(stage, step)
        assert batch.prior.tolist() == [False] * 4 + [True] * 4
        for photo, kind in zip(batch.captions[:4], batch.captions[4:], strict=True):
            both = "cat" in kind and "dog" in kind
            assert both == ("cat" in photo and "dog" in photo) and "<" not in kind
            assert not both or (kind.endswith(end) and "a cat" in kind and "a dog" in kind)
            mixed += both
        assert batch.masks is not None and bool((batch.masks[4:] == 1).all())  # never masked, never anybody's
        assert batch.shown is not None and not batch.shown[4:].any()
        assert batch.subject_masks is not None and not batch.subject_masks[4:].any()
    assert 4 < mixed < 20


def test_mixing_class_pictures_changes_no_photo(model: Model) -> None:
    params = segmix.Params(**QUICK)
    plain = data(model, segmix, params.model_copy(update={"mix_class": False}))
    stage = segmix.stages(params)[0]
    changed = False
    for step in (1, 2, 3):
        one, two = data(model, segmix, params).batch(stage, step), plain.batch(stage, step)
        assert torch.equal(one.latents[:4], two.latents[:4]) and one.captions[:4] == two.captions[:4]
        assert torch.equal(one.noise, two.noise)
        changed |= not torch.equal(one.latents[4:], two.latents[4:])
        assert two.captions[4:].count("a photo of a cat") + two.captions[4:].count("a photo of a dog") == 4
    assert changed


def test_class_collages_stand_at_one_height_in_the_captions_order() -> None:
    mixer = of_classes(segmix.mixer(segmix.Params(relative_sizes="1 0.5"), PAIR), PAIR)  # type: ignore[arg-type]
    assert isinstance(mixer, SegMixer) and mixer.recipe.level and not mixer.recipe.swap and not mixer.recipe.sizes
    assert mixer.caption(["<my-cat>", "<my-dog>"]) == "a photo of a cat and a dog, simple background."
    cut = svdiff.class_mixer(svdiff.Params(mix="cutmix"), PAIR)
    assert isinstance(cut, CutMixer) and cut.chance == 0.6 and cut.phrases == {"<my-cat>": "cat", "<my-dog>": "dog"}
    assert (
        svdiff.class_mixer(svdiff.Params(), PAIR) is None and svdiff.mixer(svdiff.Params(mix="cutmix"), [CAT]) is None
    )


def test_subjects_of_one_kind_share_its_pictures_out(model: Model, tmp_path: Path) -> None:
    cats = (Subject("<one>", "cat"), Subject("<two>", "cat"))
    *_, made = _drained(class_pictures(model, cats, 3, tmp_path, size=32))
    assert [one.token for one in made] == ["<one>", "<two>", "<one>"] and len({one.words for one in made}) == 1


def _drained(events: Any) -> list[Any]:
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as end:
            return [*seen, end.value]


def run(root: Path, model: Model, **options: Any) -> list[Any]:
    folders = []
    for photo in photos():
        (name,) = photo.shows
        folders.append(root / name)
        if not folders[-1].exists():
            folders[-1].mkdir(parents=True)
            Image.fromarray(photo.image).save(folders[-1] / "1.png")
            Image.fromarray(BLOCK).save(folders[-1] / "1-masklabel.png")
    settings = {"sample_every": 0, "prior_count": 4, "resolution": 32, "lr": 1e-3} | QUICK | options.pop("params", {})
    method = options.pop("method", "segmix")
    params = get_method(method).Params(**settings)
    given: dict[str, Any] = {"noun": ["cat", "dog"], "name": ["my-cat", "my-dog"], "seed": 1} | options
    return list(train_concept(Workspace(root / "w"), model, method=method, photos=folders, params=params, **given))


def learned(events: list[Any]) -> Any:
    assert isinstance(events[-1], Finished)
    return events[-1].value.tensors


def alike(one: Any, two: Any) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_masks_the_class_pictures_it_paints(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    def seen(model: Any, image: Any, nouns: Any, params: Any) -> Any:
        looked.append(nouns)
        return np.pad(np.ones((1, 8, 6), np.float32), ((0, 0), (4, 4), (5, 5)))

    monkeypatch.setattr("pipelines.masks.noun_scores", seen)
    always = {"mix_chance": 1.0}
    events = run(tmp_path, model, params=always)
    assert [event.step for event in events if isinstance(event, Progress) and event.stage == "class masks"] == [
        1,
        2,
        3,
        4,
    ]
    assert looked == [["cat"], ["cat"], ["dog"], ["dog"]]
    assert not [event for event in events if isinstance(event, Note) and "not mixed" in event.text]
    run(tmp_path, model, name=["a", "b"], params=always)
    assert len(looked) == 4  # remembered
    plain = run(tmp_path, model, name=["c", "d"], params=always | {"mix_class": False})
    assert not alike(learned(events), learned(plain)) and len(looked) == 4


def test_where_nothing_can_be_cut_out_a_note_tells(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.masks.noun_scores", lambda *_: np.zeros((1, 16, 16), np.float32))
    events = run(tmp_path, model)
    (told,) = [event.text for event in events if isinstance(event, Note) and "not mixed" in event.text]
    assert told == "Class pictures are not mixed: none of them shows a cat that could be cut out."


def handed_in(folder: Path, phrases: dict[str, str]) -> Path:
    pictures = [Photo(Path("x"), one.image, {"": BLOCK}, one.words) for one in classes()]
    for number, photo in enumerate(pictures):
        photo.shows = (list(phrases)[number % 2],)
    write_dataset(folder, phrases, pictures, CLASS_FILE)
    return folder


def test_class_pictures_that_are_handed_in_are_used_and_kept_until_the_end(model: Model, tmp_path: Path) -> None:
    given = handed_in(tmp_path / "given", {"my-cat": "cat", "my-dog": "dog"})
    whole = learned(run(tmp_path / "whole", model, classes=given))
    assert not (tmp_path / "whole" / "w" / "prior").exists()  # nothing was painted
    workspace = Workspace(tmp_path / "w")
    folders = [tmp_path / "whole" / name for name in ("my-cat", "my-dog")]
    params = segmix.Params(**({"sample_every": 0, "prior_count": 4, "resolution": 32, "lr": 1e-3} | QUICK))
    options: dict[str, Any] = {"noun": ["cat", "dog"], "name": ["my-cat", "my-dog"], "seed": 1, "photos": folders}
    events = train_concept(workspace, model, method="segmix", params=params, **options, classes=given)
    next(event for event in events if isinstance(event, Progress))
    events.close()  # type: ignore[attr-defined]
    (kept,) = workspace.runs.glob("*/classes/class_metadata.jsonl")
    for path in given.iterdir():
        path.unlink()
    resumed = list(train_concept(workspace, model, method="segmix", params=params, resume=True, **options))
    assert alike(whole, learned(resumed)) and not kept.exists()


@pytest.mark.parametrize(
    ("phrases", "said"),
    [
        ({"my-cat": "cat", "a": "ox"}, "class_metadata.jsonl, line 1 names my-cat, a, but my-cat, my-dog are learned"),
        ({"my-cat": "cat", "../x": "ox"}, "line 1 names"),
    ],
)
def test_class_pictures_of_others_are_refused(model: Model, tmp_path: Path, phrases: dict[str, str], said: str) -> None:
    with pytest.raises(StudioError, match=said):
        run(tmp_path, model, classes=handed_in(tmp_path / "given", phrases))
    assert not list((tmp_path / "w" / "runs").iterdir())
