"""A file of prompts in the Generate tab: each line asks for what the prompt box would, and all of them are one job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import Event, Finished, Heatmap, Progress, Request, Snapshot, StudioError, Workspace
from studio.asked import asked, filled
from studio.parts.live import MOST_SHOWN, generate_markup
from studio.parts.painter import Drawn, drawing
from studio.prompt_files import MOST_PROMPTS, Line, _one_job, asked_lines, start_lines, summary, told
from studio.render import View, fold
from studio.session import Studio
from studio.tabs.prompts import _look
from tests.test_studio_layouts import concept, controls
from tests.tiny import tiny_folder


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    yield studio
    studio.close()


def written(folder: Path, *lines: str, name: str = "prompts.txt") -> str:
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder / name)


def test_each_line_asks_for_what_the_box_would(studio: Studio, tmp_path: Path) -> None:
    """With the concepts it names alone, and with the same random seeds for all."""
    for name in ("my-cat", "my-dog"):
        studio.library.save(concept(name))
    file = written(tmp_path, "a photo of {} in snow", "", "  a <my-dog> and a cup ", "a plain cup")
    values = controls(
        prompt="", prompt_file=file, seed="", count=2, concepts=["my-cat"], words=["snow"], negative="x", steps=3
    ) | {"strength-0": 0.5}
    lines = asked_lines(studio, values)
    assert [line.request.prompt for line in lines] == [
        "a photo of <my-cat> in snow",
        "a <my-dog> and a cup",
        "a plain cup",
    ]
    assert [line.where for line in lines] == [f"prompts.txt, line {at}" for at in (1, 3, 4)]
    assert [dict(line.concepts) for line in lines] == [{"my-cat": 0.5}, {"my-cat": 0.5, "my-dog": 1}, {"my-cat": 0.5}]
    assert [line.words for line in lines] == [("snow",), ("<my-dog>",), ()]
    assert len({line.request.seeds for line in lines}) == 1 and summary(lines) == "3 prompts, 6 pictures"
    for line in lines:
        box = values | {"prompt": line.request.prompt, "seed": str(line.request.seeds[0])}
        assert asked(studio, box) == (line.request, line.concepts, line.words)
    assert filled(studio, {"request": lines[0].request.to_json()})["prompt_file"] is None  # a recipe has its own prompt


def test_a_file_that_cannot_be_is_told_by_its_line(studio: Studio, tmp_path: Path) -> None:
    studio.library.save(concept("my-cat"))
    region = drawing([Drawn("cup", np.ones((4, 4), bool))])
    for lines, change, says in (
        (["a cup", "", "a <nobody>"], {}, "prompts.txt, line 3: There is no concept <nobody>"),
        (["a cup", "a {}"], {}, "prompts.txt, line 2: nothing says what {} stands for. Choose a concept"),
        (["a {} and {} and {}"], {"concepts": ["my-cat", "gone"]}, "line 1: 'gone' is not in the library"),
        (["a cup", "a cone"], {"layout": region}, "prompts.txt, line 2: The layout has a region for 'cup'"),
        (["a cup"], {"placed": [{"name": "x"}]}, "residuals of a configuration"),
        (["a cup"], {"seed": "x"}, "The seed 'x'"),
        (["", " "], {}, "'prompts.txt' has no prompt"),
        (["a cup"] * (MOST_PROMPTS + 1), {}, f"has {MOST_PROMPTS + 1} prompts"),
    ):  # fmt: skip
        with pytest.raises(StudioError) as error:
            asked_lines(studio, controls(prompt_file=written(tmp_path, *lines)) | change)
        assert says in str(error.value)
    for content in (b"\x89PNG\r\n\x1a\n\xff", bytes(40), "a cat".encode("utf-16")):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(StudioError, match="'prompts.txt' is no UTF-8 text"):
            told(str(tmp_path / "prompts.txt"))
        assert "no UTF-8 text" in _look(str(tmp_path / "prompts.txt"))[1]
    assert "paints the 2 prompts in prompts.txt instead" in _look(written(tmp_path, "a {}", "<b>"))[1]
    assert studio.jobs.jobs() == []


def test_each_prompt_begins_with_the_things_it_names(studio: Studio, tmp_path: Path) -> None:
    """Cut out of photos chosen here, or brought by a recipe; a prompt that names none of them is told."""
    for name in ("cat", "dog"):
        studio.library.save(concept(name))
    mask = np.zeros((32, 64), np.uint8)
    mask[4:20, 2:30] = 255
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    for name in ("cat", "dog"):
        Image.fromarray(np.roll(mask, 4 * (name == "dog"))).save(tmp_path / f"a-masklabel-{name}.png")
    photos, _ = studio.datasets.add(sorted(tmp_path.glob("a*.png")), "both")
    file = written(tmp_path, "a <cat>", "a <cat> and a <dog>")
    lines = asked_lines(studio, controls(prompt_file=file, start_photos=[photos]))
    words = [line.request.start.words for line in lines if line.request.start]
    assert words == [["<cat>"], ["<cat>", "<dog>"]]
    brought = lines[1].request.to_json()["start"]
    again = asked_lines(studio, controls(prompt_file=file, start=brought))
    assert [line.request for line in again] == [line.request for line in lines]
    for change in ({"start_photos": [photos]}, {"start": brought}):
        with pytest.raises(StudioError, match=r"prompts.txt, line 2: The prompt 'a cup' names none of <cat>"):
            asked_lines(studio, controls(prompt_file=written(tmp_path, "a <cat>", "a cup")) | change)


def test_all_are_painted_by_one_job(studio: Studio, tmp_path: Path) -> None:
    values = controls(prompt_file=written(tmp_path, "a cat", "a dog", "a cup"), count=2, steps=2, words=["dog"])
    job = start_lines(studio, asked_lines(studio, values))
    assert job.title == "Paint 3 prompts of prompts.txt"
    assert job.wait(120) and job.state == "done", job.error
    progress = [(event.step, event.total) for event in job.events if isinstance(event, Progress)]
    assert progress == [(step, 12) for step in range(1, 13)]
    painted = [event.info for event in job.events if isinstance(event, Snapshot) and event.kind == "picture"]
    assert [(info["prompt"], info["seed"]) for info in painted] == [
        (prompt, seed) for prompt in ("a cat", "a dog", "a cup") for seed in (7, 8)
    ]
    assert len(studio.view(job).result) == 6 and sum(isinstance(event, Finished) for event in job.events) == 1
    assert len(list(studio.workspace.results.glob("*/000?.png"))) == 6
    assert "seed 8 · a cup" in generate_markup(job, studio.view(job))


def test_regions_are_those_of_the_present_prompt_and_steps_add_up() -> None:
    """A first pass finds some for every prompt with several concepts; a prompt with none has none."""
    tokens = {"a": ("<a>", "<b>"), "b": ("<c>", "<d>"), "c": ()}
    values = np.zeros((4, 4), np.float32)

    def paint(line: Line) -> Iterator[Event]:
        for picture in range(2):
            if found := tokens[line.request.prompt]:
                yield from (Progress("regions", step, 10) for step in range(1, 11))
                yield from (Heatmap(token, values, step=10) for token in found)
            yield from (Progress("generate", 25 * picture + step, 50) for step in range(1, 26))
            yield Snapshot("picture", np.zeros((4, 4, 3), np.uint8), info={"index": picture})
        yield Finished([])

    view, seen = View(), []
    for event in _one_job([Line(prompt, Request(prompt), [], ()) for prompt in tokens], paint):
        view = fold(view, [event])
        if isinstance(event, Snapshot):
            seen.append((event.kind, tuple(view.regions), view.before + view.step))
    assert [one for one in seen if one[0] == "picture"] == [
        ("picture", ("<a>", "<b>"), 35), ("picture", ("<a>", "<b>"), 70), ("picture", ("<c>", "<d>"), 105),
        ("picture", ("<c>", "<d>"), 140), ("picture", (), 165), ("picture", (), 190),
    ]  # fmt: skip
    assert (view.step, view.total) == (150, 150) and [one[1] for one in seen if one[0] == "prompt"] == [(), ()]


def test_stopped_it_keeps_what_is_done(studio: Studio, tmp_path: Path) -> None:
    """Also after the first prompt, whose end is not the job's."""
    values = controls(prompt_file=written(tmp_path, *["a cat"] * 40), steps=4)
    job = start_lines(studio, asked_lines(studio, values))
    for _, events in job.follow(every=0.01):
        if any(isinstance(event, Snapshot) for event in events):
            job.cancel()
    assert job.state == "stopped"
    assert 0 < len(list(studio.workspace.results.glob("*/0001.png"))) < 40


