"""The results in a workspace: listed, read, deleted, taken away as a zip."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.album import ATTENTION, RECORD
from pipelines.errors import StudioError
from pipelines.files import TEMPORARY, check_id, spare_disk, sweep

if TYPE_CHECKING:
    from pipelines.workspace import Workspace

log = logging.getLogger(__name__)
_FILE = re.compile(rf"(?:{ATTENTION}/)?[0-9]{{4,9}}[a-z0-9-]*\.(?:png|npz)")


@dataclass(frozen=True)
class Result:
    """The pictures of one request. `recipe` is recipe.py's, with the seeds of all of them."""

    id: str
    folder: Path
    created: float
    complete: bool  # False: it was stopped, or is still growing
    recipe: dict[str, Any]
    pictures: tuple[dict[str, Any], ...]  # {"file", "seed", "width", "height", "attention"?}, files inside `folder`

    @property
    def paths(self) -> list[Path]:
        """The pictures' files."""
        return [self.folder / picture["file"] for picture in self.pictures]

    @property
    def prompt(self) -> str:
        """As it was typed."""
        return str(self.recipe["request"]["prompt"])


def list_results(workspace: Workspace) -> list[Result]:
    """All results, the newest first. Folders that are no results or broken are left out, and the log says which."""
    sweep(workspace.results)
    found = []
    for entry in os.scandir(workspace.results):
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            found.append(_read(Path(entry.path)))
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("Left out the result %s: %s", entry.name, error)
    return sorted(found, key=lambda result: result.created, reverse=True)


def read_result(workspace: Workspace, id: str) -> Result:
    """One result; StudioError when it is gone or broken."""
    folder = workspace.folder(workspace.results, id, "result")
    try:
        return _read(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudioError(f"The record of the result '{id}' can't be read. Delete the result.") from error


def delete_result(workspace: Workspace, id: str) -> None:
    """Remove a result for good; StudioError when it is gone already."""
    folder = workspace.folder(workspace.results, id, "result")
    grave = workspace.results / f".{secrets.token_hex(8)}{TEMPORARY}"
    with spare_disk(folder, 0):
        os.rename(folder, grave)  # gone at once; if the rest is interrupted, the next listing sweeps it
    shutil.rmtree(grave, ignore_errors=True)


def zip_results(workspace: Workspace, ids: Sequence[str], path: str | Path) -> Path:
    """Pack the pictures and heat maps of results into a zip at `path`, a folder for each; returns its path."""
    path = Path(path)
    results = [read_result(workspace, check_id(id, "result")) for id in ids]
    if not results:
        raise StudioError("No result is chosen. Choose at least one to download.")
    part = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with spare_disk(path, 0), zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for result in results:
                for name in _files(result):
                    archive.write(result.folder / name, f"{result.id}/{name}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _files(result: Result) -> list[str]:
    names = [picture["file"] for picture in result.pictures]
    for picture in result.pictures:
        if "attention" in picture:
            names += [picture["attention"]["file"], *picture["attention"]["overlays"].values()]
    return [name for name in dict.fromkeys(names) if (result.folder / name).is_file()]


def _read(folder: Path) -> Result:
    """A record is data from disk: names in it that could leave the folder are refused."""
    data = json.loads((folder / RECORD).read_text("utf-8"))
    pictures = tuple(picture for picture in data["pictures"] if (folder / _safe(picture["file"])).is_file())
    for picture in pictures:
        if "attention" in picture:
            for name in (picture["attention"]["file"], *picture["attention"]["overlays"].values()):
                _safe(name)
    if not isinstance(data["recipe"]["request"]["prompt"], str):
        raise ValueError("its prompt is no text")
    return Result(folder.name, folder, float(data["created"]), bool(data["complete"]), data["recipe"], pictures)


def _safe(name: Any) -> str:
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise ValueError(f"{name!r} is no file of a result")
    return name
