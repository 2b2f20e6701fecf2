"""What a claim's cases come to: the arms' means, the comparisons, and the file that says so, <claim>.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import StudioError
from pipelines.evaluate.claim import Claim, Outcome, claim_names
from pipelines.evaluate.paired import mean_of, paired

if TYPE_CHECKING:
    from pipelines.evaluate.lab import Lab


def finished(lab: Lab) -> dict[str, dict[str, Any]]:
    """The results that lie in the folder, of this base and as quick as this run."""
    same = {"base": lab.model.fingerprint, "quick": lab.quick}
    found = [read_record(lab.folder / f"{name}.json") for name in claim_names()]
    return {one["name"]: one for one in found if one and {key: one.get(key, False) for key in same} == same}


def check_folder(lab: Lab) -> None:
    """StudioError where a quick run would write over a full one."""
    full = [
        name for name in claim_names() if (kept := read_record(lab.folder / f"{name}.json")) and not kept.get("quick")
    ]
    if lab.quick and full:
        raise StudioError(f"{lab.folder} holds a full run ({', '.join(full)}). Choose another folder for a quick one.")


def read_record(path: Path) -> dict[str, Any] | None:
    """A record of ours; None where there is none, or it was cut off."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def result_of(
    lab: Lab, claim: Claim, seeds: range, search: dict[str, Any], found: dict[str, list[Outcome]]
) -> dict[str, Any]:
    """A claim's result as plain JSON data, from every arm's outcomes in the order of the seeds."""
    values = {name: [outcome.values for outcome in outcomes] for name, outcomes in found.items()}
    checks = []
    for check in claim.checks:
        if not {check.arm, check.over} <= values.keys():
            continue
        compared = paired(values[check.arm], values[check.over], check.measure)
        about = {"measure": check.measure, "arm": check.arm, "over": check.over, "decides": check.decides}
        holds = None if lab.quick else compared.holds(check)
        checks.append({"claim": check.words, **about, "result": compared.to_json(), "holds": holds})
    deciding = [one["holds"] for one in checks if one["decides"]]
    kept = list(dict.fromkeys([*claim.shown, *(check.measure for check in claim.checks)]))
    arms = {name: {key: _rounded(mean_of(rows, key)) for key in claim.shown} for name, rows in values.items()}
    return {
        "name": claim.name,
        "title": claim.title,
        "paper": claim.paper,
        "about": claim.about,
        "seeds": [seeds.start, seeds.stop - 1],
        "n": len(seeds),
        "base": lab.model.fingerprint,
        "search": search,
        "arms": arms,
        "checks": checks,
        "quick": lab.quick,
        "replicates": None if None in deciding else all(deciding),
        "cases": [
            {"seed": seed, "arm": name, **{key: _rounded(rows[number].get(key, float("nan"))) for key in kept}}
            for number, seed in enumerate(seeds)
            for name, rows in values.items()
        ],
    }


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
