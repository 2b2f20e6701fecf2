"""Helper processes of a study: everyone's share, records that the main process goes on from, and none left behind."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.evaluate import crew
from pipelines.evaluate.claim import Arm
from pipelines.evaluate.crew import command_of, helped, portions, taken, usual_helpers
from pipelines.evaluate.study import Study, Unit, help_out
from pipelines.events import Note, Progress
from tests.test_claims import Coin, coin, lab, ran  # noqa: F401

WRITES = """
import sys, pathlib
folder, count, flag, part = sys.argv[1:]
stage, main, place = part.split(":", 2)
for seed in range(int(count)):
    try:
        pathlib.Path(place, str(seed)).touch(exist_ok=False)
    except FileExistsError:
        continue
    pathlib.Path(folder, f"{seed}.json").write_text(stage)
"""


def units(folder: Path, count: int = 4) -> list[Unit]:
    return [Unit("coin", seed, Arm(name), {}, folder / f"{seed}.json") for seed in range(count) for name in ("a", "b")]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "LOOK", 0.01)


def test_all_arms_of_a_seed_are_one_helpers(tmp_path: Path) -> None:
    """Two that take in turn have everything between them, once, and never the same seed."""
    work = units(tmp_path, 5)
    assert [len(portion) for portion in portions(work).values()] == [2] * 5
    one, other = taken(work, tmp_path), taken(work, tmp_path)
    first, second = [next(one), next(one)], [next(other), next(other)]
    second += list(other)
    first += list(one)
    assert {unit.seed for unit in first} == {0} and {unit.seed for unit in second} == {1, 2, 3, 4}
    assert sorted(unit.seed for unit in first + second) == sorted(unit.seed for unit in work)


def test_helpers_do_what_is_not_recorded(tmp_path: Path) -> None:
    (tmp_path / "3.json").write_text("before")
    command = [sys.executable, "-c", WRITES, str(tmp_path), "3"]
    events = list(helped(Study([], helpers=2), "coin", "cases", units(tmp_path), command))
    assert [(tmp_path / f"{seed}.json").read_text() for seed in range(4)] == ["cases"] * 3 + ["before"]
    assert all(isinstance(event, Progress) and event.total == 8 for event in events)


def test_one_seed_or_one_process_needs_no_helpers(tmp_path: Path) -> None:
    for wish, work in ((Study([], helpers=1), units(tmp_path)), (Study([], helpers=2), units(tmp_path, 1))):
        assert not list(helped(wish, "coin", "cases", work, ["no such program"]))
    over = Study([], minutes=1, began=-1e6, helpers=2)
    assert not list(helped(over, "coin", "cases", units(tmp_path), ["no such program"]))


def test_a_helper_that_fails_is_told_and_none_outlives_a_stop(tmp_path: Path) -> None:
    failed = [sys.executable, "-c", "raise SystemExit(3)"]
    *_, last = helped(Study([], helpers=2), "coin", "cases", units(tmp_path), failed)
    assert isinstance(last, Note) and "measured here" in last.text
    script = f"import os, pathlib, time; pathlib.Path(r'{tmp_path}', f'{{os.getpid()}}.pid').touch(); time.sleep(60)"
    work = helped(Study([], helpers=2), "coin", "cases", units(tmp_path), [sys.executable, "-c", script])
    next(work)
    until = time.monotonic() + 30
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    work.close()  # type: ignore[attr-defined]
    for path in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.stem), 0)


def test_the_main_process_goes_on_from_helpers_records(coin: Coin, tmp_path: Path) -> None:  # noqa: F811
    """A helper measures what no other has taken, with what the search chose; the result is a single process's."""
    alone = ran(lab(tmp_path / "alone"))
    wish, place = Study(["coin"], minutes=0), tmp_path / "place"
    before = len(coin.runs)

    def help_with(stage: str, main: int, *others: str) -> int:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for other in others:
            (place / other).touch()
        help_out(lab(tmp_path / "x"), wish, f"{stage}:{main}:{place}")
        return len(coin.runs) - before

    tries = help_with("search", os.getppid())
    assert tries == len(list((tmp_path / "x" / "search" / "coin").glob("*.json"))) > 0
    assert ran(lab(tmp_path / "x")) == alone and len(coin.runs) - before == tries + 18
    (tmp_path / "x" / "cases" / "coin" / "21-bad.json").unlink()
    assert help_with("cases", os.getppid(), "coin-21") == tries + 18  # seed 21 is another's
    assert help_with("cases", os.getppid() + 1) == tries + 18  # an orphan ends
    assert help_with("cases", os.getppid()) == tries + 19 and ran(lab(tmp_path / "x")) == alone


def test_a_quick_run_leaves_out_what_is_extra(coin: Coin, tmp_path: Path) -> None:  # noqa: F811
    """An arm, and what is checked of it."""
    coin.arms = (*coin.arms[:2], replace(coin.arms[2], extra=True))
    result = ran(lab(tmp_path, quick=True))["claims"]["coin"]
    assert result["arms"].keys() == {"good", "bad"} and result["n"] == 1
    assert [(one["arm"], one["over"], one["holds"]) for one in result["checks"]] == [("good", "bad", None)]
    assert len(ran(lab(tmp_path / "whole"))["claims"]["coin"]["checks"]) == 2


def test_the_command_of_a_helper_is_the_claims_own(tmp_path: Path) -> None:
    words = command_of(tmp_path, Study([], range(3000, 3012), minutes=0), ["layout", "masks"], True)
    assert words[1:4] == ["-m", "pipelines", "claims"] and words[-1] == "--quick"
    assert words[6:10] == ["--only", "layout", "--only", "masks"]
    assert words[words.index("--seeds") + 1] == "3000-3011" and words[words.index("--minutes") + 1] == "0.000"
    assert "--seeds" not in command_of(tmp_path, Study([]), ["layout"], False)
    assert usual_helpers("cuda") == 1 <= usual_helpers("cpu")
