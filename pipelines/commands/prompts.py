"""What `generate` paints: one prompt or every line of a file, each with the concepts that are its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.files import printable

if TYPE_CHECKING:
    from pipelines.concept import Concept, Trained
    from pipelines.events import Event
    from pipelines.library import Library
    from pipelines.model import Model
    from pipelines.request import Request
    from pipelines.workspace import Workspace

Cast = list[tuple["Trained", float]]


@dataclass(frozen=True)
class Line:
    """One prompt. `where` it stands is "" for the one on the command line."""

    where: str  # "prompts.txt, line 3"
    prompt: str
    concepts: Cast


def read_lines(options: argparse.Namespace, workspace: Workspace) -> list[Line]:
    """What to paint, and with whom: the concepts asked for, in every line, and those that the line names."""
    from pipelines.library import Library
    from pipelines.prompts import filled, numbered_prompts

    library, loaded = Library(workspace), dict[str, "Trained"]()
    asked = concepts_of(library, options.concept, loaded)
    chosen = [trained.concept for trained, _ in asked]
    if options.prompt_file is None:
        numbered = [("", filled(options.prompt, chosen))]
        known = library.named_in(numbered[0][1])
    else:
        known = library.concepts()
        tokens = {subject.token for concept in [*chosen, *known] for subject in concept.subjects}
        numbered = numbered_prompts(options.prompt_file, chosen, tokens)
    casts = [
        [*asked, *((_loaded(library, name, loaded), 1.0) for name in _named_in(prompt, chosen, known))]
        for _, prompt in numbered
    ]
    return [_line(where, prompt, cast, options.counted) for (where, prompt), cast in zip(numbered, casts, strict=True)]


def concepts_of(library: Library, wanted: Sequence[str], loaded: dict[str, Trained] | None = None) -> Cast:
    """Those asked for as NAME:STRENGTH. `loaded` keeps them, so that none is read twice."""
    kept = {} if loaded is None else loaded
    return [(_loaded(library, name, kept), strength) for name, strength in map(_named, wanted)]


def everyone(lines: Sequence[Line]) -> Cast:
    """The concepts of all lines, each once."""
    return list({one[0].concept.name: one for line in lines for one in line.concepts}.values())


def requests_of(options: argparse.Namespace, lines: Sequence[Line], request: Request, model: Model) -> list[Request]:
    """`request` for every line. StudioError, with its place, for one that can't be painted so."""
    from pipelines.commands.starts import read_start

    cast = [trained.concept for trained, _ in everyone(lines)]
    start = read_start(options, [line.prompt for line in lines], cast, model.native_size)
    requests = []
    for line in lines:
        with naming(line.where):
            requests.append(replace(request, prompt=line.prompt, start=start(line.prompt)))
            requests[-1].check()
    return requests


def check_lines(model: Model, lines: Sequence[Line], requests: Sequence[Request], words: Sequence[str]) -> None:
    """StudioError, with its place, for a line that the base can't paint, before any is painted. Concepts are put on
    once for all lines that have the same ones: that may take seconds."""
    from pipelines.attach import attached
    from pipelines.results import check_reading

    casts: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for number, line in enumerate(lines):
        cast = tuple((trained.concept.name, strength) for trained, strength in line.concepts)
        casts.setdefault(cast, []).append(number)
    for numbers in casts.values():
        with ExitStack() as stack:
            with naming(lines[numbers[0]].where):
                stack.enter_context(attached(model, lines[numbers[0]].concepts))
            for number in numbers:
                with naming(lines[number].where):
                    check_reading(model, requests[number], words)


def placed(line: Line, events: Iterator[Event]) -> Iterator[Event]:
    """What paints a line; its errors say where that stands."""
    with naming(line.where):
        yield from events


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Says in errors which line they are about."""
    try:
        yield
    except StudioError as error:
        if not where:
            raise
        raise StudioError(f"{where}: {error}") from error


def _line(where: str, prompt: str, cast: Cast, counted: str | None) -> Line:
    from pipelines.mixers import counted_prompt

    tokens = [subject.token for trained, _ in cast for subject in trained.concept.subjects]
    with naming(where):
        return Line(where, prompt if counted is None else counted_prompt(prompt, tokens, counted), cast)


def _named_in(prompt: str, chosen: Sequence[Concept], known: Sequence[Concept]) -> list[str]:
    """Those that the prompt names though nobody asked for them; they act at full strength, as in the app."""
    mine = {subject.token for concept in chosen for subject in concept.subjects}
    return [
        concept.name
        for concept in known
        if any(subject.token in prompt and subject.token not in mine for subject in concept.subjects)
    ]


def _loaded(library: Library, name: str, loaded: dict[str, Trained]) -> Trained:
    if name not in loaded:
        loaded[name] = library.load(name)
    return loaded[name]


def _named(text: str) -> tuple[str, float]:
    """`my-cat:0.8` -> ("my-cat", 0.8); without a number the strength is 1."""
    name, colon, number = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        raise StudioError(
            f"'{printable(number)}' is no strength. Write --concept NAME:STRENGTH with a number, as in my-cat:0.8."
        ) from None
