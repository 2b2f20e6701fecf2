"""Concepts as cards and as a table of facts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from typing import Any

from pipelines import Entry
from studio.parts.cards import Card
from studio.parts.pictures import thumbnail

MOST = 60  # cards on a page; the search finds the others


def concept_cards(entries: Sequence[Entry], loaded: str) -> list[Card]:
    """One card each; those made for another base than the `loaded` fingerprint say so."""
    return [
        Card(
            id=entry.id,
            title=entry.concept.name,
            text=f"{', '.join(subject.noun for subject in entry.concept.subjects)} · {entry.concept.method}",
            image=thumbnail(entry.preview) if entry.preview else "",
            badge="other base" if not fits(entry, loaded) else "",
        )
        for entry in entries[:MOST]
    ]


def fits(entry: Entry, loaded: str) -> bool:
    """Whether a concept may be used on the base of that fingerprint; unknown ones may be tried."""
    mine = entry.concept.base_model.get("fingerprint", "")
    return not mine or not loaded or mine == loaded


def concept_facts(entry: Entry, loaded: str, base: str) -> str:
    """What a concept is: picture, words, base, recipe."""
    concept = entry.concept
    picture = (
        f'<img src="{thumbnail(entry.preview, 512)}" alt="{escape(concept.name, quote=True)}">' if entry.preview else ""
    )
    warning = ""
    if not fits(entry, loaded):
        mine = concept.base_model.get("id") or "another base"
        warning = (
            f'<p class="message advice">Made for {escape(mine)}; loaded is {escape(base)}. Load its base to use it.</p>'
        )
    elif not concept.base_model.get("fingerprint"):
        warning = '<p class="message advice">It doesn’t say for which base it was made. It may not work.</p>'
    return f'<div class="concept">{picture}<div><h3>{escape(concept.name)}</h3>{_facts(entry)}{warning}</div></div>'


def _facts(entry: Entry) -> str:
    concept = entry.concept
    tokens = ", ".join(f"{subject.token} ({subject.noun})" for subject in concept.subjects)
    facts: dict[str, Any] = {
        "In a prompt": tokens,
        "Method": concept.method,
        "Base": concept.base_model.get("id") or "unknown",
        "Made": time.strftime("%d %b %Y, %H:%M", time.localtime(concept.created)),
        "Seed": concept.seed,
        "Size": f"{entry.size / 1e6:.2f} MB",
    }
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    params = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in concept.params.items())
    recipe = f'<details><summary>Recipe</summary><dl class="facts">{params}</dl></details>' if params else ""
    notes = concept.recipe.get("notes")
    rows_of_notes = "".join(f"<li>{escape(str(note))}</li>" for note in notes) if isinstance(notes, list) else ""
    told = f'<ul class="notes">{rows_of_notes}</ul>' if rows_of_notes else ""
    return f'<dl class="facts">{rows}</dl>{told}{recipe}'
