"""The command line: what it prints, how it ends, how fast it answers, and the whole journey on a tiny base."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.__main__ import main
from pipelines.commands.arguments import seed_range
from pipelines.commands.terminal import Stopped, Terminal, duration
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Progress, Snapshot
from pipelines.methods import method_names
from tests.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[1]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(steps: int, closed: list[int], interrupt_at: int = 0) -> Iterator[Event]:
    """Work that counts; it sends Ctrl-C to its own process at a step, as a person would."""
    done = 0
    try:
        yield Note("hello")
        for step in range(1, steps + 1):
            if step == interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            done = step
            yield Progress("train", step, steps, {"loss": 1 / step}, eta=float(steps - step))
        yield Snapshot("picture", path="a.png")
        yield Finished("value")
    finally:
        closed.append(done)


def test_the_bar_shows_stage_steps_values_and_time_left() -> None:
    screen, closed = Screen(), list[int]()
    terminal = Terminal(err=screen)
    assert terminal.watch(work(4, closed)) == "value"
    drawn = screen.getvalue()
    assert "hello\n" in drawn and "train" in drawn and "1/4" in drawn and "3 s left" in drawn and "loss 0.25" in drawn
    assert drawn.endswith("picture: a.png\n") and terminal.kept == ["a.png"] and closed == [4]


def test_a_log_gets_few_lines_of_progress() -> None:
    log = io.StringIO()
    Terminal(err=log).watch(work(500, []))
    assert "\r" not in log.getvalue() and 1 <= log.getvalue().count("train") <= 3 and "500/500" in log.getvalue()


def test_ctrl_c_ends_after_the_step_and_closes_the_work() -> None:
    closed = list[int]()
    terminal = Terminal(err=io.StringIO())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        terminal.watch(work(9, closed, interrupt_at=3))
    assert closed == [3] and terminal.last is not None and terminal.last.step == 3  # the third step was not torn
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_ends_at_once() -> None:
    def stuck() -> Iterator[Event]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        yield Finished("never")

    with pytest.raises(KeyboardInterrupt):
        Terminal(err=io.StringIO()).watch(stuck())


@pytest.mark.parametrize(("seconds", "text"), [(3.6, "4 s"), (65, "1:05 min"), (7260, "2:01 h")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def call(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *argv],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["list"], ["list", "--json"]])
def test_help_and_list_answer_within_a_second(argv: list[str], tmp_path: Path) -> None:
    """In CPU time, so that a busy machine does not fail it; a heavy import does."""
    before = os.times()
    done = call(*argv, STUDIO_HOME=str(tmp_path))
    after = os.times()
    assert done.returncode == 0 and done.stdout and not done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--method", "svdiff"], "arguments are required"),
        (["fly"], "invalid choice: 'fly'"),
        (["generate"], "no prompt"),
        (["generate", "a cat", "--count", "0"], "0 pictures were asked for"),
        (["generate", "a cat", "--concept", "my-cat:high"], "'high' is no strength"),
        (["train", "--method", "nope", "--data", ".", "--noun", "cat", "--name", "x"], "no method 'nope'"),
        (["train", "--method", "svdiff", "--data", "gone", "--noun", "cat", "--name", "x"], "no folder gone"),
        (["generate", "a cat", "--concept", "nobody"], "nobody"),
        (["library", "rename", "nobody", "x"], "nobody"),
        (["generate", "--again", "gone.png"], "gone.png"),
        (["generate", "a cat", "--again", "gone.png"], "Leave yours out"),
        (["bench", "nope"], "no bench 'nope'"),
        (["toybox", "photos", "--subject-seed", "1", "--background", "mars", "--out", "x"], "no background 'mars'"),
        (["toybox", "judge", "nowhere"], "no folder nowhere"),
    ],
)
def test_what_a_person_can_put_right_is_one_sentence(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    plain = capsys.readouterr()
    assert says in plain.err and plain.err.startswith("error: ") and not plain.out
    assert main([*argv, "--json"]) == 2
    assert says in json.loads(capsys.readouterr().out)["error"]


def test_a_bug_is_not_hidden(tmp_path: Path) -> None:
    """Exit code 1, a traceback, and under --json an object as well."""
    program = (
        "import sys, runpy; import pipelines.commands.list as l; l.search = None; sys.argv = ['x', 'list', '--json']"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; runpy.run_module('pipelines', run_name='__main__')"],
        cwd=ROOT,
        env=os.environ | {"STUDIO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "bug" in json.loads(done.stdout)["error"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(["list", "--workspace", str(file / "inside")]) == 2
    assert "--workspace" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(chance.integers(0, 256, (64, 80, 3), np.uint8)).save(folder / f"{index}.png")
        mask = np.zeros((64, 80), np.uint8)
        mask[16:48, 16:48] = 255
        Image.fromarray(mask).save(folder / f"{index}-masklabel.png")
    return str(folder)


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    """What a command prints under --json."""
    code = main([*argv, "--json"])
    said = capsys.readouterr()
    assert code == 0, said
    return json.loads(said.out)


SHORT = ["--set", "steps=4", "--set", "sample_every=0", "--set", "prior_weight=0"]


def test_the_whole_journey(base: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--method", "svdiff", "--data", photos, "--noun", "cat", "--name", "my-cat", "--masks"]
    trained = answer(capsys, *train, *SHORT, "--base", base)
    assert trained["concept"]["subjects"] == [{"token": "<my-cat>", "noun": "cat"}]
    assert trained["concept"]["params"]["steps"] == 4 and trained["concept"]["params"]["masked_loss"]
    assert [concept["name"] for concept in answer(capsys, "list")] == ["my-cat"]

    out = tmp_path / "pictures"
    prompt = ["generate", "a photo of <my-cat> in the snow", "--concept", "my-cat:0.8", "--attention", "cat"]
    made = answer(capsys, *prompt, "--base", base, "--seed", "1", "--count", "2", "--steps", "2", "--out", str(out))
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == len(made["pictures"]) == 2
    assert list((out / "attention").glob("*.png")) and list((out / "attention").glob("*.npz"))

    answer(capsys, "generate", "--again", str(pictures[0]), "--base", base, "--out", str(tmp_path / "again"))
    (again,) = (tmp_path / "again").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(pictures[0])))


def test_a_concept_is_carried_out_and_in(
    base: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--method", "residual", "--data", photos, "--noun", "cat", "--name", "my-cat"]
    concept = answer(capsys, *train, "--set", "steps=2", "--set", "sample_every=0", "--base", base)["concept"]
    assert answer(capsys, "library", "rename", "my-cat", "Felix")["name"] == "Felix"
    (file,) = answer(capsys, "library", "export", "Felix", str(tmp_path / "felix.zip"))["files"]
    trash = answer(capsys, "library", "delete", "Felix")["trash"]
    assert answer(capsys, "list") == [] and len(answer(capsys, "library", "trash")) == 1
    assert answer(capsys, "library", "import", file)["name"] == "Felix"
    assert answer(capsys, "library", "restore", trash)["name"] == "Felix-2"
    (original, *_) = answer(capsys, "library", "export", "Felix", str(tmp_path), "--original")["files"]
    taken = answer(capsys, "library", "import", original, "--name", "other", "--noun", "cat", "--base", base)
    assert taken["base_model"]["fingerprint"] == concept["base_model"]["fingerprint"]
    assert [found["name"] for found in answer(capsys, "library", "list", "felix")] == ["Felix", "Felix-2"]
    assert answer(capsys, "library", "show", "other")["method"] == "residual"


class PressesCtrlC(io.StringIO):
    """A person at the keyboard who presses Ctrl-C as soon as the first step is drawn."""

    def write(self, text: str) -> int:
        if "1/4" in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_a_stopped_training_goes_on_to_the_same_bits(
    base: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", "--method", "svdiff", "--data", photos, "--noun", "cat", "--name", "my-cat", *SHORT]
    train += ["--base", base]
    answer(capsys, *train, "--workspace", str(tmp_path / "whole"))
    train += ["--workspace", str(tmp_path / "stopped")]
    monkeypatch.setattr(sys, "argv", ["pipelines", *train])
    with monkeypatch.context() as keyboard:
        keyboard.setattr(sys, "stderr", screen := PressesCtrlC())
        assert main(train) == 130
    assert "Stopped at step 1 of 4" in screen.getvalue() and "--resume" in screen.getvalue().splitlines()[-1]
    answer(capsys, *train, "--resume")
    names = [answer(capsys, "list", "--workspace", str(tmp_path / place)) for place in ("whole", "stopped")]
    assert [[concept["name"] for concept in found] for found in names] == [["my-cat"], ["my-cat"]]
    weights = [next((tmp_path / place).glob("concepts/*/weights.safetensors")) for place in ("whole", "stopped")]
    first, second = map(load_file, weights)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_class_pictures_are_painted_with_masks_and_trained_beside(
    base: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = np.pad(np.ones((1, 8, 6), np.float32), ((0, 0), (4, 4), (5, 5)))  # the tiny base's own are noise
    monkeypatch.setattr("pipelines.masks.noun_scores", lambda *_: scores)
    folder = tmp_path / "classes"
    prior = ["prior", str(folder), "--noun", "cat", "--name", "my-cat", "--count", "2", "--steps", "1", "--base", base]
    assert answer(capsys, *prior)["file"] == str(folder / "class_metadata.jsonl")
    assert len(list(folder.glob("mask_*.png"))) == 2
    train = ["train", "--method", "svdiff", "--data", photos, "--noun", "cat", "--name", "my-cat", *SHORT]
    train += ["--class-data", str(folder), "--set", "prior_weight=1", "--base", base]
    assert answer(capsys, *train)["concept"]["params"]["prior_weight"] == 1
    for wrong, says in (
        ([*prior, "--name", "x"], "1 classes: give each a --name of its own"),
        (prior, "already there"),
        ([*prior[:1], str(tmp_path / "new"), *prior[2:], "--prompt", "a {}"], "needs {} twice"),
        ([*prior[:1], str(tmp_path / "new"), *prior[2:], "--segmenter", "x.pth"], "need boxes"),
        ([*prior[:1], str(tmp_path / "new"), *prior[2:], "--detector", "gone"], "only Toybox's own world"),
        (
            [*prior[:1], str(tmp_path / "new"), *prior[2:], "--detector", "gone", "--segmenter", "x.pth"],
            "no file 'x.pth'",
        ),
        ([*prior[:1], str(tmp_path / "new"), *prior[2:4], "--name", "my cat"], "can't name a concept"),
        ([*train, "--class-data", photos], "There is no class_metadata.jsonl"),
        ([*train, "--set", "prior_weight=0"], "only where prior_weight is above 0"),
    ):
        assert main([*wrong, "--json"]) == 2 and says in json.loads(capsys.readouterr().out)["error"]


def test_presets_and_bases_can_be_looked_at(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "presets")
    assert {preset["method"] for preset in found} == set(method_names())
    assert answer(capsys, "base", "--base", base)["kind"] == "sd1"


def test_toybox_draws_photos_with_their_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = ["toybox", "photos", "--subject-seed", "7", "--subject-seed", "9", "--category", "robot"]
    truth = answer(capsys, *photos, "--background", "grass", "--count", "2", "--out", str(tmp_path / "photos"))
    assert truth == json.loads((tmp_path / "photos" / "truth.json").read_text())
    assert len(truth["pictures"]) == 2 and all(picture["background"] == "grass" for picture in truth["pictures"])
    toys = [toy for picture in truth["pictures"] for toy in picture["toys"]]
    assert {toy["subject_seed"] for toy in toys} == {7, 9} and {toy["category"] for toy in toys} == {"robot"}
    assert all((tmp_path / "photos" / toy["mask"]).is_file() for toy in toys)


@pytest.mark.slow  # half a minute of painting
def test_bench_prints_each_ratio(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "bench", "capture", "--base", base)
    assert set(found) == {"capture"} and set(found["capture"]) == {"ratio", "ours", "reference", "runs"}
    assert found["capture"]["ratio"] > 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--method", "svdiff", "--noun", "cat", "--name", "x", "--set", "step=3"], "did you mean 'steps'"),
        (["train", "--method", "svdiff", "--noun", "cat", "--name", "x", "--preset", "nope"], "no preset 'nope'"),
        (["train", "--method", "svdiff", "--noun", "cat", "--name", "x", "--device", "gpu"], "'gpu' is not a device"),
        (["train", "--method", "svdiff", "--noun", "cat", "--name", "x", "--resume"], "no stopped run of 'x'"),
    ],
)
def test_training_refuses_in_one_sentence(
    argv: list[str], says: str, base: str, photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--data", photos, "--base", base, "--json"]) == 2
    assert says in json.loads(capsys.readouterr().out)["error"]


def test_a_folder_without_photos_is_refused(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    train = ["train", "--method", "svdiff", "--data", str(tmp_path / "empty"), "--noun", "cat", "--name", "x"]
    assert main([*train, "--base", base]) == 2
    assert "photo" in capsys.readouterr().err


def test_a_range_of_seeds_has_both_ends() -> None:
    assert seed_range("2000-2002") == range(2000, 2003) and seed_range("7") == range(7, 8)
    for wrong, says in (("a-b", "no range"), ("5-", "no range"), ("5-3", "smaller number first"), ("", "no range")):
        with pytest.raises(StudioError, match=says):
            seed_range(wrong)
