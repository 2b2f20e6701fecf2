"""Several learned tokens in one `learned_embeds` file: what ConceptExpress and its forks write, one key each.

    {"<asset0>": (width,), "<asset1>": (width,), ...}    learned_embeds.bin (theirs) or .safetensors (ours)

The file names neither nouns nor a base; ours note both in their metadata. Shifts of a second phase lie beside it in a
folder, as SVDiff's files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.formats import inversion, svdiff
from pipelines.formats.notes import concept_noted
from pipelines.intake import read_header

if TYPE_CHECKING:
    from torch import Tensor

method = "extract"
_SHIFT = ".delta"
title = "learned_embeds of several tokens (ConceptExpress)"


def detect(path: Path) -> bool:
    """A file of learned tokens of one encoder, or a folder with one: several, each with a name in <>; in a folder one
    alone as well where shifts lie beside it. Nothing is unpickled."""
    file = inversion.newest(path)
    if file is None or not file.is_file() or not inversion.detect(file):
        return False
    names = _names(file)
    several = len(names) > 1 and all(name.endswith(">") and "_v" not in name for name in names)
    return several or _shifted(path)


def _shifted(path: Path) -> bool:
    return path.is_dir() and svdiff.detect(path)


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
    order. Several rows for each are Textual Inversion's. StudioError when it holds something else."""
    file = inversion.newest(path) or path
    embeds = inversion.read_embeds(file)
    found = _one(path, file) if len(embeds) == 1 or set(embeds) == set(inversion.SDXL) else _several(path, file, embeds)
    if not _shifted(path):
        return found
    if found.get("method", method) != method:
        raise StudioError(f"'{printable(path.name)}' holds shifts beside tokens of several rows. Choose one of both.")
    shifts = svdiff.read(path)
    kept = {key: value for key, value in shifts["params"].items() if key in ("mode_1d", "train_text_encoder")}
    return found | {"tensors": found["tensors"] | shifts["tensors"], "params": kept | {"shift_steps": 1}}


def _one(path: Path, file: Path) -> dict[str, Any]:
    found = inversion.read(file)
    if found["params"]["tokens"] > 1:
        raise StudioError(f"'{printable(path.name)}' has shifts beside a token of several rows. Choose one of both.")
    return found | {"params": {}}


def _several(path: Path, file: Path, embeds: dict[str, Tensor]) -> dict[str, Any]:
    import torch

    if len({rows.shape[-1] for rows in embeds.values()}) > 1:
        raise StudioError(f"The tokens of '{printable(file.name)}' are of different widths. Choose another file.")
    counts = {len(rows) for rows in embeds.values()}
    if len(counts) > 1:
        raise StudioError(
            f"'{printable(path.name)}' holds no tokens of several subjects, equally many rows each. Choose another."
        )
    notes = inversion.noted(file)
    said = concept_noted(notes)
    if set(said.get("subjects", ())) != set(embeds):  # somebody else wrote or changed it
        notes, said = {}, {}
    tokens = said.get("subjects") or sorted(embeds, key=_counted)  # a safetensors file keeps no order
    found: dict[str, Any] = {"tensors": {inversion.KEYS[0]: torch.cat([embeds[token] for token in tokens])}}
    each = counts.pop()
    if each > 1 or notes.get("attune_method") == inversion.method:
        params = {"tokens": each, "with_noun": inversion.with_noun_noted(notes)}
        found |= {"method": inversion.method, "params": params}
    return {"params": {}, "name": path.stem} | found | said | {"subjects": tokens}


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
