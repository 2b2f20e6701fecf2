"""Several learned tokens in one `learned_embeds` file: what ConceptExpress and its forks write, one key each.

    {"<asset0>": (width,), "<asset1>": (width,), ...}    safetensors; `.bin` is read by `inversion.read_embeds`

The file names neither nouns nor a base. Shifts of a second phase don't go into it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.formats import inversion
from pipelines.intake import read_header

if TYPE_CHECKING:
    from torch import Tensor

method = "extract"
title = "learned_embeds of several tokens (ConceptExpress)"


def detect(path: Path) -> bool:
    """A safetensors file of learned tokens of one encoder, more than one of them, each with a name in <>."""
    if not path.is_file() or path.suffix.lower() != ".safetensors" or not inversion.detect(path):
        return False
    try:
        keys = [key for key in read_header(path) if key != "__metadata__"]
    except (OSError, ValueError, StudioError):
        return False
    return len(keys) > 1 and all(key.startswith("<") and key.endswith(">") and "_v" not in key for key in keys)


def read(path: Path) -> dict[str, Any]:
    """The rows under our names, and "subjects": the tokens in their order. StudioError when it holds something else."""
    embeds = inversion.read_embeds(path)
    if len(embeds) < 2 or any(len(rows) != 1 for rows in embeds.values()):
        raise StudioError(
            f"'{printable(path.name)}' holds no tokens of several subjects, one row each. Choose another."
        )
    import torch

    tokens = sorted(embeds, key=_counted)  # a safetensors file keeps no order
    rows: Tensor = torch.cat([embeds[token] for token in tokens])
    return {"tensors": {inversion.KEYS[0]: rows}, "params": {}, "subjects": tokens, "name": path.stem}


def _counted(token: str) -> list[str | int]:
    """For sorting: <asset2> before <asset10>."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", token)]


def write(path: Path, trained: Trained) -> list[Path]:
    """`learned_embeds.safetensors` in the folder `path`, one key for each subject. StudioError for a concept with
    shifts, which would be lost."""
    if any(key.endswith(".delta") for key in trained.tensors):
        raise StudioError(
            f"'{printable(trained.concept.name)}' has spectral shifts beside its tokens, and learned_embeds can't hold "
            "those. Export it as a zip."
        )
    return inversion.write(path, trained)
