"""`masks`: where a noun is in each photo of a folder, as mask files beside the photos."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.commands.arguments import Parser, add_base, add_workspace, command, open_base, open_workspace
from pipelines.commands.terminal import Terminal
from pipelines.errors import StudioError

EXAMPLE = """examples:
  python -m pipelines masks photos --noun cat
  python -m pipelines masks photos --noun cat --name my-cat --noun house --name my-house
  python -m pipelines masks photos --discover

One noun gives x-masklabel.png beside each photo x.png, several give x-masklabel-NAME.png each. White is the subject."""


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "masks", "find what a word means in photos, and write masks")
    parser.epilog = EXAMPLE
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with the photos")
    parser.add_argument("--noun", action="append", default=[], help="the ordinary word for it: cat; repeatable")
    parser.add_argument("--name", action="append", default=[], help="what its masks are called (default: the noun)")
    parser.add_argument("--discover", action="store_true", help="find things without a word; they are named thing1 ...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the photos)")
    parser.add_argument("--soft", action="store_true", help="grey where it is unsure, rather than black and white")
    parser.add_argument("--overwrite", action="store_true", help="replace masks that a person made, too")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable; see below"
    )
    add_base(parser)
    add_workspace(parser)
    if {"-h", "--help"} & set(argv) and "masks" in argv:
        parser.epilog = EXAMPLE + "\n\n" + _settings()
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    if bool(options.noun) == options.discover:
        raise StudioError("Name what to look for with --noun, or let --discover find things; one of the two.")
    if options.name and len(options.name) != len(options.noun):
        raise StudioError(f"There are {len(options.noun)} nouns but {len(options.name)} names. Give each noun a name.")
    from pipelines.mask_files import Wish, discovered_masks, noun_masks

    wish = Wish(
        folder=options.folder,
        nouns=tuple(options.noun),
        names=tuple(options.name),
        out=options.out,
        soft=options.soft,
        overwrite=options.overwrite,
        settings=tuple(options.set),
        cache=open_workspace(options).root / "masks",
    )
    wish.check()
    model = open_base(options, terminal)
    report = terminal.watch((discovered_masks if options.discover else noun_masks)(model, wish))
    kept = f"; {len(report['kept'])} that a person made are kept" if report["kept"] else ""
    where = options.out or options.folder
    terminal.result(report, f"{len(report['written'])} masks are in {where}{kept}.")


def _settings() -> str:
    from pipelines.masks import MaskParams
    from pipelines.settings import fields

    found = (f"  {field.name:<12} {field.help} [{field.range()}]" for field in fields(MaskParams) if field.range())
    return "\n".join(["settings, for --set KEY=VALUE (default: what suits the base):", *found])
