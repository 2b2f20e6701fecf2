"""`base`: what a base model is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipelines.commands.arguments import Parser, add_base, command, open_base
from pipelines.commands.terminal import Terminal


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "base", "load a base model and tell what it is")
    add_base(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    model = open_base(options, terminal)
    weights = sum(
        weight.numel() for part in (model.unet, model.vae, *model.text_encoders) for weight in part.parameters()
    )
    data = {
        "id": model.id,
        "kind": model.kind,
        "fingerprint": model.fingerprint,
        "prediction": model.prediction_type,
        "size": model.native_size,
        "parameters": weights,
        "device": str(model.device),
        "precision": str(model.dtype).removeprefix("torch."),
    }
    terminal.result(data, *(f"{name:<12} {value}" for name, value in data.items()))
