"""Cones 2's `residual.pt`: one bare tensor, (tokens of the noun, width of the text states), fp32, by torch.save.

Released files are (1, 1024) for SD 2.1. They say neither noun nor base.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import make_folder, printable, write_atomic
from pipelines.formats.jail import pickle_codes, read_tensors
from pipelines.methods.residual import KEY

if TYPE_CHECKING:
    from torch import Tensor

method = "residual"
title = "Cones 2 residual.pt"

FILE = "residual.pt"
_PICKLE_LIMIT = 16_384  # bytes; a bare tensor's description has about 160
_MOST_TOKENS = 75  # what a CLIP encoder reads beside start and end
_USUAL_NORMS = (14.0, 40.0)  # of the nine released files for SD 2.1: 13.9 to 40.0
_USUAL_WIDTH = 1024
logger = logging.getLogger(__name__)


def detect(path: Path) -> bool:
    """Whether it is a torch.save file of one bare tensor. Its pickle is only read as a list of codes, never run."""
    codes = pickle_codes(_file(path), _PICKLE_LIMIT)
    names = [name for name, _ in codes]
    holders = {"SETITEM", "SETITEMS", "APPEND", "APPENDS"}  # of a dictionary or a list
    rebuilt = ("GLOBAL", "torch._utils _rebuild_tensor_v2") in codes
    return rebuilt and names.count("BINPERSID") == 1 and not holders & set(names)


def read(path: Path) -> dict[str, Any]:
    """{"tensors": {"residual": (n, width)}, "params": {}, "notes": sentences to tell}; "name" where it has its own.

    StudioError when it holds something else.
    """
    file = _file(path)
    rows = as_rows(read_tensors(file), f"'{printable(file.name)}'")
    notes = judged(rows, f"'{printable(file.name)}'")
    for note in notes:
        logger.warning("%s", note)
    found: dict[str, Any] = {"tensors": {KEY: rows}, "params": {}, "notes": notes}
    return found if file.name == FILE else found | {"name": file.stem}


def as_rows(rows: Tensor | dict[str, Tensor], what: str) -> Tensor:
    """(n, width) fp32 from what a file held; StudioError when that is no residual."""
    if isinstance(rows, dict):
        raise StudioError(
            f"{what} holds {len(rows)} named tensors; a residual is one bare tensor. Choose another file."
        )
    if rows.ndim not in (1, 2) or rows.shape[-1] == 0 or not rows.is_floating_point():
        raise StudioError(f"{what} holds {_shape(rows)}; a residual is (tokens, width) numbers. Choose another file.")
    rows = rows.reshape(-1, rows.shape[-1]).float().contiguous()
    if not 0 < len(rows) <= _MOST_TOKENS:
        raise StudioError(f"{what} holds {_shape(rows)}; no noun has {len(rows)} tokens. Choose another file.")
    return rows


def write(path: Path, trained: Trained) -> list[Path]:
    """`residual.pt` in the folder `path`: detached, on the CPU, so that every reader of the originals takes it."""
    target = path / FILE
    if target.exists():
        raise StudioError(f"{target} is already there. Choose another folder.")
    make_folder(path)
    write_rows(target, trained.tensors[KEY])
    return [target]


def write_rows(file: Path, rows: Tensor) -> None:
    """(n, width) as one bare tensor in `file`, whose folder is there."""
    import torch

    content = io.BytesIO()
    torch.save(rows.detach().float().cpu().contiguous().clone(), content)
    write_atomic(file, content.getvalue())


def _file(path: Path) -> Path:
    """The residual in an output folder of Cones 2, or the file itself."""
    return path / FILE if path.is_dir() else path


def _shape(rows: Tensor) -> str:
    return f"{tuple(rows.shape)} {str(rows.dtype).removeprefix('torch.')}"


def judged(rows: Tensor, what: str) -> list[str]:
    """What its length says: trained residuals of SD 2.1 are about 14 to 40 long; 0 or more than 100 is a failed run."""
    norms, low, high = rows.norm(dim=1).tolist(), *_USUAL_NORMS
    if rows.shape[1] != _USUAL_WIDTH or all(low - 0.5 <= norm <= high + 0.5 for norm in norms):
        return []
    failed = any(norm == 0 or norm > 100 for norm in norms)
    verdict = "so its training probably failed" if failed else "so look at its pictures before you rely on it"
    lengths = ", ".join(f"{norm:.1f}" for norm in norms)
    return [f"{what} is {lengths} long where residuals of SD 2.1 are {low:g} to {high:g}, {verdict}."]
