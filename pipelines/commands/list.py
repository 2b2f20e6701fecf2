"""`list`: the concepts in the library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import Parser, add_workspace, command, open_workspace
from pipelines.commands.terminal import Terminal

if TYPE_CHECKING:
    from pipelines.concept_folder import Entry

NONE = "No concepts here yet. Learn one: python -m pipelines train --help"


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    add_search(command(commands, "list", "the concepts in the library"))


def add_search(parser: Parser) -> None:
    parser.add_argument("words", nargs="*", help="only those with these words in their name, noun, method or base")
    add_workspace(parser)
    parser.set_defaults(run=search)


def search(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.library import Library

    library, words = Library(open_workspace(options)), " ".join(options.words)
    found = library.entries(words)
    for id, reason in library.broken().items():
        terminal.say(f"left out: {id}: {reason}")
    nothing = f"No concept has '{words}'." if words else NONE
    terminal.result([as_json(entry) for entry in found], *([line(entry) for entry in found] or [nothing]))


def as_json(entry: Entry) -> dict[str, Any]:
    """A concept and where it lies."""
    return entry.concept.to_json() | {"id": entry.id, "bytes": entry.size}


def line(entry: Entry) -> str:
    """A concept in one line."""
    concept = entry.concept
    subjects = ", ".join(f"{subject.token} = {subject.noun}" for subject in concept.subjects)
    return f"{concept.name:<24} {concept.method:<12} {subjects:<32} {concept.base_model.get('id') or 'unknown base'}"
