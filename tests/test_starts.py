"""How strongly pictures begin as a collage where nobody says: by how many subjects the prompt names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import Workspace
from pipelines.__main__ import build_parser
from pipelines.collage import Piece
from pipelines.commands.starts import check_start, read_start
from studio.session import Studio
from studio.starts import start_of

NAMES = ("ann", "ben", "cay", "dan", "eve")
USUAL = [(1, 2.0), (2, 2.0), (3, 2.0), (4, 3.0), (5, 3.0)]  # appendix B.9: 2 for two or three, 3 for more


def prompt(count: int) -> str:
    return " and ".join(f"<{name}>" for name in NAMES[:count])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A photo with a mask of each of five."""
    mask = np.full((32, 32), 255, np.uint8)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    for name in NAMES:
        Image.fromarray(mask).save(tmp_path / f"a-masklabel-{name}.png")
    return tmp_path


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"))
    yield studio
    studio.close()


@pytest.mark.parametrize(("count", "gamma"), USUAL)
def test_the_command_shows_more_than_three_more_strongly(count: int, gamma: float, photos: Path) -> None:
    line = ["generate", prompt(count), "--start-noise", "--start-photos", str(photos)]
    options = build_parser(line).parse_args(line)
    check_start(options)
    found = read_start(options, [prompt(count)], [], 32)(prompt(count))
    assert found is not None and len(found.words) == count and found.gamma == gamma


@pytest.mark.parametrize(("count", "gamma"), USUAL)
def test_the_page_shows_more_than_three_more_strongly(count: int, gamma: float, studio: Studio) -> None:
    block = np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 255, np.uint8)
    values: dict[str, Any] = {"start_photos": ["set"], "start_strength": "", "start_sizes": "", "prompt": prompt(count)}
    found = start_of(studio, values, (), None, lambda dataset, tokens: [Piece(f"<{name}>", *block) for name in NAMES])
    assert found is not None and len(found.words) == count and found.gamma == gamma
