"""From another tool's configuration file to what `generate` takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.events import Event, Note
from pipelines.files import printable
from pipelines.formats.cones_config import LARGEST, SIZE, Config, Subject
from pipelines.layout import Layout, Region, bind, colour_areas
from pipelines.placed import Placed
from pipelines.results import make_pictures
from pipelines.sheet import write_sheet

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.concept import Trained
    from pipelines.model import Model
    from pipelines.request import Request
    from pipelines.text import Tokenized
    from pipelines.workspace import Workspace


def paint_configs(
    workspace: Workspace,
    model: Model,
    configs: Sequence[Config],
    request: Request,
    concepts: Sequence[tuple[Trained, float]] = (),
    settings: Mapping[str, Any] | None = None,
    attention: Sequence[str] = (),
    out: Path | None = None,
) -> Iterator[Iterator[Event]]:
    """A run of `make_pictures` for each configuration, one after the other; all are read before the first paints.

    `settings` are fields of the Layout to be replaced. With `out` each paints into its own folder there, called as the
    original calls it, and leaves a sheet of all its pictures.
    """
    planned = [config_request(model, config, request, settings) for config in configs]
    for config, (wanted, notes) in zip(configs, planned, strict=True):
        folder = None if out is None else out / config.folder
        yield _painted(make_pictures(workspace, model, wanted, concepts, attention, folder), notes, folder)


def _painted(events: Iterator[Event], notes: Sequence[str], folder: Path | None) -> Iterator[Event]:
    yield from (Note(note) for note in notes)
    yield from events
    if folder is not None:
        write_sheet(folder)


def config_request(
    model: Model, config: Config, request: Request, settings: Mapping[str, Any] | None = None
) -> tuple[Request, list[str]]:
    """`request` with the configuration's prompt, layout and residuals, and what the person should know about them.

    Without guided steps there is no layout, and no step is taken again, as in the original. StudioError with file and
    line for what isn't there or doesn't fit the model.
    """
    request = replace(request, prompt=config.prompt)
    prompt = model.tokenize(config.prompt)
    placed, notes = place_subjects(model, config, prompt)
    layout = _layout(config, prompt, settings or {}) if config.guidance_steps and config.guidance_weight else None
    return replace(request, layout=layout, placed=placed, recur=request.recur if layout else 0), notes


def place_subjects(model: Model, config: Config, prompt: Tokenized) -> tuple[tuple[Placed, ...], list[str]]:
    """The residuals at their tokens, and a sentence for each that is not on its subject's word."""
    width = model.encode([""]).states.shape[-1]
    read: dict[str, Tensor] = {}
    placed, notes = [], []
    for subject in config.subjects:
        if subject.name not in read:
            read[subject.name] = _residual(config, subject)
        rows = read[subject.name]
        if rows.shape[1] != width:
            raise _wrong(
                config,
                subject.line,
                f"'{printable(subject.name, 40)}' was made for text states {rows.shape[1]} wide, those of this base "
                f"have {width}. Name the --base it is for.",
            )
        position = _position(config, subject, prompt, len(rows))
        notes += _doubt(config, subject, prompt, position)
        placed.append(Placed.of(subject.name, position, rows))
    return tuple(placed), notes


def _position(config: Config, subject: Subject, prompt: Tokenized, rows: int) -> int:
    """The first token that a subject's rows are added to."""
    from pipelines.tokens import find_word

    if isinstance(subject.at, int):
        if subject.at + rows > len(prompt.ids):
            raise _wrong(
                config, subject.line, f"there is no token {subject.at}: this base reads {len(prompt.ids)}, from 0 on."
            )
        return subject.at
    try:
        tokens = find_word(prompt, subject.at, subject.occurrence)
    except StudioError as error:
        raise _wrong(config, subject.line, str(error)) from error
    if len(tokens) != rows:
        raise _wrong(
            config,
            subject.line,
            f"'{printable(subject.at, 40)}' has {len(tokens)} token(s), the file of '{printable(subject.name, 40)}' "
            f"changes {rows}. Give the words it was trained with.",
        )
    return tokens[0]


def _doubt(config: Config, subject: Subject, prompt: Tokenized, position: int) -> list[str]:
    """A warning where a token that was given by number is not the subject's word."""
    if not isinstance(subject.at, int):
        return []
    named = " ".join(re.sub(r"[\W\d_]+", " ", subject.name).split())
    own = _everywhere(prompt, [named]) or _everywhere(prompt, [colour.words for colour in config.colours])
    if position in own or not own:
        return []
    hit = f"'{printable(prompt.words[position], 40)}'" if prompt.words[position] else "no word (start, end or padding)"
    nearest = min(own, key=lambda at: (abs(at - position), at))
    return [
        f"{printable(config.file.name)}, line {subject.line}: '{printable(subject.name, 40)}' is put on token "
        f"{position}, which is {hit}; '{printable(prompt.words[nearest], 40)}' would be token {nearest}."
    ]


def _everywhere(prompt: Tokenized, words: Sequence[str]) -> set[int]:
    """All positions of words, as far as the prompt has them."""
    from pipelines.tokens import find_word

    found: set[int] = set()
    for word in words:
        try:
            found |= set(find_word(prompt, word))
        except StudioError:
            continue
    return found


def _layout(config: Config, prompt: Tokenized, settings: Mapping[str, Any]) -> Layout | None:
    """The regions; None where no colour means anything."""
    if not config.colours:
        return None
    image = _image(config)
    regions = []
    for colour in config.colours:
        try:
            area = colour_areas(image, [colour.rgb], SIZE)[colour.rgb]
            regions.append(Region(colour.words, area, colour.occurrence, colour.weight))
            bind(Layout((regions[-1],)), prompt)
        except StudioError as error:
            raise _wrong(config, colour.line, str(error)) from error
    layout = Layout(tuple(regions), config.guidance_weight, config.guidance_steps, config.weight_negative)
    layout = replace(layout, **settings)
    try:
        layout.check()
    except StudioError as error:
        raise config.wrong("weight_negative", str(error)) from error
    return layout


def _image(config: Config) -> Any:
    from PIL import Image

    path = _found(config, config.layout, config.lines["layout"])
    try:
        with Image.open(path) as image:
            if image.width * image.height > LARGEST:
                raise config.wrong(
                    "layout", f"the layout has {image.width} x {image.height} pixels. Use a smaller one."
                )
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise config.wrong("layout", f"'{printable(path.name)}' is no readable picture.") from error


def _residual(config: Config, subject: Subject) -> Tensor:
    """(tokens, width) fp32, from the original's file or from safetensors with one tensor."""
    from pipelines.formats import cones
    from pipelines.intake import load_tensors

    path = _found(config, config.residuals[subject.name], subject.line)
    try:
        if path.suffix == ".safetensors":
            tensors = load_tensors(path)[0]
            found = tensors if len(tensors) != 1 else next(iter(tensors.values()))
            rows: Tensor = cones.as_rows(found, f"'{printable(path.name)}'")
        else:
            (rows,) = cones.read(path)["tensors"].values()
    except StudioError as error:
        raise _wrong(config, subject.line, str(error)) from error
    return rows


def _found(config: Config, name: str, line: int) -> Path:
    """A file of the configuration: beside it, or else where the program runs."""
    for path in (config.file.parent / name, Path(name)):
        if path.is_file():
            return path
    raise _wrong(
        config, line, f"there is no file '{printable(name)}'. Paths count from the configuration's own folder."
    )


def _wrong(config: Config, line: int, problem: str) -> StudioError:
    return StudioError(f"{printable(config.file.name)}, line {line}: {problem}")
