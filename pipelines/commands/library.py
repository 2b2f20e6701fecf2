"""`library`: look at one concept, rename, delete, bring back, carry out and in."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import Parser, add_base, add_workspace, command, open_base, open_workspace
from pipelines.commands.list import add_search, as_json, line
from pipelines.commands.terminal import Terminal

if TYPE_CHECKING:
    from pipelines.library import Library

Run = Callable[[argparse.Namespace, Terminal], None]


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    about = "list, show, rename, delete, restore, export and import concepts"
    parser = commands.add_parser("library", help=about, description=about)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add_search(command(actions, "list", "the concepts in the library"))
    _action(actions, "show", "everything about one concept", show, "name")
    _action(actions, "rename", "call a concept something else", rename, "name", "new")
    _action(actions, "delete", "move a concept to the trash", delete, "name")
    _action(actions, "trash", "what is in the trash", trash)
    _action(actions, "restore", "bring a concept back from the trash", restore, "id")
    exporting = _action(actions, "export", "write a concept into one zip", export, "name")
    exporting.add_argument("out", type=Path, help="the zip to write, or a folder for it")
    exporting.add_argument("--original", action="store_true", help="the method's original files instead, into a folder")
    exporting.add_argument(
        "--as",
        dest="form",
        default="",
        metavar="FORM",
        help="another tool's form instead, into a folder: a1111 (an embedding by its file's name) or peft (an adapter)",
    )
    exporting.add_argument(
        "--base", default="", metavar="DIR", help="where the base lies, for original files that hold all its weights"
    )
    importing = _action(actions, "import", "add our zip or weights, or another tool's original file", take_in)
    importing.add_argument("file", type=Path)
    importing.add_argument("--name", default="", help="what to call it")
    importing.add_argument("--noun", default="", help="the ordinary word for it, where the file doesn't say")
    add_base(importing)


def _action(actions: Any, name: str, about: str, run: Run, *arguments: str) -> Parser:
    parser = command(actions, name, about)
    for argument in arguments:
        parser.add_argument(argument)
    add_workspace(parser)
    parser.set_defaults(run=run)
    return parser


def show(options: argparse.Namespace, terminal: Terminal) -> None:
    entry = _library(options).find(options.name)
    data = as_json(entry) | {"folder": str(entry.folder)}
    terminal.result(data, *(f"{name:<12} {value}" for name, value in data.items()))


def rename(options: argparse.Namespace, terminal: Terminal) -> None:
    concept = _library(options).rename(options.name, options.new)
    terminal.result(concept.to_json(), f"'{options.name}' is now '{concept.name}'.")


def delete(options: argparse.Namespace, terminal: Terminal) -> None:
    id = _library(options).delete(options.name)
    terminal.result(
        {"trash": id}, f"'{options.name}' is in the trash. Bring it back: python -m pipelines library restore {id}"
    )


def trash(options: argparse.Namespace, terminal: Terminal) -> None:
    found = _library(options).trashed()
    terminal.result(
        [as_json(entry) for entry in found],
        *([f"{entry.id:<48} {line(entry)}" for entry in found] or ["The trash is empty."]),
    )


def restore(options: argparse.Namespace, terminal: Terminal) -> None:
    concept = _library(options).restore(options.id)
    terminal.result(concept.to_json(), f"'{concept.name}' is back.")


def export(options: argparse.Namespace, terminal: Terminal) -> None:
    library = _library(options)
    if options.original or options.form:
        written = library.export_original(options.name, options.out, options.base, options.form)
    else:
        written = [library.export(options.name, options.out)]
    terminal.result(
        {"files": [str(path) for path in written]}, *(f"'{options.name}' is in {path}." for path in written)
    )


def take_in(options: argparse.Namespace, terminal: Terminal) -> None:
    base = None
    if options.base:
        model = open_base(options, terminal)
        base = {"id": model.id, "fingerprint": model.fingerprint, "kind": model.kind}
    concept = _library(options).add(options.file, name=options.name, noun=options.noun, base=base)
    terminal.result(concept.to_json(), f"'{concept.name}' is in the library.")


def _library(options: argparse.Namespace) -> Library:
    from pipelines.library import Library

    return Library(open_workspace(options))
