"""Starting the studio: arguments, login, port, what is served; and the parts that need no browser."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

from pipelines import Progress, StudioError, Workspace, tokenize
from studio.datasets import Datasets, with_mask
from studio.jobs import JobRunner
from studio.page import Memory, _recalled
from studio.parts.cards import Card, cards_markup
from studio.parts.chips import chips_markup, split
from studio.parts.jobstrip import JobLine, jobs_markup
from studio.parts.live import train_markup
from studio.parts.message import answering, problem
from studio.parts.pictures import data_uri, thumbnail
from studio.parts.plot import loss_plot
from studio.parts.runs import runs_markup
from studio.parts.scrubber import payload
from studio.render import View, fold
from studio.serve import Address, credentials, free_port, launch_options
from studio.session import Studio
from studio.tabs.train import _live
from studio.work import Training, start_change_of_base, start_training, start_warming
from tests.browser.server import HOST, running
from tests.concepts import trained
from tests.tiny import tiny_folder, tiny_tokenizer

ROOT = Path(__file__).parents[1]
NASTY = "<img src=x onerror=alert(1)>\"'${1+1}{{x}}"


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "ATTUNE_AUTH"}
    return subprocess.run(
        [sys.executable, "app.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip


def test_help_needs_no_engine() -> None:
    done = start("--help")
    assert done.returncode == 0 and "--workspace" in done.stdout and "--listen" in done.stdout


def test_the_network_needs_a_login(tmp_path: Path) -> None:
    done = start("--listen", "--workspace", str(tmp_path / "w"))
    assert done.returncode == 2 and "--auth user:password" in done.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("given", ["nobody", ":password", "user:", "user:short"])
def test_a_bad_login_is_refused(given: str) -> None:
    with pytest.raises(StudioError, match="user:password"):
        credentials(Address("0.0.0.0", auth=given))


def test_login_only_where_others_can_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTUNE_AUTH", raising=False)
    assert credentials(Address("127.0.0.1")) is None
    assert credentials(Address("::1")) is None
    assert credentials(Address("0.0.0.0", auth="me:a:long:one")) == ("me", "a:long:one")
    monkeypatch.setenv("ATTUNE_AUTH", "me:from the environment")
    assert credentials(Address("192.168.1.5")) == ("me", "from the environment")


def test_a_taken_port_makes_way_for_the_next() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) > port
    with pytest.raises(StudioError, match="no port"):
        free_port("127.0.0.1", 70000)


def test_nothing_is_served_or_sent_beyond_the_page(tmp_path: Path) -> None:
    studio = Studio(Workspace(tmp_path / "w"))
    try:
        options = launch_options(studio)
    finally:
        studio.close()
    assert options["allowed_paths"] == [] and options["blocked_paths"] == [str(tmp_path / "w")]
    assert options["strict_cors"] and not options["run_history"] and not options["ssr_mode"] and not options["share"]


def test_it_starts_without_weights_behind_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No base, no example: the page is there all the same, and only for those who know the password."""
    monkeypatch.setenv("ATTUNE_AUTH", "me:password")
    port = free_port("127.0.0.1", 18600)
    with running(tmp_path / "w", tmp_path / "no base", tmp_path / "no example", port):
        with pytest.raises(HTTPError) as refused:
            urllib.request.urlopen(f"http://{HOST}:{port}/config", timeout=30)
        refused.value.close()
        assert refused.value.code == 401
    assert (tmp_path / "w" / "attune.log").exists()


def test_a_missing_base_is_told_and_the_present_one_stays(tmp_path: Path) -> None:
    studio = Studio(Workspace(tmp_path / "w"), base=str(tmp_path / "nowhere"))
    try:
        start_warming(studio)
        (job,) = studio.jobs.jobs()
        assert job.wait(120) and job.state == "failed"
        assert "nowhere" in studio.base.error and studio.base.model is None
        start_warming(studio)  # it isn't tried again and again
        assert len(studio.jobs.jobs()) == 1
        change = start_change_of_base(studio, str(tiny_folder(tmp_path / "tiny")))
        assert change.wait(120) and change.state == "done", change.error
        model, tokenizer = studio.base.model, studio.base.tokenizer
        assert studio.base.error == "" and model is not None and tokenizer is not model.tokenizers[0]
        again = start_change_of_base(studio, str(tmp_path / "nowhere"))
        assert again.wait(120) and again.state == "failed" and studio.base.model is model
    finally:
        studio.close()


def test_a_studio_error_is_told_in_place_and_a_bug_is_not_swallowed() -> None:
    import gradio as gr

    @answering(2)
    def handler(kind: str) -> tuple[str, ...]:
        if kind == "user":
            raise StudioError("Do it <b>so</b>.")
        raise KeyError("x")

    *others, message = handler("user")
    assert len(others) == 2 and message == problem("Do it <b>so</b>.") and "&lt;b&gt;" in message
    with pytest.raises(gr.Error, match="bug in Attune \\(KeyError\\)"):
        handler("bug")


