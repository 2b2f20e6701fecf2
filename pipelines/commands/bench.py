"""`bench`: how fast this machine is, always as a ratio to a reference measured in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipelines.commands.arguments import Parser, add_base, command, open_base
from pipelines.commands.terminal import Terminal


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "bench", "measure speed against references, in one run")
    parser.add_argument("names", nargs="*", help="which benches (default: all)")
    add_base(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.bench import bench
    from pipelines.benches import get_bench

    for name in options.names:
        get_bench(name)
    found = terminal.watch(bench(options.names or None, open_base(options, terminal)))
    lines = [
        f"{name:<16} {result['ratio']:.3f}   {result['ours']:.3g} / {result['reference']:.3g} s   {result['runs']} runs"
        for name, result in found.items()
    ]
    terminal.result(found, *lines)
