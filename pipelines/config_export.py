"""What a picture is painted from, as a guidance file that Cones 2 and its forks read: the inverse of `configs`.

    <folder>/guidance.json     one element, with paths relative to the folder
    <folder>/layout.png        768 x 768, a colour for each region on white
    <folder>/residuals/*.pt    one bare tensor for each subject, its strength multiplied in

A prompt's `<name>` becomes its noun, for their prompts are of ordinary words, and a subject stands at the number of its
noun's first token. Seeds, steps, scheduler, size, the negative prompt, the guidance ramp, trimmed prompts and the start
noise have no place in the file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.errors import StudioError
from pipelines.files import make_folder, printable, write_atomic, write_json
from pipelines.formats.cones import write_rows
from pipelines.formats.cones_config import SIZE, plain_name
from pipelines.layout import Region, bind
from pipelines.text import covered
from pipelines.tokens import find_word

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.concept import Trained
    from pipelines.model import Model
    from pipelines.request import Request
    from pipelines.text import Tokenized

FILE, LAYOUT, RESIDUALS = "guidance.json", "layout.png", "residuals"
OFF = {"guidance_weight": 0.0, "weight_negative": -1e8, "color_context": {}}  # without a layout
_LEVELS = (255, 0, 192, 96, 160, 32, 224)


@dataclass
class Written:
    """The files, and sentences about what the configuration could not hold."""

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_config(
    folder: Path, model: Model, request: Request, concepts: Sequence[tuple[Trained, float]] = ()
) -> Written:
    """The configuration of a request in the new folder `folder`; the concepts are residuals at their strengths.

    StudioError for a concept of another method, for words that the prompt doesn't have, and when the folder has one.
    """
    from pipelines.attach import attached

    if (folder / FILE).exists():
        raise StudioError(f"{folder / FILE} is already there. Choose another folder.")
    for trained, _ in concepts:
        if trained.concept.method != "residual":
            raise StudioError(
                f"A guidance file holds residuals only, and '{printable(trained.concept.name)}' was learned by "
                f"{trained.concept.method}. Leave it out, or use pictures made with residuals alone."
            )
    made = Written()
    with attached(model, concepts):
        prompt = model.tokenize(request.prompt)
        subjects = _subjects(request, prompt)
        regions, drawing = _regions(request, prompt, made)
    rows = {name: values for name, _, values in subjects}
    paths = _paths(rows)
    content = {
        "prompt": prompt.text,
        "residual_dict": {name: f"{RESIDUALS}/{path}" for name, path in paths.items()},
        "layout": LAYOUT,
        "subject_list": [[name, at] for name, at, _ in subjects],
    }
    make_folder(folder / RESIDUALS)
    for name, path in paths.items():
        write_rows(folder / RESIDUALS / path, rows[name])
    write_atomic(folder / LAYOUT, drawing)
    write_json(folder / FILE, [content | regions])
    made.files = [folder / FILE, folder / LAYOUT, *(folder / RESIDUALS / path for path in paths.values())]
    if request.start is not None:
        made.notes.append("The picture began as a collage; a guidance file can't say so, and begins with plain noise.")
    made.notes += [
        f"'{printable(name)}' changes {len(values)} tokens; the original reads residuals of one token only."
        for name, values in rows.items()
        if len(values) > 1
    ]
    return made


def _subjects(request: Request, prompt: Tokenized) -> list[tuple[str, int, Tensor]]:
    """(name, first token, rows at their strength) of every residual in the prompt, in its order.

    One subject that stands there with several strengths, or twice at a token, gets a name for each.
    """
    import torch

    found: list[tuple[str, int, Tensor]] = []
    for span in prompt.spans:
        rows, where = span.expansion.rows, covered(prompt, *span.noun)
        if rows is not None and not callable(rows) and where:
            found.append((span.token.strip("<>"), where[0], (rows * span.expansion.strength()).float().cpu()))
    for one in request.placed:
        found.append((one.name, one.position, torch.from_numpy(one.rows) * one.strength))
    named: dict[str, Tensor] = {}
    taken: set[tuple[str, int]] = set()  # a file names a subject but once at a token
    result = []
    for name, at, rows in found:
        own, number = name, 1
        while own in named and ((own, at) in taken or not torch.equal(named[own], rows)):
            number += 1
            own = f"{name}-{number}"
        named[own] = rows
        taken.add((own, at))
        result.append((own, at, rows))
    return result


def _regions(request: Request, prompt: Tokenized, made: Written) -> tuple[dict[str, Any], bytes]:
    """The fields about the layout, and the drawing as a PNG."""
    pixels = np.full((*SIZE, 3), 255, np.uint8)
    layout = request.layout
    if layout is None:
        steps = request.steps if request.recur else 0  # the original goes by their number when it takes steps again
        return OFF | {"guidance_steps": steps}, _png(pixels)
    colours: dict[str, list[Any]] = {}
    owned = np.zeros(SIZE, np.int64)
    for number, one in enumerate(bind(layout, prompt), start=1):
        colour = _colour(number)
        colours[",".join(map(str, colour))] = _meaning(one.region, one.tokens, prompt)
        where = _stretched(one.region)
        if (owned[where] > 0).any():
            made.notes.append(
                f"The region of '{printable(one.region.words, 40)}' covers another; a drawing shows the upper one only."
            )
        pixels[where], owned[where] = colour, number
    hidden = [region.words for number, region in enumerate(layout.regions, start=1) if not (owned == number).any()]
    if hidden:
        raise StudioError(f"The region of '{printable(hidden[0], 40)}' is covered whole. Move it, then export again.")
    if layout.mode != "strict":
        made.notes.append("Words are forbidden others' regions only: paint the file with --figure to have it so.")
    steps = request.steps if layout.steps is None else layout.steps
    steps = steps if layout.strength else 0  # or else the original would take them again
    return {
        "color_context": colours,
        "guidance_steps": steps,
        "guidance_weight": layout.strength,
        "weight_negative": layout.negative,
    }, _png(pixels)


def _meaning(region: Region, tokens: tuple[int, ...], prompt: Tokenized) -> list[Any]:
    """A colour's words and weight, and which occurrence where the words alone don't say it."""
    words = region.words
    for span in prompt.spans:
        if span.token == words.strip():
            words = prompt.text[span.noun[0] : span.noun[1]]
            tokens = tuple(position for position in tokens if position in covered(prompt, *span.noun))
            break
    if set(tokens) == set(find_word(prompt, words)):
        return [words, region.weight]
    if region.occurrence is None and words == region.words:
        return [words, region.weight]  # shared out among regions of the same words, when it is read too
    number = 0
    while not set(find_word(prompt, words, number)) & set(tokens):
        number += 1
    return [words, region.weight, number]


def _stretched(region: Region) -> Any:
    """The region on the drawing's pixels, (height, width) bool."""
    mask = region.area.mask
    rows, columns = (np.arange(side) * own // side for side, own in zip(SIZE, mask.shape, strict=True))
    return mask[np.ix_(rows, columns)]


def _colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each region, never white: red, green, blue, and so on through the levels."""
    plain = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 192, 0), (255, 0, 255), (0, 255, 255)]
    mixed = [(r, g, b) for r in _LEVELS for g in _LEVELS for b in _LEVELS if not r == g == b]
    every = plain + [colour for colour in mixed if colour not in plain]
    if number > len(every):
        raise StudioError(f"A drawing has colours for {len(every)} regions. Use fewer.")
    return every[number - 1]


def _paths(rows: Mapping[str, Tensor]) -> dict[str, str]:
    """A file for each name, safe and different also where letters' case doesn't count."""
    paths: dict[str, str] = {}
    for name in rows:
        stem, number = plain_name(name), 1
        path = f"{stem}.pt"
        while path.casefold() in {other.casefold() for other in paths.values()}:
            number += 1
            path = f"{stem}-{number}.pt"
        paths[name] = path
    return paths


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
