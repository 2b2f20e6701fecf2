"""`claims`: measure the papers' claims again on Toybox, where the truth is known."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipelines.commands.arguments import Parser, command, seed_range
from pipelines.commands.terminal import Terminal
from pipelines.errors import StudioError
from pipelines.files import make_folder

SPARE = 4.0  # minutes of a long part for what is under way when its time is up
EXAMPLE = """examples:
  python -m pipelines claims --out evidence
  python -m pipelines claims --quick --only leakage --out quick
  python -m pipelines claims --only layout --seeds 4000-4009 --out evidence

Settings are chosen on tuning seeds, the same number of tries for each side, or taken from assets/evidence where this
base was searched before. A part ends within 45 minutes; the same command goes on. Records are of the code and presets
they were made with: after a change of those choose a new folder. --quick shows the direction and decides nothing."""


def add(commands: argparse._SubParsersAction[Parser], argv: Sequence[str]) -> None:
    parser = command(commands, "claims", "measure the papers' claims on Toybox")
    parser.epilog = EXAMPLE
    parser.add_argument("--quick", action="store_true", help="one subject a claim, in a quarter of an hour; no verdict")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="one claim; repeatable")
    parser.add_argument("--seeds", metavar="A-B", help="subjects to report on, both ends included")
    parser.add_argument("--minutes", type=float, default=45, help="length of a part, 0 = to the end (default: 45)")
    parser.add_argument("--helpers", type=int, metavar="N", help="processes at once (default: one for each core)")
    parser.add_argument("--helper", help=argparse.SUPPRESS)  # the share of one
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> None:
    seeds = None if options.seeds is None else seed_range(options.seeds)
    if not 0 <= options.minutes < float("inf"):
        raise StudioError(f"A part can't last {options.minutes:g} minutes. Give 0 (to the end) or more.")
    from pipelines.evaluate.claim import claim_names, get_claim
    from pipelines.evaluate.claim_page import table, write_evidence
    from pipelines.evaluate.crew import usual_helpers
    from pipelines.evaluate.lab import Lab
    from pipelines.evaluate.outcome import check_folder, finished
    from pipelines.evaluate.study import Study, help_out, study
    from pipelines.model import load_model

    names = [get_claim(name).name for name in options.only] or claim_names()
    make_folder(options.out)
    lab = Lab(load_model("toybox"), options.out, options.quick, terminal.say)
    spare = SPARE if options.minutes > 3 * SPARE and not options.helper else 0.0
    wish = Study(names, seeds, options.minutes, options.helpers or usual_helpers(lab.model.device.type), spare)
    if options.helper:
        return help_out(lab, wish, options.helper)
    check_folder(lab)
    report = terminal.watch(study(lab, wish))
    results, files = report["claims"], []
    if results:
        results = finished(lab) | results
        results = {name: results[name] for name in claim_names() if name in results}
        files = write_evidence(options.out, results, _command(options), options.out)
    said = table(results) if results else ["Nothing is finished yet. Run the same command again to go on."]
    terminal.result(report | {"files": [str(file) for file in files]}, *said, *(f"Written: {file}" for file in files))


def _command(options: argparse.Namespace) -> str:
    """How to run it again."""
    words = ["python", "-m", "pipelines", "claims", *(["--quick"] if options.quick else [])]
    words += [word for name in options.only for word in ("--only", name)]
    words += ["--seeds", options.seeds] if options.seeds else []
    return shlex.join([*words, "--out", options.out.name or "DIR"])
