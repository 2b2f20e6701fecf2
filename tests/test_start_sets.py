"""Whose the photo sets are that pictures begin with: their names where these are in use, else their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import Concept, StudioError, Subject, Trained, Workspace
from studio.session import Studio
from studio.starts import cutter, start_of

TOKENS = ("<can>", "<plush>")


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    """One concept of two things."""
    studio = Studio(Workspace(tmp_path / "w"))
    subjects = (Subject("<can>", "blue drink can"), Subject("<plush>", "red plush"))
    concept = Concept("duo", subjects, "textual_inversion", {"id": "", "fingerprint": ""}, {"tokens": 1}, 0)
    studio.library.save(Trained(concept, {"tokens.text_encoder": torch.zeros(2, 8)}))
    yield studio
    studio.close()


def photo_set(studio: Studio, folder: Path, colour: str, *masks: str) -> str:
    """One photo with masks of these names."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 32), colour).save(folder / "a.png")
    for at, name in enumerate(masks):
        mask = np.zeros((32, 64), np.uint8)
        mask[4:20, 2 + 20 * at : 20 + 20 * at] = 255
        Image.fromarray(mask).save(folder / f"a-masklabel{name and '-'}{name}.png")
    return studio.datasets.add(sorted(folder.iterdir()), colour)[0]


def colours(studio: Studio, sets: list[str], prompt: str = "<can> and <plush>") -> dict[str, set[tuple[int, ...]]]:
    """What is cut out for each word."""
    values = {"start_photos": sets, "prompt": prompt, "start_strength": "", "start_sizes": ""}
    start = start_of(studio, values, ["duo"], None, cutter(studio))
    assert start is not None
    return {word: {tuple(one.piece.image[0, 0]) for one in start.cutouts if one.word == word} for word in start.words}


def test_sets_without_names_are_taken_in_order(studio: Studio, tmp_path: Path) -> None:
    red, blue = (photo_set(studio, tmp_path / colour, colour, "") for colour in ("red", "blue"))
    assert colours(studio, [red, blue]) == {"<can>": {(255, 0, 0)}, "<plush>": {(0, 0, 255)}}
    assert colours(studio, [blue, red])["<can>"] == {(0, 0, 255)}
    with pytest.raises(StudioError, match="a photo set for each of <can> and <plush>, in that order"):
        colours(studio, [red])


def test_a_name_counts_where_it_is_in_use(studio: Studio, tmp_path: Path) -> None:
    """Names that nothing learned are no names; a set that has one in use leaves the other word to the other set."""
    red, blue = (photo_set(studio, tmp_path / colour, colour, f"my-{colour}") for colour in ("red", "blue"))
    assert colours(studio, [red, blue]) == {"<can>": {(255, 0, 0)}, "<plush>": {(0, 0, 255)}}
    lime = photo_set(studio, tmp_path / "lime", "lime", "can")
    assert colours(studio, [red, lime]) == {"<can>": {(0, 255, 0)}, "<plush>": {(255, 0, 0)}}
    both = photo_set(studio, tmp_path / "teal", "teal", "plush", "can")
    assert set(colours(studio, [both], "a <can>")) == {"<can>"}