class Tags(HTMLParser):
    """The elements of some markup, and nothing that was only text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_what_people_type_stays_text() -> None:
    view = fold(View(), [Progress(NASTY, step, 9, {NASTY: 1.0}) for step in (1, 2)])
    markups = [
        cards_markup([Card(NASTY, NASTY, NASTY, badge=NASTY)], chosen=NASTY, empty=NASTY),
        cards_markup([], empty=NASTY),
        chips_markup(split(NASTY, None), [NASTY]),
        jobs_markup([JobLine(NASTY, NASTY, True, 0.5, NASTY)]),
        loss_plot(view.curves, 9),
        problem(NASTY),
    ]
    for markup in markups:
        for tag, attributes in Tags(markup).found:
            assert tag not in ("img", "script") and not any(name.startswith("on") for name in attributes), markup
    (card,) = [attributes for tag, attributes in Tags(markups[0]).found if tag == "button"]
    assert card["data-id"] == NASTY


def test_chips_show_sub_words_and_what_is_cut() -> None:
    tokenizer = tiny_tokenizer()
    chips = split("a photo of <my-cat> and mushroom, teapot", tokenizer)
    pieces = {chip.word: chip.pieces for chip in chips}
    assert pieces["<my-cat>"] == ("<my-cat>",) and pieces["photo"] == ("photo",)
    assert len(pieces["mushroom"]) > 1 and "".join(pieces["mushroom"]) == "mushroom"
    assert all(chip.kept for chip in chips)
    long = " ".join(["photo"] * 90)
    read = tokenize(tokenizer, long)
    lost = [chip for chip in split(long, tokenizer) if not chip.kept]
    assert len(lost) == 90 - 75 == len(read.truncated.split())
    markup = chips_markup(split(long, tokenizer), [])
    assert "Too long" in markup and "disabled" in markup


def test_a_plot_needs_two_points_and_ignores_one_wild_value() -> None:
    assert loss_plot({"loss": ((1, 0.5),)}, 10) == ""
    curve = tuple((step, 1.0 if step != 50 else 1e6) for step in range(1, 100))
    tallest = max(float(value) for value in re.findall(r'x="40" [^>]*>([\d.e+]+)<', loss_plot({"loss": curve}, 99)))
    assert tallest < 2


def test_thumbnails_are_small_copies(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), "red").save(tmp_path / "big.png")
    assert thumbnail(tmp_path / "big.png", 64).startswith("data:image/png;base64,")
    assert thumbnail(tmp_path / "missing.png") == ""
    assert len(data_uri(Image.new("RGB", (900, 600)), 256)) < 20_000


def test_the_scrubber_gets_every_track(tmp_path: Path) -> None:
    site = {"site": "down.0", "place": "down", "grid": [8, 8], "top": 0.5}
    tracks = [{"site": None, "head": None, "place": None, "grid": [8, 8], "top": 0.4}]
    tracks += [site | {"head": head} for head in (None, 0, 1)]
    index = {"label": "cat", "cell": [8, 8], "steps": [0, 1], "tracks": tracks}
    data = json.loads(payload("data:,", ["cat", "dog"], np.zeros((32, 24), np.uint8), index, True))
    assert data["word"] == "cat" and data["sites"] == [["down.0", "down 8×8"]] and len(data["tracks"]) == 4


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def test_photo_sets_take_all_or_nothing(tmp_path: Path) -> None:
    sets = Datasets(Workspace(tmp_path / "w"))
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(StudioError, match="bad.png"):
        sets.add([picture(tmp_path / "a.png"), tmp_path / "bad.png"], "mine")
    assert sets.all() == []
    mask = picture(tmp_path / "a-masklabel.png", colour="white")
    (tmp_path / "a.txt").write_text("a photo of <it>")
    dataset, _ = sets.add([tmp_path / "a.png", mask, tmp_path / "a.txt"], "Mine: <b>")
    (photo,) = sets.photos(dataset)
    assert photo.caption == "a photo of <it>" and list(photo.masks) == [""]
    assert [each.title for each in sets.all()] == ["Mine: <b>"]
    for alone in (tmp_path / "a.txt", mask):
        with pytest.raises(StudioError, match=f"no photo among what you added, only {alone.name}") as told:
            sets.add([alone], "x")
        assert "/" not in str(told.value)
    sets.add([tmp_path / "a.txt"], "", dataset)
    assert len(sets.all()) == 1
    with pytest.raises(StudioError, match="mask"):
        sets.add([picture(tmp_path / "b.png"), picture(tmp_path / "b-masklabel.png", (9, 9), "white")], "", dataset)
    assert len(sets.photos(dataset)) == 1


def test_photos_are_captioned_and_removed_by_listing_only(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    sets = Datasets(workspace)
    (tmp_path / "other.png").write_bytes(b"outside")
    dataset, _ = sets.add([picture(tmp_path / "a.png"), picture(tmp_path / "a-masklabel.png", colour="white")], "x")
    sets.caption(dataset, "a.png", "  two\n words ")
    assert sets.photos(dataset)[0].caption == "two words"
    for forged in ("../../../other.png", str(tmp_path / "other.png"), "a.txt", ""):
        with pytest.raises(StudioError):
            sets.remove(dataset, forged)
    for forged in ("..", "../runs", "/", ""):
        with pytest.raises(StudioError):
            sets.photos(forged)
    sets.remove(dataset, "a.png")
    assert sets.photos(dataset) == []
    assert {path.name for path in workspace.trash.rglob("a*") if path.is_file()} == {
        "a.png",
        "a.txt",
        "a-masklabel.png",
    }
    assert (tmp_path / "other.png").exists()


def test_captions_are_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    """They used to be cut at 2000 characters."""
    sets = Datasets(Workspace(tmp_path / "w"))
    dataset, _ = sets.add([picture(tmp_path / "a.png")], "x")
    long = [f"a photo of a cat, number {number}, on a table in the garden by the house" for number in range(100)]
    sets.caption(dataset, "a.png", "\n\n".join(long))
    assert (sets.photos(dataset)[0].caption or "").splitlines() == long
    for text in ("\n\n".join(long * 2), "é" * 5001):  # bytes count, as where they are read
        with pytest.raises(StudioError, match="a.png: the captions are 1.* bytes long, and 10,000 are read at most"):
            sets.caption(dataset, "a.png", text)
    assert (sets.photos(dataset)[0].caption or "").splitlines() == long


@pytest.mark.parametrize("name", ["bad:name.png", "x.gif", "x.png.exe"])
def test_odd_file_names_are_refused(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "fine.png").rename(tmp_path / name)
    with pytest.raises(StudioError):
        Datasets(Workspace(tmp_path / "w")).add([tmp_path / name], "x")


def test_masks_leave_the_subject_as_it_is(tmp_path: Path) -> None:
    sets = Datasets(Workspace(tmp_path / "w"))
    mask = np.zeros((30, 40), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(tmp_path / "a-masklabel.png")
    dataset, _ = sets.add([picture(tmp_path / "a.png"), tmp_path / "a-masklabel.png"], "x")
    shown = np.asarray(with_mask(sets.photos(dataset)[0]))
    assert (shown[:, :20] == (255, 0, 0)).all() and (shown[:, 20:, 0] < 200).all()


def test_a_training_is_refused_before_it_is_queued(tmp_path: Path) -> None:
    studio = Studio(Workspace(tmp_path / "w"), example=tmp_path / "none")
    try:
        with pytest.raises(StudioError, match="example photos"):
            start_training(studio, Training("example", "cat", "my-cat", "svdiff"))
        with pytest.raises(StudioError):
            start_training(studio, Training("../../etc", "cat", "my-cat", "svdiff"))
        assert studio.jobs.jobs() == []
    finally:
        studio.close()


def test_a_run_that_is_over_says_how_its_concept_is_written(tmp_path: Path) -> None:
    """Which needn't be the word that was asked for; also when it was stopped, where nothing more can be noted."""
    studio = Studio(Workspace(tmp_path / "w"))
    try:
        studio.library.save(trained("both", "<my-cat>"))
        job = studio.jobs.submit("Train my-cat", lambda: [Progress("x", 1, 2)], kind="train")
        assert job.wait(30) and "is in the library" not in _live(studio)
        one = trained("my-cat")
        studio.library.save(replace(one, concept=replace(one.concept, recipe={"run": job.id, "steps_done": 1})))
        assert "my-cat is in the library. Write &lt;my-cat-2&gt; in a prompt." in _live(studio)
    finally:
        studio.close()


def test_what_a_browser_remembers_is_not_trusted(tmp_path: Path) -> None:
    import gradio as gr

    fields: list[Any] = ["a", "b"]

    def whole(values: list[Any]) -> list[Any]:
        return [int(values[0]), str(values[1])]

    memory = Memory("x", fields, [], whole, fields)
    assert _recalled(memory, '["3", "y"]') == [3, "y"]
    for broken in ("", None, "[]", "[1]", "{}", "nonsense", '["x", "y"]', "[null, 1]", "[[], {}]", "3"):
        assert all(value == gr.skip() for value in _recalled(memory, broken)), broken


def test_a_failed_job_says_why_in_its_panel(tmp_path: Path) -> None:
    runner = JobRunner(Workspace(tmp_path / "w"))

    def fail() -> list[Progress]:
        raise StudioError("Do <this>.")

    try:
        job = runner.submit("Train x", fail, kind="train")
        assert job.wait(30)
        assert "Do &lt;this&gt;." in train_markup(job, View())
        assert runs_markup([replace(job.record, meta={"name": "x"})]).count("Do &lt;this&gt;.") == 1
    finally:
        runner.close()
