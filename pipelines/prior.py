"""Class pictures for prior preservation: what the base makes of "a photo of a cat", kept for every later run.

DreamBooth (Ruiz et al. 2023, section 3.3) learns beside the photos from pictures of the whole class, so that "cat" does
not come to mean one cat. They depend on the base, the prompt and the seed alone, and are painted once.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.captions import class_prompt
from pipelines.concept import Subject
from pipelines.events import Event, Picture, Progress, Snapshot
from pipelines.files import write_atomic
from pipelines.generate import Request, generate
from pipelines.model import Model
from pipelines.sources import ClassPicture

STAGE = "class pictures"
STEPS = 50  # DDIM, as in the released code of DreamBooth and SVDiff
TOGETHER = 4  # painted in fixed groups, since neighbours in a batch change a picture's last bits


def class_pictures(
    model: Model, subjects: Sequence[Subject], count: int, folder: Path, *, seed: int = 0, size: int = 0
) -> Generator[Event, None, list[ClassPicture]]:
    """`count` pictures (in all) of the subjects' classes with their prompts; Progress for those that must be painted.

    Subjects of one kind share its pictures out. They are kept in `folder` under (fingerprint, prompt, seed, size); more
    of them later keeps those there are. `size` is the side in pixels, 0 = the base's own.
    """
    tokens: dict[str, list[str]] = {}
    for subject in subjects:
        tokens.setdefault(class_prompt(subject), []).append(subject.token)
    prompts = list(tokens)
    size = size or model.native_size
    found: list[ClassPicture] = []
    done, each = 0, -(-count // len(prompts))
    total = sum(not path.exists() for words in prompts for path in _paths(model, words, each, folder, seed, size))
    for words in prompts:
        paths = _paths(model, words, each, folder, seed, size)
        for first in range(0, each, TOGETHER):
            group = paths[first : first + TOGETHER]
            kept = [_read(path) for path in group]
            images = [image for image in kept if image is not None]
            if len(images) < len(group):
                images = _painted(model, words, seed + first, size)
                for path, image in zip(group, images, strict=False):  # the last group may want fewer
                    write_atomic(path, _png(image))
                done += len(group)
                yield Progress(STAGE, min(done, total), max(total, done))
            for number, image in enumerate(images[: len(group)], start=first):
                found.append(ClassPicture(image, words, tokens[words][number % len(tokens[words])]))
    return found[:count]


def _painted(model: Model, words: str, seed: int, size: int) -> list[Picture]:
    request = Request(
        words,
        seeds=tuple(range(seed, seed + TOGETHER)),
        steps=STEPS,
        width=size,
        height=size,
        preview_every=0,
        batch=TOGETHER,
    )
    made = [event.image for event in generate(model, request) if isinstance(event, Snapshot)]
    return [image for image in made if image is not None]


def _paths(model: Model, words: str, count: int, folder: Path, seed: int, size: int) -> list[Path]:
    key = hashlib.sha256(f"{model.fingerprint}|{words}|{seed}|{size}|{STEPS}".encode()).hexdigest()[:24]
    (folder / key).mkdir(parents=True, exist_ok=True)
    return [folder / key / f"{number:05d}.png" for number in range(count)]


def _read(path: Path) -> Picture | None:
    """A kept picture; None when it is missing or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


def _png(image: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
