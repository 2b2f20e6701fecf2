"""Helper processes of a study: everyone's share, records that the main process goes on from, and none left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from pipelines.evaluate import crew
from pipelines.evaluate.claim import Arm
from pipelines.evaluate.crew import command_of, helped, share_of, usual_helpers
from pipelines.evaluate.study import Study, Unit, help_out
from pipelines.events import Note, Progress
from tests.test_claims import Coin, coin, lab, ran  # noqa: F401

WRITES = """
import sys, pathlib
folder, count, flag, share = sys.argv[1:]
stage, numbers, main = share.split(":")
number, of = map(int, numbers.split("/"))
for seed in range(number, int(count), of):
    pathlib.Path(folder, f"{seed}.json").write_text(stage)
"""


def units(folder: Path, count: int = 4) -> list[Unit]:
    return [Unit(seed, Arm(name), {}, folder / f"{seed}.json") for seed in range(count) for name in ("a", "b")]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "LOOK", 0.01)


def test_all_arms_of_a_seed_are_one_helpers(tmp_path: Path) -> None:
    work = units(tmp_path, 5)
    shares = [share_of(work, (number, 3)) for number in range(3)]
    assert sorted(unit.seed for share in shares for unit in share) == sorted(unit.seed for unit in work)
    assert [sorted({unit.seed for unit in share}) for share in shares] == [[0, 3], [1, 4], [2]]


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
    """A helper measures its seeds with what the search chose; the result is the one of a single process."""
    alone = ran(lab(tmp_path / "alone"))
    wish = Study(["coin"], minutes=0)
    for number in range(2):
        help_out(lab(tmp_path / "x"), wish, f"search:{number}/2:{os.getppid()}")
    count = len(coin.runs)
    assert (
        count
        == 2 * len([path for path in (tmp_path / "x" / "search" / "coin").iterdir() if path.suffix == ".json"]) + 18
    )
    again = ran(lab(tmp_path / "x"))
    assert again == alone and len(coin.runs) == count + 18
    (tmp_path / "x" / "cases" / "coin" / "21-bad.json").unlink()
    help_out(lab(tmp_path / "x"), wish, f"cases:0/2:{os.getppid()}")
    assert len(coin.runs) == count + 18  # seed 21 is the other's
    help_out(lab(tmp_path / "x"), wish, f"cases:1/2:{os.getppid() + 1}")
    assert len(coin.runs) == count + 18  # an orphan ends
    help_out(lab(tmp_path / "x"), wish, f"cases:1/2:{os.getppid()}")
    assert len(coin.runs) == count + 19 and ran(lab(tmp_path / "x")) == alone


def test_the_command_of_a_helper_is_the_claims_own(tmp_path: Path) -> None:
    words = command_of(tmp_path, "layout", range(3000, 3012), True, 44.5)
    assert words[1:5] == ["-m", "pipelines", "claims", "--only"] and words[-1] == "--quick"
    assert words[words.index("--seeds") + 1] == "3000-3011" and words[words.index("--minutes") + 1] == "44.500"
    assert usual_helpers("cuda") == 1 <= usual_helpers("cpu")
