"""`evaluate`: how well concepts are learned, in numbers with intervals, as a table, CSV files and a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from pipelines.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.concept import Trained
    from pipelines.evaluate.encoders import Clip, DinoClass
    from pipelines.evaluate.protocol import Evaluation
    from pipelines.events import Event
    from pipelines.model import Model
    from pipelines.photos import Photo

EXAMPLE = """examples:
  python -m pipelines evaluate --concept my-cat --data photos --out evaluation
  python -m pipelines evaluate --concept my-cat --concept my-cat-2 --data photos --prompts prompts.txt --masked
  python -m pipelines evaluate --concept my-cat --data photos --pictures painted --out evaluation
  python -m pipelines evaluate --concept my-cat --data photos --clip openai/clip-vit-base-patch32 --dino DINO

With --pictures nothing is painted: each picture's prompt is read from the picture, or from x.txt beside it.

A prompt has {} for the subject, one prompt a line. Identity is measured against the photos; text against the prompt
without the subject, and with its category. Read them together: leaving the subject out raises the first of these."""


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "evaluate", "measure how well concepts are learned")
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--concept", action="append", default=[], metavar="NAME[:STRENGTH]", help="what to measure; repeatable"
    )
    parser.add_argument(
        "--subject", default="", metavar="NAME", help="which one of a concept with several (default: the first)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with photos of the subject")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="measure pictures that were painted before")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, {} for the subject")
    parser.add_argument("--images", type=int, default=8, help="pictures of each prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="how strictly to follow it (default: what suits the base)")
    parser.add_argument("--scheduler", default="ddim", help=f"{', '.join(SCHEDULERS)} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    parser.add_argument("--masked", action="store_true", help="compare the subjects alone as well")
    parser.add_argument("--clip", help="a CLIPModel: toybox, a Hub id or a folder (default: toybox on Toybox)")
    parser.add_argument("--dino", help="a DINO or DINOv2 for identity as well: a Hub id or a folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write table, page and pictures")
    add_base(parser)
    add_workspace(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    if not options.concept:
        raise StudioError("Name what to measure: --concept NAME, as in 'python -m pipelines list'.")
    if not options.data.is_dir():
        raise StudioError(f"There is no folder {options.data}. Name the one with the photos: --data DIR.")
    if options.pictures is not None and (len(options.concept) > 1 or options.prompts):
        raise StudioError("--pictures are of one --concept and bring their prompts. Leave --prompts out.")
    from pipelines.evaluate.encoders import loaded_looks
    from pipelines.evaluate.masked import subject_of
    from pipelines.evaluate.report import as_json, as_text, write_report
    from pipelines.files import make_folder
    from pipelines.photos import load_photos

    concepts = _concepts(options)
    for trained, _ in concepts:
        subject_of(trained.concept, options.subject)  # before a model is loaded
    model = None
    if options.pictures is None or options.masked:  # else there is nothing to paint, and nobody to find masks
        model = open_base(options, terminal, options.base or _base_of(concepts[0][0]))
    kind = model.kind if model else concepts[0][0].concept.base_model.get("id", "")
    notes: list[str] = []
    photos = load_photos(options.data, short_side=model.native_size if model else 0, notes=notes)
    device = str(model.device) if model else usable_device(options)
    looks = loaded_looks(kind, options.clip or "", options.dino or "", device)
    if options.out:
        make_folder(options.out)  # before anything is painted
    runs = _runs(options, model, concepts, photos, looks, notes)
    for note in notes:
        terminal.say(note)
    found: list[Evaluation] = [terminal.watch(events) for events in runs]
    written = write_report(options.out, found) if options.out else []
    said = [f"Written: {path}" for path in written]
    terminal.result(
        {"rows": as_json(found), "files": [str(path) for path in written]},
        *as_text(found, overall=bool(options.out)),
        *said,
    )


def _runs(
    options: argparse.Namespace,
    model: Model | None,
    concepts: list[tuple[Trained, float]],
    photos: list[Photo],
    looks: tuple[Clip, DinoClass | None],
    notes: list[str],
) -> list[Iterator[Event]]:
    """One run a concept; pictures that are there already are read first."""
    from pipelines.evaluate.masked import subject_of
    from pipelines.evaluate.painted import read_shown
    from pipelines.evaluate.prompts import default_prompts, read_prompts
    from pipelines.evaluate.protocol import Wish, evaluate, evaluate_painted

    if options.pictures is not None:
        trained = concepts[0][0]
        subject, _ = subject_of(trained.concept, options.subject)
        shown = read_shown(options.pictures, subject, notes)
        return [evaluate_painted(trained, photos, shown, *looks, masker=model, subject=options.subject)]
    assert model is not None
    wish = Wish(
        read_prompts(options.prompts) if options.prompts else default_prompts(model.kind),
        images=options.images,
        steps=options.steps,
        guidance=options.guidance,
        scheduler=options.scheduler,
        seed=options.seed,
        masked=options.masked,
        subject=options.subject,
    )
    return [evaluate(model, concept, photos, wish, *looks) for concept in concepts]


def _concepts(options: argparse.Namespace) -> list[tuple[Trained, float]]:
    from pipelines.library import Library

    library = Library(open_workspace(options))
    return [(library.load(name), strength) for name, strength in map(_named, options.concept)]


def _named(text: str) -> tuple[str, float]:
    """`my-cat:0.8` -> ("my-cat", 0.8); without a number the strength is 1."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon else (text, 1.0)
    except ValueError:
        raise StudioError(
            f"'{number}' is no strength. Write --concept NAME:STRENGTH with a number, as in my-cat:0.8."
        ) from None


def _base_of(trained: Trained) -> str:
    """The base that the concept was learned on. The id of a folder is but its name: nothing can be loaded by it."""
    where = trained.concept.base_model.get("id", "")
    if where == "toybox" or "/" in where:
        return where
    raise StudioError(
        f"'{trained.concept.name}' was made on the base '{where or 'unknown'}'. Say where that is: --base FOLDER."
    )
