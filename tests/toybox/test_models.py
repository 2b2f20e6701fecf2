"""The models' parts: tokenizer, the loop that trains them, the judge's plumbing, the whole path in small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.events import Finished, Progress
from pipelines.toybox.fitting import Fit, Plan, rate
from pipelines.toybox.gates import GATES, measure_segmenter, overlap
from pipelines.toybox.judge import ATTRIBUTES, Judge, boxes_of, crop, look
from pipelines.toybox.judge_training import targets
from pipelines.toybox.scenes import scene
from pipelines.toybox.tokenizer import IN_TWO, build_tokenizer
from pipelines.toybox.words import CATEGORIES, COLORS, RARE_WORDS


def test_words_of_the_world_are_one_token_and_some_nouns_two(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for word in (*COLORS, *RARE_WORDS, *(set(CATEGORIES) - set(IN_TWO))):
        assert len(tokenizer.tokenize(word)) == 1, word
    for word, pieces in IN_TWO.items():
        assert tokenizer.tokenize(word) == list(pieces)
    strange = tokenizer("ŧħîş żœö 🐈 words").input_ids
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id == tokenizer.eos_token_id
    assert len(strange) > 10  # spelled out in bytes, not lost
    assert tokenizer.decode(strange[1:-1]).replace(" ", "") == "ŧħîşżœö🐈words"


def _line(steps: int) -> tuple[nn.Linear, Plan]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), Plan("line", steps, 1e-2, 4, warmup=2, half=False)


def test_training_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def losses(model: nn.Linear):
        def step(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
            x = torch.from_numpy(rng.standard_normal((batch, 3), np.float32))
            return {"mse": (model(x) - x.sum(1, keepdim=True)).square().mean()}

        return step

    model, plan = _line(20)
    list(Fit(model, plan, tmp_path / "whole").run(losses(model)))
    cut, _ = _line(20)
    fit = Fit(cut, plan, tmp_path / "cut")
    run = fit.run(losses(cut))
    for _ in range(9):
        next(run)
    fit.save()
    run.close()
    resumed, _ = _line(20)
    again = Fit(resumed, plan, tmp_path / "cut")
    assert again.step == 9
    list(again.run(losses(resumed)))
    assert torch.equal(model.weight, resumed.weight)
    assert torch.equal(
        torch.cat([m.flatten() for m in again.mean]), torch.cat([m.flatten() for m in _means(tmp_path, plan)])
    )


def _means(folder: Path, plan: Plan) -> list[torch.Tensor]:
    return Fit(_line(20)[0], plan, folder / "whole").mean


def test_the_rate_warms_up_stays_and_falls() -> None:
    plan = Plan("x", 100, 1.0, 1, warmup=10, cooldown=0.5)
    assert rate(plan, 0) == pytest.approx(0.1) and rate(plan, 30) == pytest.approx(1.0)
    assert rate(plan, 75) == pytest.approx(0.02 + 0.98 * 0.5) and rate(plan, 100) == pytest.approx(0.02)


def test_a_crop_is_centred_on_its_box() -> None:
    picture = torch.zeros(3, 64, 64)
    picture[:, 20:30, 40:50] = 1
    patch = crop(picture, [40, 20, 50, 30])
    assert patch.shape == (3, 32, 32)
    inner = patch[:, 4:28, 4:28]
    assert inner.min() > 0.99 and patch[:, 0].max() < 0.5


def test_targets_are_read_back_as_the_true_boxes() -> None:
    one = scene("tune", 12, count=4)
    centre, box, weight = targets({"toys": one.toys, "prop": None, "prop_box": None})
    logits = torch.logit(centre[0].clamp(1e-4, 1 - 1e-4))
    found = [b for _, b in boxes_of(logits, box, threshold=0.9)]
    assert weight.sum() > 0 and len(found) == 4
    for toy in one.toys:
        assert max(overlap(toy["box"], b) for b in found) > 0.95


def test_an_untrained_judge_answers_in_the_shape_of_truth() -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    nn.init.constant_(judge.finder.centre.bias, 3.0)
    verdict = look([scene("tune", 1).image, np.zeros((48, 96, 3), np.uint8)], judge)
    assert len(verdict) == 2 and verdict[0].toys
    entry = verdict[1].to_json("x.png")
    assert {"file", "mask", "caption", "background", "toys"} <= set(entry)
    for toy in entry["toys"]:
        assert len(toy["identity"]) == 64 and toy["category"] in ATTRIBUTES["category"]
        assert 0 <= toy["box"][0] <= toy["box"][2] <= 96 and 0 <= toy["box"][1] <= toy["box"][3] <= 48


def test_every_gate_can_fail_and_pass() -> None:
    for gate in GATES:
        better, worse = (gate.aim, gate.must - 1) if gate.higher else (gate.aim, gate.must + 1)
        assert gate.verdict(better)["aim_reached"] and gate.verdict(better)["passed"]
        assert not gate.verdict(worse)["passed"] and not gate.verdict(worse)["aim_reached"]


def test_building_from_nothing_makes_models_that_load_and_paint(tmp_path: Path) -> None:
    """The whole path with a handful of steps; a second call finds everything done."""
    from pipelines.model import load_model
    from pipelines.toybox.build import QUICK, build
    from pipelines.toybox.evaluation import paint

    few = replace(
        QUICK,
        scenes=80,
        vae=replace(QUICK.vae, steps=3),
        clip=replace(QUICK.clip, steps=3),
        clip_vision=replace(QUICK.clip_vision, steps=3),
        base=replace(QUICK.base, steps=3),
        judge=replace(QUICK.judge, steps=2),
        segmenter=replace(QUICK.segmenter, steps=2),
    )
    events = list(build(tmp_path / "state", tmp_path / "toybox", few))
    assert isinstance(events[-1], Finished)
    made = {"judge.safetensors", "segmenter.safetensors", "base/unet/config.json", "clip/config.json"}
    assert made <= set(events[-1].value["files"])
    again = list(build(tmp_path / "state", tmp_path / "toybox", few))
    parts = ("vae", "clip", "clip_vision", "base", "judge", "segmenter")
    assert [event.step for event in again if isinstance(event, Progress) and event.stage in parts] == []
    model = load_model(str(tmp_path / "toybox" / "base"))
    picture = paint(model, "a photo of a red cat", (1,), steps=2)[0]
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8


def test_the_shipped_segmenter_finds_toys_by_click_and_box() -> None:
    values = measure_segmenter(None, share=0.05)
    assert values["segmenter_click"] > 0.8 and values["segmenter_box"] > 0.85
