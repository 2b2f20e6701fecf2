"""Detect-and-Compare over folders: which pictures are a subject's references."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluate.comparison import read_pictures, subject_photos

COLORS = {"a.png": (200, 0, 0), "mask_b.png": (0, 200, 0), "unmasked.png": (0, 0, 200)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mask_of_tom" / "masks"
    made.mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(made / name)
    return made


def test_references_whose_path_says_mask_are_kept(folder: Path) -> None:
    """The original drops every picture with "mask" anywhere in its path."""
    assert [tuple(image[0, 0]) for image in subject_photos(folder, "tom")] == list(COLORS.values())
    assert [photo.path.name for photo in read_pictures(folder)] == list(COLORS)


def test_of_mudis_folder_only_what_its_metadata_calls_masks_is_left_out(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "cut.png")
    row = {"id": "tom", "file_name": "mask_b.png", "mask_path": "cut.png", "text": "a photo of a sks toy"}
    (folder / "metadata.jsonl").write_text(f"{json.dumps({'id': {'tom': 'sks toy'}})}\n{json.dumps(row)}")
    (image,) = subject_photos(folder, "tom")
    assert tuple(image[0, 0]) == COLORS["mask_b.png"]
    assert [photo.path.name for photo in read_pictures(folder)] == list(COLORS)
