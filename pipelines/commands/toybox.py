"""`toybox`: draw photos of the embedded world, judge pictures, build its models, measure its gates."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.commands.arguments import Parser, command, seed_range
from pipelines.commands.terminal import Terminal


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    about = "the embedded world: photos, judge, build, gates"
    actions = commands.add_parser("toybox", help=about, description=about).add_subparsers(
        metavar="ACTION", required=True
    )
    drawing = command(actions, "photos", "draw photos of subjects, with masks and truth.json")
    drawing.add_argument(
        "--subject-seed", type=int, action="append", required=True, help="which subject; repeat for several in a photo"
    )
    drawing.add_argument("--count", type=int, default=5, help="how many photos (default: 5)")
    drawing.add_argument("--background", help="the same for all: grass, sand ... (default: varied)")
    drawing.add_argument("--category", help="what the subjects are: robot, cat ... (default: from the seed)")
    drawing.add_argument("--prop", action="store_true", help="the same unnamed thing stands in every photo")
    drawing.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    drawing.set_defaults(run=photos)
    judging = command(actions, "judge", "what is to be seen in a folder of pictures")
    judging.add_argument("folder", type=Path, metavar="DIR")
    judging.set_defaults(run=judge)
    building = command(actions, "build", "train the embedded models from nothing; goes on where it stopped")
    building.add_argument("--quick", action="store_true", help="walk the whole path in two minutes, for a test")
    building.set_defaults(run=build)
    command(actions, "gates", "measure the shipped models against their gates").set_defaults(run=gates)
    learning = command(actions, "quality", "learn unseen subjects and judge pictures of them on other backgrounds")
    learning.add_argument("--method", required=True, help="how to learn them")
    learning.add_argument("--seeds", required=True, metavar="A-B", help="subject seeds, both ends included")
    learning.add_argument("--preset", help="named settings (default: the method's own for Toybox)")
    learning.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    learning.add_argument("--masks", action="store_true", help="count the loss inside the true masks")
    learning.set_defaults(run=quality)


def photos(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.toybox import commands

    truth = commands.photos(
        options.subject_seed,
        options.out,
        count=options.count,
        background=options.background,
        category=options.category,
        prop=options.prop,
    )
    pictures = truth["pictures"]
    subjects = " and ".join(dict.fromkeys(toy["category"] for picture in pictures for toy in picture["toys"]))
    terminal.result(truth, f"{len(pictures)} photos of {subjects}, with masks and truth.json, are in {options.out}.")


def judge(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.toybox import commands

    verdict = commands.judge(options.folder)
    terminal.result(verdict, *(_seen(picture) for picture in verdict["pictures"]))


def build(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.toybox import commands

    report = terminal.watch(commands.build(quick=options.quick))
    terminal.result(report, *_flat(report))


def gates(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.toybox import commands

    report = terminal.watch(commands.gates())
    terminal.result(report, *_flat(report))


def quality(options: argparse.Namespace, terminal: Terminal) -> None:
    from pipelines.toybox import commands

    events = commands.quality(options.method, seed_range(options.seeds), options.preset, options.set, options.masks)
    report = terminal.watch(events)
    terminal.result(report, *_flat({key: value for key, value in report.items() if key != "subjects"}))


def _seen(picture: dict[str, Any]) -> str:
    toys = ", ".join(f"{' and '.join(toy['colors'])} {toy['pattern']} {toy['category']}" for toy in picture["toys"])
    return f"{picture['file']}: {toys or 'nothing'} on {picture['background']}"


def _flat(report: Any, name: str = "") -> Iterator[str]:
    """A nested report as lines of `name value`."""
    if not isinstance(report, dict):
        yield f"{name:<40} {report}"
        return
    for key, value in report.items():
        yield from _flat(value, f"{name} {key}".strip())
