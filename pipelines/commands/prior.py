"""`prior`: class pictures with masks for prior preservation, as a folder that `train --class-data` and MuDI read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.commands.arguments import Parser, add_base, add_workspace, command, open_base, open_workspace
from pipelines.commands.terminal import Stopped, Terminal
from pipelines.errors import StudioError
from pipelines.files import name_key
from pipelines.tokens import check_token

SURE = 0.4  # what `class_finder` takes where nothing is said
EXAMPLE = """example:
  python -m pipelines prior classes --noun cat --name my-cat --noun dog --name my-dog --count 50
  python -m pipelines train --method segmix --data cats --noun cat --name my-cat --data dogs --noun dog --name my-dog \\
      --class-data classes --set prior_weight=1

Masks are found by the base's attention, or by a detector and Segment Anything: a picture then counts only when exactly
one thing of the class is found in it. The folder has a class_metadata.jsonl, whose ids are the names."""


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "prior", "paint class pictures with masks for prior preservation")
    parser.epilog = EXAMPLE
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write; a new folder")
    parser.add_argument("--noun", action="append", required=True, help="the class: cat; repeatable")
    parser.add_argument("--name", action="append", default=[], help="the subject it is for (default: the noun)")
    parser.add_argument("--count", type=int, default=50, help="pictures of each class (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=10, help="for each picture (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--prompt", help="with {} twice, for the article and the class")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: %(default)s)")
    parser.add_argument("--detector", help="toybox, or a detector's Hub id or folder (default: attention)")
    parser.add_argument("--threshold", type=float, help=f"a detector's least certainty (default: {SURE})")
    parser.add_argument("--segmenter", default="", metavar="PATH", help="sam_vit_b, _l or _h (default: the embedded)")
    add_base(parser)
    add_workspace(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.class_masks import PROMPT, ClassWish, class_finder, masked_class_pictures
    from pipelines.formats.mudi import CLASS_FILE

    names = options.name or ["-".join(noun.split()) for noun in options.noun]
    for name in names:
        check_token(f"<{name}>")
    if len(names) != len(options.noun) or len({name_key(name) for name in names}) < len(names):
        raise StudioError(f"There are {len(options.noun)} classes: give each a --name of its own.")
    if not options.detector and (options.segmenter or options.threshold is not None):
        raise StudioError("--segmenter and --threshold need boxes. Name a --detector, or leave them out.")
    if not 0 <= (options.threshold or 0) <= 1:
        raise StudioError(f"A threshold of {options.threshold:g} is out of range. Choose 0 to 1; {SURE} is usual.")
    prompt = PROMPT if options.prompt is None else options.prompt
    wish = ClassWish(options.count, options.tries, prompt, steps=options.steps, seed=options.seed)
    wish.check(options.folder)
    model = open_base(options, terminal)
    sure = SURE if options.threshold is None else options.threshold
    cache = None if options.detector else open_workspace(options).root / "masks"
    find = class_finder(model, options.detector or "", options.segmenter, sure, cache)
    classes = dict(zip(names, options.noun, strict=True))
    try:
        written = terminal.watch(masked_class_pictures(model, classes, find, options.folder, wish))
    except Stopped:
        file = options.folder / CLASS_FILE
        raise Stopped(f"Stopped; what is done is kept: {file}" if file.is_file() else "Stopped.") from None
    terminal.result({"file": str(written)}, f"Train with: --class-data {written.parent} --set prior_weight=1")
