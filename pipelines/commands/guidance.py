"""`guidance`: what a picture was painted from, as a guidance file of Cones 2."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.arguments import Parser, add_base, add_workspace, command, open_base, open_workspace
from pipelines.commands.terminal import Terminal
from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.request import Request

EXAMPLE = """example:
  python -m pipelines generate "<my-cat> beside <my-dog>" --concept my-cat --concept my-dog \\
      --region "<my-cat>=0,0,0.5,1" --region "<my-dog>=0.5,0,1,1" --out pictures
  python -m pipelines guidance pictures/0001.png --out beside
  python -m pipelines generate --config beside/guidance.json

The concepts of the picture must be residuals. The folder has everything the file names."""


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "guidance", "write what a picture was painted from as a guidance file of Cones 2")
    parser.epilog = EXAMPLE
    parser.add_argument("picture", type=Path, metavar="PNG", help="a picture that Attune made")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where to write; a new folder")
    add_base(parser)
    add_workspace(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.config_export import write_config
    from pipelines.library import Library
    from pipelines.recipe import again

    wanted = again(options.picture)
    concepts = wanted.find_concepts(Library(open_workspace(options)))
    where = options.base or wanted.base["id"]
    if not options.base and where != "toybox" and "/" not in where:
        raise StudioError(f"The picture was made on the base '{where}'. Say where that is: --base FOLDER.")
    model = open_base(options, terminal, where)
    wanted.check(model)
    made = write_config(options.out, model, wanted.request, concepts)
    paint = shlex.join(["generate", "--config", str(made.files[0]), "--base", where, *_settings(wanted.request)])
    terminal.result(
        {"files": [str(path) for path in made.files], "notes": made.notes, "command": paint},
        *made.notes,
        f"{made.files[0]} is written. Paint it: python -m pipelines {paint}",
    )


def _settings(request: Request) -> list[str]:
    """What of a request the file can't say, as arguments of `generate`."""
    layout = request.layout
    again = request.recur if layout is None or layout.guides(0) else 0
    said = ["--seed", str(request.seeds[0]), "--count", str(len(request.seeds)), "--steps", str(request.steps)]
    said += ["--scheduler", request.scheduler, "--guidance", repr(float(request.scale)), "--recur", str(again)]
    said += ["--width", str(request.width), "--height", str(request.height), "--batch", str(request.batch)]
    said += ["--negative", request.negative] if request.negative is not None else []
    said += ["--figure"] if layout is not None and layout.mode == "figure" else []
    return said + [f"--{name}" for name in ("ramp", "trim") if getattr(request, name)]
