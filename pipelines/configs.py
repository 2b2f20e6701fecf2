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
from pipelines.formats.cones_config import LARGEST, RECUR, SIZE, Config, Subject
from pipelines.layout import Area, Layout, Region, bind, colour_areas
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
    from pipelines.attach import attached

    with attached(model, concepts):  # prompts and colours may speak of them
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

    Concepts that the prompt names are attached when this is called. `settings` are fields of the Layout, and count
    before the file's. StudioError with file and line for what isn't there or doesn't fit the model.
    """
    given = dict(settings or {})
    Layout((Region("-", Area.box((0, 0, 1, 1), (1, 1))),), **given).check()  # not the file's fault
    try:
        prompt = model.tokenize(config.prompt)
    except StudioError as error:
        raise config.wrong("prompt", str(error)) from error
    placed, notes = place_subjects(model, config, prompt)
    steps = given.get("steps", config.guidance_steps)
    guided = bool(steps and given.get("strength", config.guidance_weight) and config.colours)
    routed = any(colour.words.strip() in model.placeholders for colour in config.colours)
    layout = _layout(config, prompt, given) if guided or routed else None
    again = guided or (layout is None and steps >= request.steps)
    notes += _unheard(config, given, guided) + _taken_once(config, request, steps, again)
    return replace(
        request, prompt=config.prompt, layout=layout, placed=placed, recur=request.recur if again else 0
    ), notes


def _unheard(config: Config, given: Mapping[str, Any], guided: bool) -> list[str]:
    """A sentence when layout settings were given to a configuration that guides nothing."""
    if guided or not given or 0 in (given.get("steps"), given.get("strength")):
        return []
    off = {
        "color_context": bool(config.colours),
        "guidance_steps": given.get("steps", config.guidance_steps),
        "guidance_weight": given.get("strength", config.guidance_weight),
    }
    field = next(field for field, value in off.items() if not value)
    state = "empty" if field == "color_context" else 0
    return [
        f"{printable(config.file.name)}, line {config.lines[field]}: '{field}' is {state}, so attention isn't led to "
        "regions, and what you said about that has no effect. Give that too."
    ]


def _taken_once(config: Config, request: Request, steps: int, again: bool) -> list[str]:
    """A sentence when the original, which goes by the number of guided steps alone, would take steps again."""
    if again or request.recur <= (0 if steps else RECUR):
        return []
    where = f"{printable(config.file.name)}, line {config.lines['guidance_steps']}"
    if not steps:
        return [f"{where}: no step is guided, so none is taken again."]
    return [
        f"{where}: steps are taken again only where attention is led to regions, or all of them; the original would "
        f"take the first {min(steps, request.steps)} again."
    ]


def place_subjects(model: Model, config: Config, prompt: Tokenized) -> tuple[tuple[Placed, ...], list[str]]:
    """The residuals at their tokens, and a sentence for each that is not on its subject's word."""
    width = model.encode([""]).states.shape[-1]
    read: dict[str, Tensor] = {}
    placed: list[Placed] = []
    notes = []
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
        if (subject.name, position) in [(one.name, one.position) for one in placed]:
            raise _wrong(
                config, subject.line, f"'{printable(subject.name, 40)}' is on token {position} twice. Leave one out."
            )
        notes += _doubt(config, subject, prompt, range(position, position + len(rows)))
        placed.append(Placed.of(subject.name, position, rows))
    return tuple(placed), notes


def _position(config: Config, subject: Subject, prompt: Tokenized, rows: int) -> int:
    """The first token that a subject's rows are added to."""
    from pipelines.tokens import find_word

    if isinstance(subject.at, int):
        if subject.at + rows > len(prompt.ids):
            changes = f"its file changes {rows} tokens, from token {subject.at} on, and " if rows > 1 else ""
            raise _wrong(
                config,
                subject.line,
                f"there is no token {max(subject.at, len(prompt.ids))}: {changes}this base reads {len(prompt.ids)}, "
                f"numbered 0 to {len(prompt.ids) - 1}. Give the number of its word.",
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


def _doubt(config: Config, subject: Subject, prompt: Tokenized, tokens: range) -> list[str]:
    """A warning where tokens that were given by number are not the subject's word, or nobody can tell."""
    if not isinstance(subject.at, int):
        return []
    own = _own(config, subject, prompt, tokens[0])
    off = [at for at in tokens if at not in own]
    if not off:
        return []
    hits = " and ".join(f"token {at}, which is {_called(prompt, at)}" for at in off[:3]) + " …" * (len(off) > 3)
    advice = "whether that is its word, the file doesn't say"
    if tokens[0] in own:
        advice = f"its file changes {len(tokens)} tokens, from token {tokens[0]} on"
    elif own:
        nearest = min(own, key=lambda at: (abs(at - tokens[0]), at))
        advice = f"'{printable(prompt.words[nearest], 40)}' would be token {nearest}"
    return [
        f"{printable(config.file.name)}, line {subject.line}: '{printable(subject.name, 40)}' is put on {hits}; "
        f"{advice}."
    ]


def _own(config: Config, subject: Subject, prompt: Tokenized, first: int) -> set[int]:
    """The positions of a subject's words: of its name ("toy_cat" is "toy cat"), else of the last part of the name that
    the prompt has ("my-cat"), else of any colour. A colour's words that begin with its own belong to it as well."""
    parts = re.sub(r"[\W\d_]+", " ", subject.name).split()
    coloured = [_everywhere(prompt, [colour.words]) for colour in config.colours]
    for words in (" ".join(parts), *reversed(parts)):
        if own := _everywhere(prompt, [words]):
            return own.union(*(one for one in coloured if first in own & one))
    return set().union(*coloured)


def _called(prompt: Tokenized, at: int) -> str:
    """What stands at a position, for a sentence."""
    if prompt.words[at]:
        return f"'{printable(prompt.words[at], 40)}'"
    end = 1 + max((place for place, word in enumerate(prompt.words) if word), default=0)
    return "the start token" if at == 0 else "the end token" if at == end else "padding"


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


def _layout(config: Config, prompt: Tokenized, settings: Mapping[str, Any]) -> Layout:
    """The regions, with `settings` instead of the file's."""
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
    try:
        for path in (config.file.parent / name, Path(name)):
            if path.is_file():
                return path
    except (OSError, ValueError) as error:
        raise _wrong(config, line, f"'{printable(name)}' can't be the path of a file. Shorten it.") from error
    raise _wrong(
        config, line, f"there is no file '{printable(name)}'. Paths count from the configuration's own folder."
    )


def _wrong(config: Config, line: int, problem: str) -> StudioError:
    return StudioError(f"{printable(config.file.name)}, line {line}: {problem}")
