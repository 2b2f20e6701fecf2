"""Where a person's things live: one folder with concepts, datasets, runs, results and the trash."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipelines import files
from pipelines.errors import StudioError

_RESERVE = 64 * 1024 * 1024  # bytes left alone, so that logs and the system itself can go on
_FOLDERS = ("concepts", "datasets", "runs", "results", "trash")


class Workspace:
    """The folders of one workspace: `root`, else the variable STUDIO_HOME, else ./workspace; made when missing.

    It is private: the app never serves it. Several processes may use one workspace at the same time.
    StudioError when the folder can't be made or written.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or os.environ.get("STUDIO_HOME") or "workspace").expanduser().absolute()
        self.concepts, self.datasets, self.runs, self.results, self.trash = (self.root / name for name in _FOLDERS)
        try:
            for name in _FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudioError(
                f"Cannot make the workspace {self.root}: {error.strerror}. Choose another with --workspace."
            ) from error
        for folder in (self.concepts, self.trash):
            files.sweep(folder)

    def free_bytes(self) -> int:
        """Bytes this user may still write on the workspace's disk."""
        return shutil.disk_usage(self.root).free

    def need(self, size: int, what: str) -> None:
        """StudioError unless `size` bytes for `what` ("the checkpoints") fit, with some room left over."""
        free = self.free_bytes()
        if size + _RESERVE > free:
            raise StudioError(
                f"The disk is too full for {what}: it needs {files.megabytes(size + _RESERVE)}, "
                f"{files.megabytes(free)} are free. Free some space or choose another disk with --workspace."
            )

    def new_folder(self, parent: Path, title: str) -> Path:
        """A fresh folder for a run or a result in `parent` (`workspace.runs`, `workspace.results`), named by us."""
        folder = parent / files.new_id(title)
        with files.spare_disk(folder, 0):
            folder.mkdir()
        return folder

    def folder(self, parent: Path, item: str, what: str = "item") -> Path:
        """The existing folder `item` of `parent`; StudioError when the id is malformed or nothing is there."""
        folder = parent / files.check_id(item, what)
        if folder.is_symlink() or not folder.is_dir():
            raise StudioError(f"There is no {what} '{item}' any more. Reload the list.")
        return folder
