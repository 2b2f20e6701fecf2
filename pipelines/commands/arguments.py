"""Arguments that several commands share, and a parser whose complaints are StudioErrors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.commands.terminal import Terminal
    from pipelines.model import Model
    from pipelines.workspace import Workspace

PRECISIONS = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Raises StudioError instead of printing its usage and ending the program."""

    def error(self, message: str) -> NoReturn:
        raise StudioError(f"{message[:1].upper()}{message[1:]}. See '{self.prog} --help'.")


def command(commands: argparse._SubParsersAction[Parser], name: str, about: str) -> Parser:
    """A command that can answer in JSON."""
    parser = commands.add_parser(
        name, help=about, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the result, or the error, as JSON")
    return parser


def add_workspace(parser: Parser) -> None:
    parser.add_argument("--workspace", type=Path, help="where your things live (default: STUDIO_HOME, or ./workspace)")


def add_base(parser: Parser, config: str = "folder or Hub id with the configuration of a single-file base") -> None:
    parser.add_argument("--base", help="base model: toybox, a Hub id, a folder or a .safetensors file")
    parser.add_argument("--config", help=config)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--precision", choices=PRECISIONS, help="number format (default: what suits the device)")


def open_workspace(options: argparse.Namespace) -> Workspace:
    from pipelines.workspace import Workspace

    return Workspace(options.workspace)


def own_presets(workspace: Workspace) -> Path:
    """Where a person's own presets lie."""
    return workspace.root / "presets"


def open_base(options: argparse.Namespace, terminal: Terminal, default: str = "toybox") -> Model:
    """The base model that the options name; downloads are drawn."""
    import torch
    from transformers.utils import logging

    from pipelines.model import load_model

    logging.disable_progress_bar()  # downloads are drawn from their events
    where = options.base or default
    dtype = getattr(torch, options.precision) if options.precision else None
    check_device(options)
    terminal.say(f"Loading the base {where} ...")
    return load_model(where, device=options.device, dtype=dtype, config=options.config, progress=terminal.show)


def check_device(options: argparse.Namespace) -> None:
    """StudioError for a --device that this machine lacks."""
    if options.device and not has_device(options.device):
        raise StudioError(f"This machine has no '{options.device}'. Leave --device out to take the best there is.")


def usable_device(options: argparse.Namespace) -> str:
    """The device that was named, or the best there is."""
    from pipelines.loading import accelerator

    check_device(options)
    return options.device or accelerator()


def has_device(name: str) -> bool:
    """Whether this machine has that device; StudioError when torch knows nothing of that name."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise StudioError(f"'{name}' is not a device. Use cpu, cuda, cuda:1 or mps, or leave --device out.") from None
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())


def seed_range(text: str) -> range:
    """`3000-3009`, both ends included, or one number. StudioError for anything else."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else not last)) or len(text) > 20:
        raise StudioError(f"'{text}' is no range of subject seeds. Write it as 3000-3009.")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise StudioError(f"The range {text} is empty. Write the smaller number first, as 3000-3009.")
    return found
