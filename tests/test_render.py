"""The fold of events into what a page shows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pipelines import Event, Finished, Heatmap, Note, Preview, Progress, Snapshot
from studio.render import MOST_POINTS, View, clock, fold, smoothed

IMAGE = np.zeros((4, 4, 3), np.uint8)


def run(steps: int, stage: str = "learn") -> list[Event]:
    return [Progress(stage, step, steps, {"loss": 1 / step}, eta=float(steps - step)) for step in range(1, steps + 1)]


def test_whole_and_in_pieces_is_the_same() -> None:
    events: list[Event] = [
        *run(7),
        Snapshot("sample", path="a.png", info={"step": 5, "inside": 0.4}),
        Heatmap("<my-cat>", np.ones((2, 2), np.float32), step=5),
        *run(5, "second"),
        Note("a word"),
        Finished("x"),
    ]
    whole, pieces = fold(View(), events), View()
    for event in events:
        pieces = fold(pieces, [event])
    assert whole == pieces
    assert whole.finished and whole.result == "x" and whole.notes == ("a word",)


def test_stages_follow_each_other_on_one_axis() -> None:
    view = fold(View(), [*run(7), *run(5, "second")])
    assert [x for x, _ in view.curves["loss"]] == list(range(1, 13))
    assert (view.stage, view.step, view.total, view.before) == ("second", 5, 5, 7)


def test_a_stage_that_goes_on_after_another_counts_once() -> None:
    """As pictures that each begin with a first pass; a stage that begins anew counts anew."""
    first = [Progress("regions", step, 3) for step in (1, 2, 3)]
    events = [*first, Progress("generate", 4, 8), *first, Progress("generate", 8, 8), *first]
    totals = [view.before + view.step for view in (fold(View(), events[: end + 1]) for end in range(len(events)))]
    assert totals == [1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 17]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint() -> None:
    again = [Progress("learn", step, 10, {"loss": 9.0}) for step in range(4, 8)]
    view = fold(View(), [*run(10)[:6], *again])
    assert [x for x, _ in view.curves["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, value in view.curves["loss"]][3:] == [9.0] * 4


def test_long_curves_stay_bounded_and_keep_their_ends() -> None:
    view = fold(View(), run(5000))
    curve = view.curves["loss"]
    assert len(curve) <= MOST_POINTS
    assert curve[0][0] == 1 and curve[-1][0] == 5000
    assert all(before < after for (before, _), (after, _) in pairwise(curve))


def test_previews_leave_when_their_picture_is_done() -> None:
    previews = [Preview(IMAGE, index, 5, 25) for index in (0, 1)]
    view = fold(View(), [*previews, Snapshot("picture", IMAGE, info={"index": 0, "seed": 3})])
    assert list(view.previews) == [1] and len(view.pictures) == 1
    assert fold(view, [Finished([])]).previews == {}


def test_samples_keep_the_first_and_the_newest() -> None:
    view = fold(View(), [Snapshot("sample", IMAGE, info={"step": step}) for step in range(0, 200, 10)])
    steps = [sample.info["step"] for sample in view.samples]
    assert steps[0] == 0 and steps[-1] == 190 and len(steps) <= 8


def test_attention_inside_the_mask_becomes_a_curve() -> None:
    samples = [Snapshot("sample", IMAGE, info={"step": step, "inside": step / 100}) for step in (10, 20)]
    view = fold(View(), [*run(30)[:20], *samples])
    assert view.curves["inside"] == ((10, 0.1), (20, 0.2))


def test_newest_heatmap_of_each_word() -> None:
    maps = [Heatmap(word, np.full((2, 2), step, np.float32), step=step) for step in (1, 2) for word in ("<a>", "<b>")]
    view = fold(View(), maps)
    assert {word: heat.step for word, heat in view.heatmaps.items()} == {"<a>": 2, "<b>": 2}


def test_checkpoints_are_told() -> None:
    assert fold(View(), [*run(4), Snapshot("checkpoint", path="c", info={"step": 4})]).saved_at == 4


def test_smoothing_is_a_running_mean() -> None:
    assert smoothed(((1, 2.0), (2, 4.0), (3, 6.0)), span=2) == ((1, 2.0), (2, 3.0), (3, 5.0))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (-1, ""),
        (float("nan"), ""),
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3700, "1 h 01 min"),
    ],
)
def test_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text
