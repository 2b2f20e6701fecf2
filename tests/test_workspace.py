"""The workspace: made where it is asked for, careful with the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.errors import StudioError
from pipelines.workspace import Workspace


def test_the_place_is_given_or_from_the_variable_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STUDIO_HOME", raising=False)
    assert Workspace().root == tmp_path / "workspace"
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "other"))
    assert Workspace().root == tmp_path / "other"
    assert Workspace(tmp_path / "third").root == tmp_path / "third"
    space = Workspace("fourth")
    for folder in (space.concepts, space.datasets, space.runs, space.results, space.trash):
        assert folder.is_dir() and folder.parent == tmp_path / "fourth"


def test_a_place_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StudioError, match="--workspace"):
        Workspace(tmp_path / "file")


def test_disk_need_is_checked_before(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    assert space.free_bytes() > 0
    space.need(1000, "a picture")
    with pytest.raises(StudioError, match="too full for the checkpoints: it needs .* MB"):
        space.need(2**60, "the checkpoints")


def test_folders_are_found_by_ids_only(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    made = space.new_folder(space.runs, "../../Grüße")
    assert made.parent == space.runs and space.folder(space.runs, made.name, "run") == made
    (tmp_path / "outside").mkdir()
    (space.runs / "link").symlink_to(tmp_path / "outside")
    for bad in ("..", "../outside", str(tmp_path), "link", "gone", "", "a\0"):
        with pytest.raises(StudioError, match="run"):
            space.folder(space.runs, bad, "run")


def test_opening_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    left = space.concepts / ".deadbeef.tmp"
    left.mkdir()
    os.utime(left, (0, 0))
    Workspace(tmp_path)
    assert not left.exists()
