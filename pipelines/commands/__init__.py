"""The command line, one file a command: `add` declares its arguments, `run` does it and returns what --json prints."""

from __future__ import annotations

NAMES = (
    "train",
    "generate",
    "evaluate",
    "compare",
    "claims",
    "masks",
    "prior",
    "guidance",
    "list",
    "library",
    "presets",
    "base",
    "bench",
    "toybox",
)
