"""Measures claims: chooses each arm's settings on tuning seeds, runs the reporting seeds once, and compares in pairs.

Everything that is done lies in the folder at once, so that a study may be stopped anywhere and goes on with the same
command:

concepts/                 what was learned, shared by all claims
search/<claim>.json       the grid, every try and the choice
cases/<claim>/            one record a seed and arm, with its pictures
<claim>.json              the result
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import StudioError
from pipelines.evaluate.claim import FIRST, TUNING, Arm, Claim, Outcome, Settings, get_claim
from pipelines.evaluate.crew import command_of, helped, taken
from pipelines.evaluate.outcome import read_record, result_of
from pipelines.events import Event, Finished, Note, Progress
from pipelines.files import write_json

if TYPE_CHECKING:
    from pipelines.evaluate.lab import Lab

SHIPPED = Path(__file__).parents[2] / "assets" / "evidence"
CASES, SEARCH = "cases", "search"
TUNED = range(1000, 1010)  # subjects that methods' presets were chosen on
QUICK_SEEDS = 1  # of a quick run, times what a claim says is quick for it


@dataclass
class Study:
    """What to measure. `seeds` None = each claim's own; `minutes` 0 = until it is done; `helpers` work at once."""

    claims: Sequence[str]
    seeds: range | None = None
    minutes: float = 45.0
    helpers: int = 1
    spare: float = 0.0  # minutes of `minutes` that are left for what is under way when the time is up
    began: float = field(default_factory=time.monotonic)
    units: list[float] = field(default_factory=list)  # seconds of those done in this part

    @property
    def over(self) -> bool:
        """Whether this part's time is up."""
        return self.minutes > 0 and time.monotonic() - self.began > 60 * (self.minutes - self.spare)

    @property
    def left(self) -> float:
        """Minutes of this part that are left, 0 = no end."""
        spent = (time.monotonic() - self.began) / 60
        return max(0.01, self.minutes - self.spare - spent) if self.minutes else 0.0


@dataclass(frozen=True)
class Unit:
    """One arm in one case: the smallest piece of work, with the file that records it."""

    claim: str
    seed: int
    arm: Arm
    settings: Settings
    record: Path


class PartOver(Exception):
    """This part's time is up; what is done is kept."""


def study(lab: Lab, wish: Study) -> Iterator[Event]:
    """Measure; ends with Finished({"finished", "claims": {name: result}}). StudioError for unknown claims."""
    results: dict[str, Any] = {}
    chosen = [get_claim(name) for name in wish.claims]
    try:
        if lab.quick:  # too few subjects to share a claim's among the helpers: they share the claims
            work = [unit for claim in chosen for unit in _cases(lab, claim, _seeds(lab, wish, claim))]
            yield from helped(wish, "all claims", CASES, work, command_of(lab.folder, wish, wish.claims, True))
        for claim in chosen:
            results[claim.name] = yield from measured(lab, wish, claim)
    except PartOver:
        yield Note("This part's time is up. Run the same command again to go on.")
    yield Finished({"finished": len(results) == len(chosen), "quick": lab.quick, "claims": results})


def measured(lab: Lab, wish: Study, claim: Claim) -> Generator[Event, None, dict[str, Any]]:
    """One claim's result, also written as <claim>.json."""
    search = yield from searched(lab, wish, claim)
    seeds = _seeds(lab, wish, claim)
    found: dict[str, list[Outcome]] = {arm.name: [] for arm in _arms(lab, claim)}
    work = _cases(lab, claim, seeds)
    yield from helped(wish, claim.name, CASES, work, command_of(lab.folder, wish, [claim.name], lab.quick))
    for done, unit in enumerate(work, start=1):
        yield from _lasting(wish, claim.name, done, len(work))
        found[unit.arm.name].append(_case(lab, claim, unit))
    result = result_of(lab, claim, seeds, search, found)
    write_json(lab.folder / f"{claim.name}.json", result)
    return result


def help_out(lab: Lab, wish: Study, part: str) -> None:
    """A helper's part, "stage:process id of the main one:folder where helpers agree": records alone."""
    stage, main, place = part.split(":", 2)
    work: list[Unit] = []
    for claim in map(get_claim, wish.claims):
        work += _tries(lab, claim) if stage == SEARCH else _cases(lab, claim, _seeds(lab, wish, claim))
    for unit in taken(work, Path(place)):
        if wish.over or os.getppid() != int(main):
            return
        _case(lab, get_claim(unit.claim), unit)


def searched(lab: Lab, wish: Study, claim: Claim) -> Generator[Event, None, dict[str, Any]]:
    """Every arm's settings: kept, shipped, or chosen now on tuning seeds, the same number of tries for each arm."""
    kept = _found_search(lab, claim)
    if kept or lab.quick:  # no time to search
        return kept or _unsearched(claim)
    grid, tries = _grid(claim), []
    units = _tries(lab, claim)
    yield from helped(wish, claim.name, SEARCH, units, command_of(lab.folder, wish, [claim.name], lab.quick))
    found: dict[tuple[str, str], list[float]] = {}
    for done, unit in enumerate(units, start=1):
        yield from _lasting(wish, f"{claim.name}: search", done, len(units))
        merit = claim.merit(_case(lab, claim, unit).values)
        found.setdefault((unit.arm.name, json.dumps(unit.settings)), []).append(merit)
    for (name, settings), merits in found.items():
        tries.append({"arm": name, "settings": json.loads(settings), "merit": round(float(np.mean(merits)), 4)})
    chosen = {name: _best(tries, name, options) for name, options in grid.items()}
    about = {"base": lab.model.fingerprint, "seeds": list(_tuning(claim)), "grid": grid, "tries": tries}
    write_json(lab.folder / SEARCH / f"{claim.name}.json", about | {"chosen": chosen})
    return about | {"chosen": chosen}


