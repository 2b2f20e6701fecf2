"""What `python -m pipelines toybox ...` does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import StudioError
from pipelines.events import Event


def photos(
    seeds: Sequence[int],
    out: Path,
    *,
    count: int = 5,
    background: str | None = None,
    category: str | None = None,
    prop: bool = False,
) -> dict[str, Any]:
    """Draw photos of subjects with masks and truth.json into `out`; returns the truth."""
    from pipelines.toybox.photos import Shoot, shoot, write_photos

    return write_photos(shoot(Shoot(tuple(seeds), count, background, category, prop)), out)


def judge(folder: Path) -> dict[str, Any]:
    """What is to be seen in every picture of a folder: {"pictures": [...]} in the shape of truth.json, with scores."""
    from PIL import Image

    from pipelines.toybox.judge import look

    if not folder.is_dir():
        raise StudioError(f"There is no folder {folder}. Name a folder of pictures.")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    files = [f for f in files if "-masklabel" not in f.stem]
    if not files:
        raise StudioError(f"There are no pictures in {folder}. Name a folder with PNG, JPEG or WebP files.")
    entries = []
    for file in files:
        try:
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > 40_000_000:
                    raise StudioError(f"{file.name} has more than 40 megapixels. Make it smaller.")
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise StudioError(f"{file.name} can't be read as a picture. Remove or replace it.") from error
        entries.append(look([pixels])[0].to_json(file.name))
    return {"pictures": entries}


def build(quick: bool = False) -> Iterator[Event]:
    """Train the embedded models from nothing; `quick` walks the whole path in a temporary folder."""
    from pipelines.toybox import build as works

    if not quick:
        yield from works.build()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield from works.build(Path(folder) / "state", Path(folder) / "toybox", works.QUICK)


def gates() -> Iterator[Event]:
    """Measure the shipped models against their gates."""
    from pipelines.toybox.gates import gates as measured

    yield from measured()


def quality(
    method: str, seeds: Sequence[int], preset: str | None = None, settings: Sequence[str] = (), masks: bool = False
) -> Iterator[Event]:
    """Learn each subject with a method's Toybox preset (changed by `settings`) and judge the pictures."""
    from pipelines.methods import get_method
    from pipelines.model import load_model
    from pipelines.preset import load_preset
    from pipelines.settings import parse_settings, validated
    from pipelines.toybox.quality import Trial, concept_quality

    changes = parse_settings(get_method(method).Params, list(settings))
    chosen = load_preset(method, preset, "toybox")
    params = validated(type(chosen), chosen.model_dump() | {"sample_every": 0, "checkpoint_every": 0} | changes)
    yield from concept_quality(load_model("toybox"), Trial(method, tuple(seeds), params, masks))
