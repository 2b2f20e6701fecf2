"""The studio in a browser: `python app.py`, or `python app.py --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines import StudioError
from studio.serve import Address, serve


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Attune: teach a base model your own things.")
    parser.add_argument("--workspace", type=Path, help="your things (default: $STUDIO_HOME or ./workspace)")
    parser.add_argument(
        "--base", default="toybox", help="base model: toybox, a Hub id, a folder or a .safetensors file"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine only)")
    parser.add_argument("--listen", action="store_true", help="serve the whole network; asks for a password")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="the login (default: $ATTUNE_AUTH)")
    parser.add_argument("--port", type=int, default=7860, help="the next free one is taken if it is busy")
    parser.add_argument("--inbrowser", action="store_true", help="open it in your browser")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    host = "0.0.0.0" if options.listen else options.host
    try:
        serve(Address(host, options.port, options.auth, options.inbrowser), options.workspace, options.base)
    except StudioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