def _grid(claim: Claim) -> dict[str, list[dict[str, Any]]]:
    return {arm.name: [dict(one) for one in arm.grid] for arm in claim.arms if not arm.like}


def _found_search(lab: Lab, claim: Claim) -> dict[str, Any] | None:
    """A search of the same grid on the same base, from before or shipped."""
    grid = json.loads(json.dumps(_grid(claim)))
    for folder in (lab.folder, SHIPPED):
        kept = read_record(folder / SEARCH / f"{claim.name}.json")
        if kept and kept["grid"] == grid and kept["base"] == lab.model.fingerprint:
            return kept
    return None


def _unsearched(claim: Claim) -> dict[str, Any]:
    """The middle of each grid."""
    grid = _grid(claim)
    return {"grid": grid, "tries": [], "chosen": {name: _middle(tries) for name, tries in grid.items()}}


def _tries(lab: Lab, claim: Claim) -> list[Unit]:
    """Every setting of every arm on every tuning seed, where there is something to choose."""
    grid = _grid(claim)
    arms = [(arm, one) for arm in claim.arms if not arm.like for one in grid[arm.name] if len(grid[arm.name]) > 1]
    return [_unit(lab, claim, arm, seed, one, SEARCH) for arm, one in arms for seed in _tuning(claim)]


def _cases(lab: Lab, claim: Claim, seeds: range) -> list[Unit]:
    """Every arm in every case, with what was chosen for it."""
    chosen, arms = (_found_search(lab, claim) or _unsearched(claim))["chosen"], _arms(lab, claim)
    return [_unit(lab, claim, arm, seed, chosen[arm.like or arm.name], CASES) for seed in seeds for arm in arms]


def _arms(lab: Lab, claim: Claim) -> list[Arm]:
    return [arm for arm in claim.arms if not (lab.quick and arm.extra)]


def _unit(lab: Lab, claim: Claim, arm: Arm, seed: int, settings: Settings, stage: str) -> Unit:
    tag = "" if stage == CASES else "-" + "-".join(str(value) for value in settings.values())
    return Unit(claim.name, seed, arm, settings, lab.folder / stage / claim.name / f"{_stem(seed, arm.name)}{tag}.json")


def _tuning(claim: Claim) -> range:
    return getattr(claim, "tuning", TUNING)


def _best(tries: Sequence[dict[str, Any]], arm: str, options: Sequence[Settings]) -> dict[str, Any]:
    own = [one for one in tries if one["arm"] == arm]
    return dict(max(own, key=lambda one: one["merit"])["settings"]) if own else _middle(options)


def _middle(options: Sequence[Settings]) -> dict[str, Any]:
    return dict(options[len(options) // 2]) if options else {}


def _seeds(lab: Lab, wish: Study, claim: Claim) -> range:
    """StudioError for seeds on which settings were chosen: a verdict on those would say nothing."""
    if wish.seeds is not None:
        tuned = range(min(TUNED.start, _tuning(claim).start), max(TUNED.stop, _tuning(claim).stop))
        if not lab.quick and set(wish.seeds) & set(tuned):
            raise StudioError(
                f"Settings were chosen on seeds {tuned.start} to {tuned.stop - 1}, so nothing is shown on them. Choose "
                f"others, as from {FIRST} on."
            )
        return wish.seeds
    return claim.seeds[: QUICK_SEEDS * getattr(claim, "quick", 1)] if lab.quick else claim.seeds


def _lasting(wish: Study, stage: str, step: int, total: int) -> Iterator[Progress]:
    """Progress before each unit, with the time that the rest will take; raises when this part is over."""
    if wish.over:
        raise PartOver
    now = time.monotonic() - wish.began
    wish.units.append(now)
    pace = now / (len(wish.units) - 1) if len(wish.units) > 1 else None
    yield Progress(stage, step - 1, total, eta=None if pace is None else pace * (total - step + 1))


def _case(lab: Lab, claim: Claim, unit: Unit) -> Outcome:
    """One arm in one case, from its record where it was run before with the same settings, base and pace."""
    from PIL import Image

    path, folder = unit.record, unit.record.parent
    same = {"settings": dict(unit.settings), "base": lab.model.fingerprint, "quick": lab.quick}
    kept = read_record(path)
    if kept and {key: kept[key] for key in same} == json.loads(json.dumps(same)):
        values = {name: float("nan") if value is None else value for name, value in kept["values"].items()}
        pictures = {name: np.asarray(Image.open(folder / file)) for name, file in kept["pictures"].items()}
        return Outcome(values, pictures)
    outcome = claim.run(lab, unit.arm, unit.seed, unit.settings)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: f"{path.stem}-{number}.png" for number, name in enumerate(outcome.pictures)}
    for name, picture in outcome.pictures.items():
        Image.fromarray(picture).save(folder / files[name])
    values = {name: float(value) if np.isfinite(value) else None for name, value in outcome.values.items()}
    write_json(path, same | {"values": values, "pictures": files})
    return outcome


def case_pictures(folder: Path, claim: str, seed: int, arm: str) -> Iterator[tuple[str, Path]]:
    """(caption, file) of what one arm painted in one case."""
    kept = read_record(folder / CASES / claim / f"{_stem(seed, arm)}.json")
    for caption, file in (kept or {}).get("pictures", {}).items():
        yield caption, folder / CASES / claim / file


def _stem(seed: int, arm: str) -> str:
    return f"{seed}-{arm.replace(' ', '-')}"
