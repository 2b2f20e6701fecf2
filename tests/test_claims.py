"""Claims: paired comparisons, the equal search, records that a study goes on from, and a walk through every claim."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import StudioError
from pipelines.evaluate import outcome
from pipelines.evaluate import study as studies
from pipelines.evaluate.claim import Arm, Check, Outcome, claim_names, get_claim
from pipelines.evaluate.claim_page import table, write_evidence
from pipelines.evaluate.lab import Lab, Lesson
from pipelines.evaluate.paired import mean_of, paired
from pipelines.evaluate.study import Study, study
from pipelines.events import Finished, Note
from pipelines.model import Model, load_model
from pipelines.toybox.photos import Shoot
from tests import tiny

NAN = float("nan")


@dataclass
class Coin:
    """A claim without any model: "good" is its setting above the seed's noise, and `runs` counts what was measured."""

    name: str = "coin"
    order: int = 1
    title: str = "Coin"
    paper: str = "https://example.org"
    about: str = "For tests."
    seeds: range = range(20, 26)
    shown: tuple[str, ...] = ("height",)
    arms: tuple[Arm, ...] = (
        Arm("good", ({"lift": 1.0}, {"lift": 3.0}, {"lift": 2.0})),
        Arm("bad", ({"lift": 0.0}, {"lift": 0.5}, {"lift": 0.2})),
        Arm("good again", like="good"),
    )
    checks: tuple[Check, ...] = (Check("height", "good", "bad"), Check("height", "good", "good again", margin=0.1))
    runs: list[tuple[int, str, float]] = field(default_factory=list)

    def merit(self, values: Mapping[str, float]) -> float:
        return values["height"]

    def run(self, lab: Lab, arm: Arm, seed: int, settings: Mapping[str, Any]) -> Outcome:
        self.runs.append((seed, arm.name, settings["lift"]))
        noise = np.random.default_rng(seed).normal()
        picture = np.full((8, 8, 3), seed % 200, np.uint8)
        return Outcome({"height": settings["lift"] + noise, "missing": NAN}, {"all": picture})


@pytest.fixture
def coin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Coin:
    made = Coin()
    monkeypatch.setattr(studies, "get_claim", lambda name: made)
    monkeypatch.setattr(studies, "SHIPPED", tmp_path / "none")
    return made


def ran(lab: Lab, wish: Study | None = None) -> Any:
    *events, last = study(lab, wish or Study(["coin"], minutes=0))
    assert isinstance(last, Finished)
    return last.value | {"notes": [event.text for event in events if isinstance(event, Note)]}


def lab(folder: Path, quick: bool = False) -> Lab:
    return Lab(tiny.tiny_model(), folder, quick)


def test_a_difference_has_an_interval_over_cases() -> None:
    arm = [{"m": value} for value in (1.0, 2.0, 3.0, NAN)]
    over = [{"m": value} for value in (0.5, 1.5, 2.5, 1.0)]
    found = paired(arm, over, "m")
    assert (found.n, found.difference, found.low, found.high) == (3, 0.5, 0.5, 0.5)
    spread = paired([{"m": v} for v in (0.0, 1.0, 2.0)], [{"m": 1.0}] * 3, "m")
    assert spread.low < 0 < spread.high and spread.difference == 0
    assert mean_of(arm, "m") == 2.0 and np.isnan(mean_of(arm, "other"))


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (Check("m", "a", "b"), True),
        (Check("m", "b", "a"), False),
        (Check("m", "a", "b", more=False), False),
        (Check("m", "b", "a", more=False), True),
        (Check("m", "b", "a", margin=0.6), True),
        (Check("m", "b", "a", margin=0.4), False),
        (Check("m", "a", "b", more=False, margin=0.6), True),
    ],
)
def test_a_check_holds_when_the_whole_interval_does(check: Check, holds: bool) -> None:
    values = {"a": [{"m": 1.0}, {"m": 2.0}], "b": [{"m": 0.5}, {"m": 1.5}]}
    assert paired(values[check.arm], values[check.over], "m").holds(check) is holds


def test_one_case_decides_nothing() -> None:
    assert paired([{"m": 1.0}], [{"m": 0.0}], "m").holds(Check("m", "a", "b")) is None
    assert paired([{"m": NAN}], [{"m": 0.0}], "m").holds(Check("m", "a", "b")) is None


