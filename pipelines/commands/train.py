"""`train`: learn a concept from photos, and put it into the library."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import (
    Parser,
    add_base,
    add_workspace,
    command,
    open_base,
    open_workspace,
    own_presets,
)
from pipelines.commands.terminal import Stopped, Terminal
from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.settings import Setting

EXAMPLE = """example:
  python -m pipelines train --method svdiff --data photos --noun cat --name my-cat --masks

The settings of a method: python -m pipelines train --method svdiff --help"""


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "train", "learn a concept from a folder of photos")
    parser.add_argument("--method", required=True, help="how to learn it: see 'presets'")
    several: dict[str, Any] = {"action": "append", "default": []}
    help = "folder with the photos, ours or MuDI's with its metadata.jsonl; repeatable, one for each --name"
    parser.add_argument("--data", type=Path, metavar="DIR", help=help, required=True, action="append")
    parser.add_argument("--noun", help="the ordinary word for it: cat; one for each --name", **several)
    parser.add_argument("--name", help="what to call it: my-cat is <my-cat> in a prompt; repeatable", **several)
    parser.add_argument(
        "--masks", action="store_true", help="count the loss inside x-masklabel.png of each photo x.png"
    )
    parser.add_argument(
        "--class-data",
        type=Path,
        metavar="DIR",
        help="class pictures with masks and a class_metadata.jsonl, as 'prior' and MuDI write them, for prior_weight "
        "(default: painted by the base)",
    )
    parser.add_argument("--preset", help="named settings (default: the method's own for the loaded base)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the run of this name that was stopped")
    add_base(parser)
    add_workspace(parser)
    parser.epilog = _epilog(argv)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    for folder in options.data:
        if not folder.is_dir():
            raise StudioError(f"There is no folder {folder}. Name the one with the photos: --data DIR.")
    from pipelines.methods import get_method
    from pipelines.preset import load_preset
    from pipelines.settings import parse_settings, validated

    settings = parse_settings(get_method(options.method).Params, options.set)
    workspace = open_workspace(options)
    model = open_base(options, terminal)
    preset = load_preset(options.method, options.preset, model.kind, own_presets(workspace))
    params = validated(type(preset), preset.model_dump() | settings)
    from pipelines.runs import train_concept

    with TemporaryDirectory(prefix="attune-data-") as scratch:
        what = _what(options, Path(scratch))
        if what.rare_word and "rare_word" in type(params).model_fields and "rare_word" not in settings:
            params = params.model_copy(update={"rare_word": what.rare_word})
        events = train_concept(
            workspace,
            model,
            method=options.method,
            photos=what.folders,
            noun=what.nouns,
            name=what.names,
            params=params,
            seed=options.seed,
            masks=options.masks,
            classes=what.classes,
            resume=options.resume,
        )
        try:
            trained = terminal.watch(events)
        except Stopped:
            raise Stopped(_stopped(terminal)) from None
    concept = trained.concept
    tokens = " and ".join(subject.token for subject in concept.subjects)
    again = ["generate", f"a photo of {tokens}", "--concept", concept.name, "--out", "pictures"]
    again += ["--base", options.base] if options.base else []
    terminal.result(
        {"concept": concept.to_json()},
        f"{concept.name} is in the library. Write {tokens} in a prompt:",
        f"  python -m pipelines {shlex.join(again)}",
    )


@dataclass(frozen=True)
class _What:
    """What is learned: a folder for each subject or one for all."""

    folders: list[Path]
    nouns: list[str]
    names: list[str]
    rare_word: str = ""
    classes: Path | None = None  # class pictures whose ids are the names


def _what(options: argparse.Namespace, scratch: Path) -> _What:
    """From the options, or from a folder in MuDI's form, which says itself what it shows."""
    from pipelines.formats import mudi, mudi_folders

    own = [folder for folder in options.data if mudi.is_dataset(folder)]
    if own and len(options.data) > 1:
        raise StudioError(f"{own[0]} has a {mudi.FILE}, which names all that is learned. Give it as the only --data.")
    if not own:
        if not options.noun or not options.name:
            more = (
                " Or find things without a word first: 'masks DIR --discover'." if options.method == "extract" else ""
            )
            raise StudioError(f"Say what the photos show, and what to call it: --noun cat --name my-cat.{more}")
        return _What(options.data, options.noun, options.name, classes=options.class_data)
    dataset = mudi.read_dataset(options.data[0])
    if options.noun:
        raise StudioError(f"The nouns stand in {dataset.where(dataset.first)}. Leave --noun out, or change them there.")
    called = dict(zip(dataset.phrases, options.name or dataset.phrases, strict=False))
    if options.name and len(options.name) != len(dataset.phrases):
        raise StudioError(f"{mudi.FILE} has {len(dataset.phrases)} subjects: give as many --name, or none.")
    subjects, rare_word = mudi.subjects_of(dataset, called)
    folders = mudi_folders.unpack(dataset, scratch, names=called)
    names = [subject.token.strip("<>") for subject in subjects]
    classes = options.class_data
    if classes is not None:
        found = mudi.read_dataset(classes, mudi.CLASS_FILE)
        mudi_folders.check_classes(dataset, found)
        classes = mudi_folders.renamed_classes(found, scratch / "classes", called)
    return _What([folders[name] for name in names], [s.noun for s in subjects], names, rare_word, classes)


def _stopped(terminal: Terminal) -> str:
    again = [word for word in sys.argv[1:] if word != "--resume"]
    where = f" at step {terminal.last.step} of {terminal.last.total}" if terminal.last else ""
    return f"Stopped{where}; what was learned is kept. Go on with: python -m pipelines {shlex.join(again)} --resume"


def _epilog(argv: Sequence[str]) -> str:
    """The method's settings when one is named beside --help, else an example."""
    method = _named_method(argv)
    if method is None or not {"-h", "--help"} & set(argv):
        return EXAMPLE
    from pipelines.methods import get_method
    from pipelines.settings import fields

    found = get_method(method)
    lines = [f"settings of {method} ({found.title}), for --set KEY=VALUE:"]
    return "\n".join([*lines, *(_setting(field) for field in fields(found.Params))])


def _named_method(argv: Sequence[str]) -> str | None:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--method":
            return following
        if word.startswith("--method="):
            return word.removeprefix("--method=")
    return None


def _setting(field: Setting) -> str:
    allowed = f"; {field.range()}" if field.range() else ""
    return f"  {field.name:<20} {field.help} [{field.default}{allowed}]"
