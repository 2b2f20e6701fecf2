"""MuDI's LoRA: `pytorch_lora_weights.safetensors` of several subjects, with the data's `metadata.jsonl` beside it.

    <output_dir>/pytorch_lora_weights.safetensors     and  <output_dir>/save-<step>/pytorch_lora_weights.safetensors
    <output_dir>/metadata.jsonl                       {"id": {"a": "olis blue drink can", "b": "hta red monster plush"}}

The weights are a LoRA as `lora` reads it. Who is in it stands in the first line of `metadata.jsonl`, copied from the
data set; without that file nothing tells a LoRA of MuDI from any other. Read: the output folder, whose final weights
count, or those of the latest step where there are none yet, or a `save-<step>` folder. Written: the weights, with the
scale folded in, and a `metadata.jsonl` of that one line, with the names as ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.concept import Subject, Trained
from pipelines.errors import StudioError
from pipelines.files import write_atomic
from pipelines.formats import lora
from pipelines.formats.mudi import FILE, read_phrases, words_of

method = "segmix"
title = "MuDI's LoRA with its metadata.jsonl"


def detect(path: Path) -> bool:
    """A folder with low-rank weights and MuDI's metadata in it, or in the folder above a `save-<step>`."""
    return path.is_dir() and _weights(path) is not None and _metadata(path) is not None


def read(path: Path) -> dict[str, Any]:
    """The factors, and the subjects with their rare words. StudioError when either file is broken."""
    weights, metadata = _weights(path), _metadata(path)
    if weights is None or metadata is None:
        raise StudioError(f"There is no {lora.FILE} with a {FILE} in '{path.name}'. Choose MuDI's output folder.")
    found = lora.read(weights)
    phrases, where = read_phrases(metadata)
    subjects, rare = words_of(phrases, where)
    noted = tuple(map(Subject, found.get("subjects", ()), found.get("nouns", ())))
    if phrases == _phrases(noted, found["params"].get("rare_word", "")):  # ours, which need no rare words
        subjects, rare = noted, found["params"]["rare_word"]
    params = {name: value for name, value in found["params"].items() if name != "tune"} | {"rare_word": rare}
    named = {"subjects": [one.token for one in subjects], "nouns": [one.noun for one in subjects]}
    return {key: found[key] for key in ("tensors", "name", "base") if key in found} | {"params": params} | named


def write(path: Path, trained: Trained) -> list[Path]:
    """Both files in the folder `path`. StudioError when one is there already."""
    if (path / FILE).exists():
        raise StudioError(f"{path / FILE} is already there. Choose another folder.")
    phrases = _phrases(trained.concept.subjects, str(trained.concept.params.get("rare_word", "")))
    written = lora.write(path, trained)
    write_atomic(path / FILE, (json.dumps({"id": phrases}, ensure_ascii=False) + "\n").encode())
    return [*written, path / FILE]


def _phrases(subjects: Sequence[Subject], rare: str) -> dict[str, str]:
    """What the subjects are called, by id."""
    words = [*rare.split(), *[""] * len(subjects)]
    return {
        subject.token.strip("<>"): f"{word} {subject.noun}".strip()
        for subject, word in zip(subjects, words, strict=False)
    }


def _weights(path: Path) -> Path | None:
    """The folder of the weights: `path` itself, or that of its latest step."""
    steps = [folder for folder in path.glob("save-*") if re.fullmatch(r"save-\d+", folder.name, re.ASCII)]
    latest = sorted(steps, key=lambda folder: int(folder.name[5:]), reverse=True)
    return next((folder for folder in [path, *latest] if (folder / lora.FILE).is_file()), None)


def _metadata(path: Path) -> Path | None:
    above = [path.parent] if path.name.startswith("save-") else []
    return next((folder / FILE for folder in [path, *above] if (folder / FILE).is_file()), None)
