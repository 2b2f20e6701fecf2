"""The command line: the same engine and the same events as the app.

Exit codes: 0 done, 1 a bug (with a traceback), 2 something you can put right (one sentence), 130 stopped.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from pipelines.commands import NAMES
from pipelines.commands.arguments import Parser
from pipelines.commands.terminal import Stopped, Terminal
from pipelines.errors import StudioError

FIXABLE = {
    errno.ENOSPC: "The disk is full. Free some space, then run the same command again.",
    errno.EDQUOT: "Your disk quota is used up. Free some space, then run the same command again.",
    errno.EROFS: "The disk is read-only. Name another place with --workspace or --out.",
    errno.EACCES: "Permission denied: {file}. Name another place with --workspace or --out, or change its rights.",
}


def build_parser(argv: Sequence[str]) -> Parser:
    """Every command; `argv` only lets a command's --help speak of what is already named there."""
    parser = Parser(prog="python -m pipelines", description="Attune on the command line.")
    parser.add_argument("--verbose", action="store_true", help="log what the engine does")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in NAMES:
        importlib.import_module(f"pipelines.commands.{name}").add(commands, argv)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; only bugs raise."""
    argv = sys.argv[1:] if argv is None else list(argv)
    terminal = Terminal(as_json="--json" in argv)
    if "--verbose" not in argv:  # the libraries' own remarks are for whoever asks for them
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        options = build_parser(argv).parse_args(argv)
        logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
        options.run(options, terminal)
    except StudioError as error:
        terminal.fail(str(error), "error: ")
        return 2
    except Stopped as stopped:
        terminal.fail(str(stopped))
        return 130
    except KeyboardInterrupt:
        terminal.fail("Interrupted.")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `... list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        terminal.fail(FIXABLE[error.errno].format(file=error.filename), "error: ")
        return 2
    return 0


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    """Under --json a bug, too, is one JSON object; its traceback goes to the error stream as always."""
    print(json.dumps({"error": f"This is a bug in Attune: {kind.__name__}: {error}"}))
    sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    if "--json" in sys.argv:
        sys.excepthook = _report_bug
    sys.exit(main())
