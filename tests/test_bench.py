"""Benches: both sides run alternately, the best counts, and capture is cheap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipelines.bench import bench, compare
from pipelines.benches import bench_names, capture, get_bench
from pipelines.errors import StudioError
from pipelines.events import Finished, Note, Progress
from pipelines.model import Model
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


class Clock:
    """Time passes only while something is done."""

    def __init__(self, costs: dict[str, list[float]]) -> None:
        self.now, self.costs, self.calls = 0.0, costs, []  # type: ignore[var-annotated]

    def work(self, name: str) -> Any:
        def run() -> None:
            costs = self.costs[name]
            self.now += costs[min(self.calls.count(name), len(costs) - 1)]
            self.calls.append(name)

        return run


def test_the_best_of_alternating_runs_counts() -> None:
    clock = Clock({"ours": [90, 3, 5, 4], "reference": [90, 2, 9, 8]})
    found = compare(clock.work("ours"), clock.work("reference"), 3, clock=lambda: clock.now)
    assert found == {"ratio": 1.5, "ours": 3, "reference": 2, "runs": 3}
    assert clock.calls == ["ours", "reference", "ours", "reference", "reference", "ours", "ours", "reference"]
    with pytest.raises(StudioError, match="at least 1"):
        compare(clock.work("ours"), clock.work("reference"), 0)


def test_every_bench_is_found_and_measures() -> None:
    assert "capture" in bench_names()
    assert all(callable(get_bench(name).measure) for name in bench_names())
    with pytest.raises(StudioError, match="capture"):
        get_bench("speed")


def test_the_runner_tells_and_ends_with_the_figures(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = capture.measure
    monkeypatch.setattr(capture, "measure", lambda model: whole(model, steps=2, runs=2))
    threads = torch.get_num_threads()
    note, progress, finished = bench(["capture"], model)
    assert isinstance(note, Note) and "capture" in note.text
    assert isinstance(progress, Progress) and progress.total == 1
    assert isinstance(finished, Finished)
    figures = finished.value["capture"]
    assert figures["runs"] == 2 and figures["ratio"] == pytest.approx(figures["ours"] / figures["reference"])
    assert figures["reference"] > 0 and 0.5 < figures["ratio"] < 3
    assert torch.get_num_threads() == threads
    with pytest.raises(StudioError, match="no bench 'speed'"):
        next(bench(["capture", "speed"], model))


@pytest.mark.slow
def test_capture_costs_at_most_a_twentieth(model: Model) -> None:
    """A UNet of the Toybox base's size; the text width doesn't matter here."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(96, 160, 192), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    assert capture.measure(replace(model, unet=unet.eval()))["ratio"] <= 1.05
