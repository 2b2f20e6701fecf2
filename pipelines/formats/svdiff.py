"""SVDiff's published files: `spectral_shifts.safetensors` and, where the text encoder learned, `..._te.safetensors`.

Their keys are module paths with ".delta" after them, their values 1-D fp32 shifts (svdiff-pytorch 0.2, which knows SD 1
and 2). The text side's paths begin with "text_model.". A second text encoder (SDXL) goes to `..._te_2.safetensors`,
which is ours alone. Norms have one number each (the released code) or one per channel (the paper); the shapes tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.captions import caption, class_prompt
from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import make_folder, printable, save_tensors
from pipelines.formats.several import subjects_note, subjects_noted

method = "svdiff"
title = "SVDiff spectral shifts"

# our name for a part, its file, and what stands before its paths there
_PARTS = (
    ("unet.", "spectral_shifts.safetensors", ""),
    ("text_encoder.", "spectral_shifts_te.safetensors", "text_model."),
    ("text_encoder_2.", "spectral_shifts_te_2.safetensors", "text_model."),
)
_KEY = ".delta"
_EXTRA = "position_ids"  # a buffer that older versions of transformers saved with the shifts
_HEADER_LIMIT = 4 * 1024 * 1024  # bytes; the real ones have about 50 KB
_SIZE_LIMIT = 256 * 1024 * 1024
_MESSAGE = "Choose the folder or the file that SVDiff wrote, or take it from its source again."


def detect(path: Path) -> bool:
    """A folder with a spectral_shifts file, or a safetensors file whose keys end in ".delta"."""
    if path.is_dir():
        return any((path / file).is_file() for _, file, _ in _PARTS)
    keys = _keys(path)
    return bool(keys) and all(_known(key) for key in keys)


def read(path: Path) -> dict[str, Any]:
    """The shifts under our names ("unet.conv_in.delta"), and the settings that their shapes and metadata tell.

    `path` is a folder or one of the files; given the UNet's, the others beside it are taken too. StudioError when
    nothing is there or a file is broken or holds something else.
    """
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for prefix, file, wrapper in _files(path):
        content, metadata = _load(file)
        notes |= metadata
        for key, values in content.items():
            if not key.endswith(_EXTRA):
                tensors[prefix + key.removeprefix(wrapper)] = values.float()
    if not tensors:
        raise StudioError(f"'{printable(path.name)}' holds no spectral shifts. {_MESSAGE}")
    params: dict[str, Any] = {
        "mode_1d": _mode(tensors),
        "train_text_encoder": any(not key.startswith("unet.") for key in tensors),
    }
    if "rare_word" in notes:  # an empty one is a choice too
        params["rare_word"] = notes["rare_word"]
    return {"tensors": tensors, "params": params} | _described(notes)


def write(path: Path, trained: Trained) -> list[Path]:
    """The published files in the folder `path`, with metadata that says where they come from.

    StudioError when one is there already.
    """
    written: list[Path] = []
    make_folder(path)
    for prefix, file, wrapper in _PARTS:
        shifts = {
            wrapper + key.removeprefix(prefix): values.float()
            for key, values in trained.tensors.items()
            if key.startswith(prefix)
        }
        if shifts and (path / file).exists():
            raise StudioError(f"{path / file} is already there. Choose another folder.")
        if shifts:
            save_tensors(path / file, shifts, _metadata(trained))
            written.append(path / file)
    return written


def _files(path: Path) -> list[tuple[str, Path, str]]:
    """(our prefix, file, wrapper) of every file to read."""
    folder = path if path.is_dir() else path.parent
    found = [(prefix, folder / file, wrapper) for prefix, file, wrapper in _PARTS if (folder / file).is_file()]
    if path.is_dir() or path.name == _PARTS[0][1]:
        if not found:
            raise StudioError(f"'{printable(path.name)}' has no {_PARTS[0][1]}. {_MESSAGE}")
        return found
    named = [part for part in found if part[1].name == path.name]
    if named:
        return named
    text = any(key.startswith(_PARTS[1][2]) for key in _keys(path))  # a renamed file
    prefix, _, wrapper = _PARTS[1 if text else 0]
    return [(prefix, path, wrapper)]


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > _SIZE_LIMIT:
            raise StudioError(f"'{printable(path.name)}' is far too large for spectral shifts. {_MESSAGE}")
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise StudioError(f"'{printable(path.name)}' can't be read: {printable(error)}. {_MESSAGE}") from error
    for key, values in content.items():
        if not _known(key):
            raise StudioError(f"'{printable(path.name)}' holds '{printable(key)}', which is no shift. {_MESSAGE}")
        if key.endswith(_KEY) and (values.ndim != 1 or not values.is_floating_point() or not values.isfinite().all()):
            raise StudioError(f"The shifts '{printable(key)}' of '{printable(path.name)}' are broken. {_MESSAGE}")
    return content, metadata


def _known(key: str) -> bool:
    return key.endswith((_KEY, _EXTRA))


def _keys(path: Path) -> list[str]:
    """The names in a safetensors header, read without its tensors; [] when it is something else."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _HEADER_LIMIT:
                return []
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError):
        return []
    return [key for key in header if key != "__metadata__"] if isinstance(header, dict) else []


def _mode(tensors: dict[str, Tensor]) -> str:
    norms: Iterable[Tensor] = [values for key, values in tensors.items() if "norm" in key.split(".")[-2]]
    return "element" if any(len(values) > 1 for values in norms) else "scalar"


def _metadata(trained: Trained) -> dict[str, str]:
    concept = trained.concept
    params = concept.params
    known = {
        "format": "attune",
        "base_model": concept.base_model.get("id", ""),
        "base_fingerprint": concept.base_model.get("fingerprint", ""),
        "name": concept.name,
        "noun": concept.subjects[0].noun if concept.subjects else "",
        "mode_1d": _mode(trained.tensors),
        "trained_subset": params.get("layers", "all"),
        "rare_word": params.get("rare_word", ""),
        "seed": concept.seed,
    }
    if concept.subjects:
        subject = concept.subjects[0]
        named = f"{params.get('rare_word', '').split(' ')[0]} {subject.noun}".strip()
        known["instance_prompt"] = caption(None, concept.subjects[:1]).replace(subject.token, named)
        known["class_prompt"] = class_prompt(subject)
    known |= {key: params[key] for key in ("steps", "lr", "lr_1d") if key in params}
    return {key: str(value) for key, value in known.items()} | subjects_note(concept)


def _described(notes: dict[str, str]) -> dict[str, Any]:
    """What our own metadata tells beyond the shifts."""
    if notes.get("format") != "attune":
        return {}
    found: dict[str, Any] = {key: notes[key] for key in ("name", "noun") if notes.get(key)}
    if notes.get("base_fingerprint"):
        found["base"] = {"id": notes.get("base_model", ""), "fingerprint": notes["base_fingerprint"]}
    return found | subjects_noted(notes)