def test_an_interval_of_few_cases_has_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(1)
    for n in (6, 12):
        samples = [[{"m": value} for value in chance.normal(1.0, 1.0, n)] for _ in range(400)]
        found = [paired(arm, [{"m": 0.0}] * n, "m") for arm in samples]
        assert np.mean([one.low < 1.0 < one.high for one in found]) > 0.92  # plain percentiles: 0.86 and 0.89


def test_seeds_that_settings_were_chosen_on_are_refused(coin: Coin, tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="seeds 1000 to 1009"):
        ran(lab(tmp_path), Study(["coin"], seeds=range(1004, 1006), minutes=0))
    assert ran(lab(tmp_path, quick=True), Study(["coin"], seeds=range(1004, 1005)))["finished"]


def test_results_of_before_stay_on_the_page_and_a_quick_run_goes_elsewhere(coin: Coin, tmp_path: Path) -> None:
    place = lab(tmp_path)
    assert outcome.finished(place) == {}
    outcome.check_folder(lab(tmp_path, quick=True))
    result = ran(place)["claims"]["coin"]
    (tmp_path / "masks.json").write_text(json.dumps(result | {"name": "masks"}))
    assert list(outcome.finished(place)) == ["masks"] and outcome.finished(lab(tmp_path, quick=True)) == {}
    with pytest.raises(StudioError, match="full run .masks.*another folder"):
        outcome.check_folder(lab(tmp_path, quick=True))


