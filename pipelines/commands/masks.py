"""`masks`: where a thing is in each photo of a folder, as mask files beside the photos."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import (
    Parser,
    add_base,
    add_workspace,
    command,
    open_base,
    open_workspace,
    usable_device,
)
from pipelines.commands.terminal import Terminal
from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pipelines.marks import Given
    from pipelines.mask_files import Wish

SURE = 0.2  # of a detector in photos, as MuDI
EXAMPLE = """examples:
  python -m pipelines masks photos --noun cat
  python -m pipelines masks photos --noun cat --name my-cat --noun house --name my-house
  python -m pipelines masks photos --noun cat --detector toybox --metadata sks
  python -m pipelines masks photos --noun dog --detector OWLV2 --segmenter sam_vit_h_4b8939.pth
  python -m pipelines masks photos --click cat.png:120,80 --box dog.png:40,30,200,180
  python -m pipelines masks photos --by attention --line cat.png:40,30,90,60 --away cat.png:10,10
  python -m pipelines masks photos --discover

Words are found by the base's own attention or, with --detector, by a detector whose boxes Segment Anything cuts out.
Marks say where a thing is in one photo, in its pixels, and go before the detector. Without a detector only marked
photos get masks. Of several things of one noun the surest one is masked.

One noun gives x-masklabel.png beside each photo x.png, several give x-masklabel-NAME.png each. White is the subject.
Masks that a person made or painted over are never replaced, unless with --overwrite."""

_MARKS = {
    "click": "a place that is on it; repeatable",
    "away": "a place that is not on it, beside a click, line or box; repeatable",
    "line": "a stroke along it; more points may follow; repeatable",
    "box": "left, top, right, bottom around it",
}


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "masks", "find what a word or a mark means in photos, and write masks")
    parser.epilog = EXAMPLE
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with the photos")
    parser.add_argument("--noun", action="append", default=[], help="the ordinary word for it: cat; repeatable")
    parser.add_argument("--name", action="append", default=[], help="what its masks are called (default: the noun)")
    parser.add_argument("--discover", action="store_true", help="find things without a word; they are named thing1 ...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the photos)")
    parser.add_argument("--soft", action="store_true", help="grey where it is unsure, rather than black and white")
    parser.add_argument("--overwrite", action="store_true", help="replace masks that a person made, too")
    parser.add_argument(
        "--metadata",
        metavar="WORDS",
        help="write MuDI's metadata.jsonl as well; WORDS are a rare word for each noun, as 'sks hta'",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of attention; see below"
    )
    _add_found(parser)
    _add_marks(parser)
    add_base(parser)
    add_workspace(parser)
    if {"-h", "--help"} & set(argv) and "masks" in argv:
        parser.epilog = EXAMPLE + "\n\n" + _settings()
    parser.set_defaults(run=run)


def _add_found(parser: Parser) -> None:
    group = parser.add_argument_group("a detector and Segment Anything")
    group.add_argument("--detector", metavar="WHICH", help="toybox, or an OWLv2 model by Hub id or folder")
    group.add_argument("--threshold", type=float, help=f"how sure the detector must be, 0 to 1 (default: {SURE})")
    group.add_argument(
        "--margin",
        type=float,
        help="how much larger its boxes are made, as a share of the photo (default: 0.05)",
    )
    group.add_argument(
        "--segmenter", default="", metavar="PATH", help="sam_vit_b, _l or _h (default, on Toybox alone: its own)"
    )


def _add_marks(parser: Parser) -> None:
    from pipelines.marks import KINDS

    group = parser.add_argument_group(
        "marks in a photo, in its pixels; NAME= before FILE where there are several things"
    )
    for kind, about in _MARKS.items():
        group.add_argument(
            f"--{kind}", action="append", default=[], metavar=f"[NAME=]FILE:{KINDS[kind]}", help=about, dest=kind
        )
    group.add_argument(
        "--by", choices=("segmenter", "attention"), help="what makes a mask of marks (default: segmenter)"
    )


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    given = _given(options)
    _check(options, bool(given))
    from pipelines.mask_files import Wish

    wish = Wish(
        folder=options.folder,
        nouns=tuple(options.noun),
        names=tuple(options.name),
        out=options.out,
        soft=options.soft,
        overwrite=options.overwrite,
        settings=tuple(options.set),
        discover=options.discover,
        cache=open_workspace(options).root / "masks",
    )
    wish.check()
    subjects = _subjects(options, wish)
    report = terminal.watch(_work(options, wish, given, terminal))
    made = []
    if options.metadata is not None:
        from pipelines.mask_metadata import write_metadata

        made = [str(write_metadata(wish.folder, subjects, report.get("boxes", {})))]
    kept = f"; {len(report['kept'])} that a person made are kept" if report["kept"] else ""
    said = f"{len(report['written'])} masks are in {options.out or options.folder}{kept}."
    terminal.result(report | ({"metadata": made[0]} if made else {}), said, *made)


def _check(options: argparse.Namespace, marked: bool) -> None:
    """StudioError for what excludes each other."""
    if options.discover and (options.noun or marked or options.detector):
        raise StudioError("--discover looks for things without words or marks. Leave the others out, one of the two.")
    if options.detector and not options.noun:
        raise StudioError("A detector looks for words. Say which: --noun cat.")
    if not (options.noun or options.discover or marked):
        raise StudioError(
            "Name what to look for with --noun, mark it with --click or --box, or let --discover find it."
        )
    if options.noun and options.name and len(options.name) != len(options.noun):
        raise StudioError(f"There are {len(options.noun)} nouns but {len(options.name)} names. Give each noun a name.")
    if options.detector and options.by == "attention":
        raise StudioError("A detector's boxes go to Segment Anything. Leave --by attention out, or the detector.")
    if options.by == "segmenter" and not (options.detector or marked):
        raise StudioError(
            "Segment Anything knows no words. Name a --detector, or mark the thing with --click or --box."
        )
    if options.segmenter and not (options.detector or marked):
        raise StudioError("--segmenter needs boxes or clicks. Name a --detector, or mark the thing with --click.")
    cut = bool(options.detector or (marked and options.by != "attention"))
    if cut and (options.soft or options.set):
        raise StudioError(
            "--soft and --set are for masks by attention. Leave them out, or add --by attention to marks."
        )
    if not options.detector and (options.threshold is not None or options.margin is not None):
        raise StudioError("--threshold and --margin are for a --detector. Name one, or leave them out.")
    if options.discover and (options.soft or options.name):
        raise StudioError(
            "--discover writes whole masks and names them thing1, thing2 ... Leave --soft and --name out."
        )
    if not 0 <= (options.threshold or 0) <= 1:
        raise StudioError(f"A threshold of {options.threshold:g} is out of range. Choose 0 to 1; 0.2 is usual.")


def _given(options: argparse.Namespace) -> list[Given]:
    from pipelines.marks import Given

    return [Given(kind, text) for kind in _MARKS for text in getattr(options, kind)]


def _subjects(options: argparse.Namespace, wish: Wish) -> Any:
    """What the metadata will speak of; checked before anything is looked at."""
    if options.metadata is None:
        return None
    from pipelines.mask_metadata import check_metadata, phrases

    if not wish.nouns:
        raise StudioError("--metadata says what the photos show. Name it with --noun.")
    if wish.out is not None and wish.out.resolve() != wish.folder.resolve():
        raise StudioError("--metadata lies beside photos and masks. Leave --out out.")
    check_metadata(wish.folder, wish.overwrite)
    return phrases(wish.nouns, wish.files(), options.metadata)


def _work(options: argparse.Namespace, wish: Wish, given: list[Given], terminal: Terminal) -> Any:
    """The events of the way that was asked for."""
    if options.detector or (given and options.by != "attention"):
        return _segmented(options, wish, given, terminal)
    model = open_base(options, terminal)
    if given:
        from pipelines.seed_masks import seeded_masks

        return seeded_masks(model, wish, given)
    from pipelines.mask_files import discovered_masks, noun_masks

    return (discovered_masks if options.discover else noun_masks)(model, wish)


def _segmented(options: argparse.Namespace, wish: Wish, given: list[Given], terminal: Terminal) -> Any:
    from pipelines.evaluate.eyes import detector
    from pipelines.marked_masks import MARGIN, Finder, segmented_masks
    from pipelines.segmenter import check_segmenter, load_segmenter

    check_segmenter(options.segmenter, options.base or ("" if options.detector else "toybox"), options.detector or "")
    device, finder = usable_device(options), None
    if options.detector:
        sure = SURE if options.threshold is None else options.threshold
        seer = detector(options.detector, threshold=sure, device=device)
        finder = Finder(seer, MARGIN if options.margin is None else options.margin)
        finder.check()
    terminal.say("Loading Segment Anything ...")
    return segmented_masks(load_segmenter(options.segmenter, device), wish, given, finder)


def _settings() -> str:
    from pipelines.attention.discover import DiscoverParams
    from pipelines.masks import MaskParams
    from pipelines.settings import fields

    def lines(params: type[BaseModel]) -> list[str]:
        return [f"  {field.name:<12} {field.help} [{field.range()}]" for field in fields(params) if field.range()]

    lead = "settings, for --set KEY=VALUE (default: what suits the base):"
    return "\n".join([lead, *lines(MaskParams), "with --discover:", *lines(DiscoverParams)])
