"""What is shipped as evidence is of the shipped base and of the claims as they are written now."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.evaluate import study
from pipelines.evaluate.claim import claim_names, get_claim
from pipelines.evaluate.claim_page import table
from pipelines.model import load_model

FOLDER = study.SHIPPED


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    data = json.loads((FOLDER / "claims.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = data["claims"]
    return found


def test_it_is_of_the_shipped_base_and_of_seeds_that_chose_nothing(results: dict[str, Any]) -> None:
    fingerprint = load_model("toybox").fingerprint
    for name, result in results.items():
        claim = get_claim(name)
        assert result["base"] == fingerprint, f"{name} was measured on another base"
        assert json.loads(json.dumps(study._grid(claim))) == result["search"]["grid"], f"{name}: another search"
        assert result["seeds"] == [claim.seeds.start, claim.seeds.stop - 1] and not result["quick"]
        assert not set(result["search"]["seeds"]) & set(claim.seeds)
        kept = json.loads((FOLDER / "search" / f"{name}.json").read_text(encoding="utf-8"))
        assert kept["chosen"] == result["search"]["chosen"] and kept["base"] == fingerprint


def test_the_page_says_what_the_numbers_say_and_its_pictures_are_there(results: dict[str, Any]) -> None:
    page = (FOLDER / "claims.md").read_text(encoding="utf-8")
    assert "\n".join(table(results)) in page
    files = [line.partition("](")[2].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert files and all((FOLDER / file).is_file() for file in files)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in claim_names():
        told = results[name]["replicates"] or f"**{name}.**" in readme if name in results else f"`{name}`" in readme
        assert told, f"{name} did not replicate, and assets/evidence/README.md gives no reason"
