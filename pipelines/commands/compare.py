"""`compare`: are all subjects in each picture, once and with their own identity? MuDI's Detect-and-Compare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.arguments import Parser, command, usable_device
from pipelines.commands.terminal import Terminal
from pipelines.errors import StudioError
from pipelines.files import printable

if TYPE_CHECKING:
    from pipelines.evaluate.comparison import Known
    from pipelines.evaluate.detect_compare import Match, Norm

EXAMPLE = """examples:
  python -m pipelines compare pictures --subject cat=photos/cat --subject dog=photos/dog --out comparison
  python -m pipelines compare pictures --subject tom:cat=photos/tom --subject max:cat=photos/max
  python -m pipelines compare pictures --subject a:can=mudi --subject b:toy=mudi --detector OWLV2 --embedder DINOV2

Every box that the detector finds is compared with the subjects' photos. Where it finds more or fewer things than there
are subjects the score is 0, and such pictures are counted apart: "one is missing" is another failing than "they are
mixed up". Toybox's own pictures are judged by its judge; for photos name an OWLv2 and a DINOv2 model, by Hub id or
folder (the paper: google/owlv2-base-patch16-ensemble at 0.4, facebook/dinov2-base or dreamsim)."""

FORMS: dict[str, Norm] = {"spectral": "spectral", "frobenius": "fro", "squared": "fro2"}


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "compare", "are all subjects in each picture, each with its own identity?")
    parser.epilog = EXAMPLE
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with the pictures to judge")
    parser.add_argument(
        "--subject",
        action="append",
        default=[],
        metavar="NAME[:NOUN]=DIR",
        help="a subject with its photos, and the noun that the detector is asked for (default: the name); repeatable",
    )
    parser.add_argument("--detector", metavar="WHICH", help="toybox, or an OWLv2 model by Hub id or folder")
    parser.add_argument(
        "--embedder", default="", metavar="WHICH", help="a DINOv2 model by Hub id or folder, or dreamsim"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.4, help="how sure the detector must be, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--form",
        choices=tuple(FORMS),
        default="spectral",
        help="norm of the difference; the released code: spectral, the paper's formula: squared (default: %(default)s)",
    )
    parser.add_argument(
        "--match", choices=("greedy", "best"), default="greedy", help="who stands for whom (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write table, page and pictures with boxes")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    named = [_named(text) for text in options.subject]
    if not named:
        raise StudioError("Name what the pictures should show: --subject NAME=DIR, with the folder of its photos.")
    if len({name for name, _, _ in named}) < len(named):
        raise StudioError("Two subjects have one name. Give each its own: --subject NAME:NOUN=DIR.")
    if not 0 <= options.threshold <= 1:
        raise StudioError(f"A threshold of {options.threshold:g} is out of range. Choose 0 to 1; 0.4 is usual.")
    device = usable_device(options)
    from pipelines.evaluate.compare_report import as_text, write_report
    from pipelines.evaluate.comparison import Known, compare, from_toybox, read_pictures, subject_photos
    from pipelines.evaluate.eyes import eyes

    notes: list[str] = []
    pictures = read_pictures(options.folder, notes)
    subjects: list[Known] = [Known(name, noun, subject_photos(folder, name, notes)) for name, noun, folder in named]
    for note in notes:
        terminal.say(note)
    if options.detector is None and (options.embedder or not from_toybox(pictures)):
        raise StudioError(
            "Toybox's judge knows only its own world, and these pictures are not known to be of it. Name a --detector "
            "and an --embedder, or --detector toybox."
        )
    seer = eyes(
        options.detector or "toybox",
        options.embedder,
        threshold=options.threshold,
        device=device,
    )
    match: Match = options.match
    found = terminal.watch(compare(seer, pictures, subjects, norm=FORMS[options.form], match=match))
    written = write_report(options.out, found) if options.out else []
    files = [str(path) for path in written]
    terminal.result(found.to_json() | {"files": files}, *as_text(found), *(f"Written: {file}" for file in files))


def _named(text: str) -> tuple[str, str, Path]:
    """`tom:cat=photos/tom` -> ("tom", "cat", photos/tom)."""
    name, equals, folder = text.partition("=")
    name, _, noun = name.partition(":")
    if not equals or not name.strip() or not folder:
        raise StudioError(f"'{printable(text)}' is no subject. Write --subject NAME=DIR, as in cat=photos/cat.")
    if not Path(folder).is_dir():
        raise StudioError(f"There is no folder '{printable(folder)}' with photos of {printable(name)}. Check the path.")
    return name.strip(), noun.strip() or name.strip(), Path(folder)