def test_a_persons_pictures_stay(coin: Coin, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("mine.png", "masks-1-raw-0.png"):
        (tmp_path / "pictures" / name).write_bytes(b"x")
    write_evidence(tmp_path, ran(lab(tmp_path))["claims"], "python -m pipelines claims", tmp_path)
    assert (tmp_path / "pictures" / "mine.png").exists() and not (tmp_path / "pictures" / "masks-1-raw-0.png").exists()


def test_every_arm_gets_the_same_tries_and_reports_once(coin: Coin, tmp_path: Path) -> None:
    result = ran(lab(tmp_path))["claims"]["coin"]
    search = result["search"]
    tried = [(one["arm"], one["settings"]["lift"]) for one in search["tries"]]
    assert tried == [("good", 1.0), ("good", 3.0), ("good", 2.0), ("bad", 0.0), ("bad", 0.5), ("bad", 0.2)]
    assert search["chosen"] == {"good": {"lift": 3.0}, "bad": {"lift": 0.5}}
    reported = [run for run in coin.runs if run[0] in coin.seeds]
    assert len(reported) == len(set(reported)) == 3 * len(coin.seeds)
    assert {lift for _, name, lift in reported if name == "good again"} == {3.0}  # takes the other's choice over
    assert not set(search["seeds"]) & set(coin.seeds)
    assert [check["holds"] for check in result["checks"]] == [True, True] and result["replicates"] is True
    assert result["checks"][0]["result"]["difference"] == pytest.approx(2.5)
    assert result["cases"][0].keys() == {"seed", "arm", "height"}


def test_a_study_goes_on_from_its_records(coin: Coin, tmp_path: Path) -> None:
    first = ran(lab(tmp_path))
    count = len(coin.runs)
    assert ran(lab(tmp_path)) == first and len(coin.runs) == count
    (tmp_path / "cases" / "coin" / "22-good.json").write_text("{")  # cut off
    assert ran(lab(tmp_path)) == first and len(coin.runs) == count + 1


def test_a_part_ends_when_its_time_is_up(coin: Coin, tmp_path: Path) -> None:
    over = ran(lab(tmp_path), Study(["coin"], minutes=1, began=-1e6))
    assert not over["finished"] and not over["claims"] and "same command" in over["notes"][0]
    assert ran(lab(tmp_path))["finished"]


def test_a_quick_run_searches_nothing_and_decides_nothing(coin: Coin, tmp_path: Path) -> None:
    result = ran(lab(tmp_path, quick=True))["claims"]["coin"]
    assert result["n"] == 1 and result["replicates"] is None
    assert all(check["holds"] is None for check in result["checks"])
    assert not result["search"]["tries"] and result["search"]["chosen"]["good"] == {"lift": 3.0}


def test_another_base_is_searched_anew(coin: Coin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(lab(tmp_path / "first"))
    monkeypatch.setattr(studies, "SHIPPED", tmp_path / "first")
    coin.runs.clear()
    ran(lab(tmp_path / "second"))
    assert {seed for seed, *_ in coin.runs} == set(coin.seeds)  # what was shipped is used
    kept = tmp_path / "first" / "search" / "coin.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"base": "another"}))
    coin.runs.clear()
    ran(lab(tmp_path / "third"))
    assert {seed for seed, *_ in coin.runs} > set(coin.seeds)


def test_the_page_shows_every_comparison_and_picture(coin: Coin, tmp_path: Path) -> None:
    results = ran(lab(tmp_path))["claims"]
    files = write_evidence(tmp_path / "out", results, "python -m pipelines claims", tmp_path)
    page, text = (tmp_path / "out" / "claims.html").read_text(), (tmp_path / "out" / "claims.md").read_text()
    assert {file.name for file in files} == {"claims.json", "claims.md", "claims.html", "cases.csv"}
    for check in results["coin"]["checks"]:
        assert check["claim"] in page and check["claim"] in text
    shown = list((tmp_path / "out" / "pictures").iterdir())
    assert len(shown) == 10 and all(file.name in text for file in shown)
    assert sum(file.name in page for file in shown) == 9  # the plot stands in the page itself
    assert "height: good above bad: +2.500" in (tmp_path / "out" / "pictures" / "coin-plot.svg").read_text()
    assert "seeds 20 to 25" in page and "seeds 20 to 25" in text
    assert "+2.500 [+2.500, +2.500] | yes" in "\n".join(table(results))


def test_claims_are_well_formed() -> None:
    assert claim_names() == ["masks", "leakage", "extraction", "layout", "alignment", "decoupling", "composition"]
    for name in claim_names():
        claim = get_claim(name)
        arms = {arm.name: arm for arm in claim.arms}
        assert len({len(arm.grid) for arm in claim.arms if arm.grid}) == 1, f"{name}: unequal search"
        assert all(not arm.like or (arms[arm.like].grid and not arm.grid) for arm in claim.arms)
        assert all({check.arm, check.over} <= arms.keys() for check in claim.checks)
        assert any(check.decides for check in claim.checks)
        assert not set(studies._tuning(claim)) & set(claim.seeds)
    assert len(get_claim("masks").seeds) * 2 >= 200
    with pytest.raises(StudioError, match="no claim 'other'"):
        get_claim("other")


@pytest.fixture(scope="module")
def toybox() -> Model:
    return load_model("toybox")


SHORT = {
    "steps": 1,
    "batch_size": 2,
    "embedding_steps": 1,
    "attention_steps": 1,
    "shift_steps": 1,
    "prior_count": 2,
}


@pytest.mark.parametrize("name", ["masks", "leakage", "extraction", "layout", "alignment", "decoupling", "composition"])
def test_every_arm_of_every_claim_runs(name: str, toybox: Model, tmp_path: Path) -> None:
    claim = get_claim(name)
    place = Lab(toybox, tmp_path, quick=True, shorter=SHORT, steps=2)
    arms = {arm.name: arm for arm in claim.arms}
    for arm in [*(arm for arm in claim.arms if not arm.like), claim.arms[-1]]:
        grid = arms[arm.like or arm.name].grid
        outcome = claim.run(place, arm, claim.seeds[0], grid[0] if grid else {})
        checked = {check.measure for check in claim.checks if arm.name in (check.arm, check.over)}
        checked = {key for key in checked if not key.startswith("success, ")}  # of one number of subjects
        assert checked <= outcome.values.keys() and outcome.pictures
        assert np.isfinite(claim.merit(outcome.values))
        assert {key for key in claim.shown if "," not in key} <= outcome.values.keys()


def test_what_was_learned_once_is_not_learned_again(toybox: Model, tmp_path: Path) -> None:
    place = Lab(toybox, tmp_path, shorter=SHORT)
    lesson = Lesson("svdiff", (Shoot((5,), 2),))
    first, again = place.learned(lesson), place.learned(lesson)
    assert len(list((tmp_path / "concepts").iterdir())) == 1 and first.concept == again.concept
    assert all((first.tensors[key] == value).all() for key, value in again.tensors.items())
    place.learned(Lesson("svdiff", (Shoot((5,), 2),), masks="true"))
    assert len(list((tmp_path / "concepts").iterdir())) == 2