def test_nothing_is_painted_when_one_of_them_cannot_be(studio: Studio, tmp_path: Path) -> None:
    """What only the loaded base knows: whose concept it is, and what it reads of a long prompt."""
    trained = concept("toby")
    theirs = {"id": "another", "fingerprint": "f" * 64}
    studio.library.save(replace(trained, concept=replace(trained.concept, base_model=theirs)))
    region = drawing([Drawn("cup", np.ones((4, 4), bool))])
    long = " ".join(["a cat"] * 60)
    for lines, change, says in (
        (["a cup", "a <toby>"], {}, "prompts.txt, line 2: 'toby' was trained on another"),
        (["a cup", f"{long} and a cup"], {"layout": region}, "prompts.txt, line 2: 'cup' was cut off"),
        (["a cup"], {"width": 30}, "prompts.txt, line 1: "),
    ):  # fmt: skip
        wanted: dict[str, Any] = controls(prompt_file=written(tmp_path, *lines)) | change
        job = start_lines(studio, asked_lines(studio, wanted))
        assert job.wait(120) and job.state == "failed" and says in job.error, job.error
    assert not list(studio.workspace.results.iterdir())


def test_a_page_shows_the_newest_of_many(studio: Studio) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    made = [Snapshot("picture", image, info={"seed": seed, "index": 0, "prompt": "<b>"}) for seed in range(20)]
    job = studio.jobs.submit("Paint", lambda: [*made, Finished([])], kind="generate")
    assert job.wait(60)
    markup = generate_markup(job, studio.view(job))
    assert markup.count('class="ready"') == MOST_SHOWN and "The newest 16 of 20" in markup
    assert "seed 19 · &lt;b&gt;" in markup and "seed 3 " not in markup
