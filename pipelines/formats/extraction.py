"""Several learned tokens in one `learned_embeds` file: what ConceptExpress and its forks write, one key each.

    {"<asset0>": (width,), "<asset1>": (width,), ...}    learned_embeds.bin (theirs) or .safetensors (ours)

The file names neither nouns nor a base. Shifts of a second phase lie beside it in a folder, as SVDiff's files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.formats import inversion, svdiff
from pipelines.intake import read_header

if TYPE_CHECKING:
    from torch import Tensor

method = "extract"
_SHIFT = ".delta"
title = "learned_embeds of several tokens (ConceptExpress)"


def detect(path: Path) -> bool:
    """A file of learned tokens of one encoder, or a folder with one: several, each with a name in <>. Nothing is
    unpickled."""
    file = inversion.newest(path)
    if file is None or not file.is_file() or not inversion.detect(file):
        return False
    names = _names(file)
    return len(names) > 1 and all(name.endswith(">") and "_v" not in name for name in names)


def _names(file: Path) -> list[str]:
    """The tokens that a file says it holds; [] where something in it is no token."""
    if file.suffix.lower() in inversion.PICKLED:
        return [text for text in inversion.pickled_texts(file) if text.startswith("<")]
    try:
        keys = [key for key in read_header(file) if key != "__metadata__"]
    except (OSError, ValueError, StudioError):
        return []
    return keys if all(key.startswith("<") for key in keys) else []


def read(path: Path) -> dict[str, Any]:
    """The rows under our names with the shifts that lie beside them in a folder, and "subjects": the tokens in their
    order. StudioError when it holds something else."""
    file = inversion.newest(path) or path
    embeds = inversion.read_embeds(file)
    if len(embeds) < 2 or any(len(rows) != 1 for rows in embeds.values()):
        raise StudioError(
            f"'{printable(path.name)}' holds no tokens of several subjects, one row each. Choose another."
        )
    if len({rows.shape[-1] for rows in embeds.values()}) > 1:
        raise StudioError(f"The tokens of '{printable(file.name)}' are of different widths. Choose another file.")
    import torch

    tokens = sorted(embeds, key=_counted)  # a safetensors file keeps no order
    rows: Tensor = torch.cat([embeds[token] for token in tokens])
    found: dict[str, Any] = {"tensors": {inversion.KEYS[0]: rows}, "params": {}}
    if path.is_dir() and svdiff.detect(path):
        shifts = svdiff.read(path)
        kept = {key: value for key, value in shifts["params"].items() if key in ("mode_1d", "train_text_encoder")}
        found = {"tensors": found["tensors"] | shifts["tensors"], "params": kept | {"shift_steps": 1}}
    return found | {"subjects": tokens, "name": path.stem}


def _counted(token: str) -> list[str | int]:
    """For sorting: <asset2> before <asset10>."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", token)]


def write(path: Path, trained: Trained) -> list[Path]:
    """`learned_embeds.safetensors` in the folder `path`, one key for each subject, and SVDiff's files for the shifts of
    a second phase. StudioError when one is there already."""
    tokens = {key: value for key, value in trained.tensors.items() if not key.endswith(_SHIFT)}
    shifts = {key: value for key, value in trained.tensors.items() if key.endswith(_SHIFT)}
    written = inversion.write(path, Trained(trained.concept, tokens))
    return written + (svdiff.write(path, Trained(trained.concept, shifts)) if shifts else [])
