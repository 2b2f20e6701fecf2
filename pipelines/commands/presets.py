"""`presets`: the methods and their named settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipelines.commands.arguments import Parser, add_workspace, command, open_workspace, own_presets
from pipelines.commands.terminal import Terminal


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "presets", "the methods and their named settings")
    parser.add_argument("method", nargs="?", help="only this method's")
    add_workspace(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.methods import get_method
    from pipelines.preset import presets

    if options.method:
        get_method(options.method)
    found = presets(options.method, own_presets(open_workspace(options)))
    data = [
        {
            "method": preset.method,
            "name": preset.name,
            "title": preset.title,
            "bases": list(preset.bases),
            "params": preset.params.model_dump(),
        }
        for preset in found
    ]
    lines = [f"{preset.method:<12} {preset.name:<16} {_bases(preset.bases):<16} {preset.title}" for preset in found]
    terminal.result(data, *lines)


def _bases(bases: Sequence[str]) -> str:
    return ", ".join(bases) or "any base"
