"""`bench`: how fast this machine is, always as a ratio to a reference measured in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipelines.commands.arguments import Parser, command
from pipelines.commands.terminal import Terminal


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "bench", "measure speed against references, in one run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.bench import bench

    found = terminal.watch(bench())
    lines = [
        f"{name:<16} {result['ratio']:.3f}   {result['ours']:.3g} / {result['reference']:.3g} s   {result['runs']} runs"
        for name, result in found.items()
    ]
    terminal.result(found, *lines)
