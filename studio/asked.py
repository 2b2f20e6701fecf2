"""What the Generate tab asks for: from the values of its controls to a request, and from a recipe back to values."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from pipelines import Request, StudioError, counted_prompt, named_tokens
from studio.layouts import Values, layout_of, layout_values
from studio.parts.chips import split
from studio.session import Studio
from studio.starts import Cut, cutter, start_of

MOST_CONCEPTS = 6
MOST_PICTURES = 16
_SAME = ("prompt", "steps", "guidance", "scheduler", "width", "height")  # in a request under the controls' names
APART = {"when several change weights": None, "always": True, "never": False}
_OPTIONS: dict[str, Any] = {"recur": 0, "ramp": False, "trim": False, "placed": [], "start": None}

Cast = list[tuple[str, float]]


def asked(studio: Studio, values: Values, cut: Cut | None = None) -> tuple[Request, Cast, tuple[str, ...]]:
    """The request, the concepts with their strengths, and the words whose attention is kept.

    `cut` is shared where several prompts begin with the same photos. StudioError in words where the controls ask for
    what can't be.
    """
    prompt = (values["prompt"] or "").strip()  # an untouched field holds None
    if not prompt:
        raise StudioError("The prompt is empty. Write what the picture should show.")
    strengths = [values[f"strength-{number}"] for number in range(MOST_CONCEPTS)]
    concepts = _concepts(studio, prompt, dict(zip(values["concepts"] or [], strengths, strict=False)))
    if (values["counted"] or "").strip():
        prompt = counted_prompt(prompt, named_tokens(prompt), values["counted"].strip())
    data = {
        "prompt": prompt,
        "negative": (values["negative"] or "").strip() or None,
        "seeds": seeds_of(values["seed"], int(values["count"])),
        "steps": int(values["steps"]),
        "guidance": float(values["guidance"]),
        "scheduler": values["scheduler"],
        "width": int(values["width"] or 0),
        "height": int(values["height"] or 0),
        "recur": int(values["recur"] or 0),
        "apart": APART[values["apart"]],
        **{name: bool(values[name]) for name in ("ramp", "trim")},
    }
    layout = layout_of(values)
    if layout is not None:
        data["layout"] = layout.to_json()
    if values["placed"]:
        data["placed"] = values["placed"]
    if values["start"]:
        data["start"] = values["start"]
    request = Request.from_json(data)
    start = start_of(studio, values, [name for name, _ in concepts], request.layout, cut or cutter(studio))
    if start is not None:
        request = replace(request, start=start)
    present = {chip.word for chip in split(prompt, studio.base.tokenizer) if chip.kept}
    chosen = [word for word in values["words"] or [] if word in present] or named_tokens(prompt)
    return request, concepts, tuple(dict.fromkeys(chosen))


def _concepts(studio: Studio, prompt: str, chosen: dict[str, float]) -> Cast:
    """The chosen concepts, and those the prompt names without having been chosen, at full strength."""
    known = studio.library.concepts()
    by_token = {subject.token: concept.name for concept in known for subject in concept.subjects}
    missing = [name for name in chosen if name not in {concept.name for concept in known}]
    if missing:
        raise StudioError(f"'{missing[0]}' is not in the library any more. Take it out of Concepts.")
    mine = {subject.token for concept in known if concept.name in chosen for subject in concept.subjects}
    for token in named_tokens(prompt):
        if token in mine:
            continue
        if token not in by_token:
            raise StudioError(f"There is no concept {token} in the library. Train it, or take it out of the prompt.")
        chosen.setdefault(by_token[token], 1.0)
    return [(name, float(strength)) for name, strength in chosen.items()]


def seeds_of(text: str, count: int) -> tuple[int, ...]:
    """`count` seeds: consecutive from the given one, else random."""
    text = str(text or "").strip()
    if text and not text.isdecimal():
        raise StudioError(f"The seed '{text[:40]}' is not a whole number. Leave it empty for a random one.")
    first = int(text) if text else secrets.randbelow(2**32 - MOST_PICTURES)
    return tuple(range(first, first + count))


def filled(studio: Studio, recipe: dict[str, Any]) -> dict[str, Any]:
    """The values of the controls that a recipe speaks of; the others stay as they are."""
    request = recipe["request"]
    seeds = [recipe["seed"]] if "seed" in recipe else list(request.get("seeds", ()))
    values = {name: request[name] for name in _SAME if name in request}
    values |= {
        "negative": request.get("negative") or "",
        "words": list(recipe.get("attention", [])),
        "start_photos": [],
        "start_strength": "",
        "start_sizes": "",
        "counted": "",
        "prompt_file": None,
    }
    if seeds:
        values |= {"seed": str(seeds[0]), "count": min(len(seeds), MOST_PICTURES)}
    values |= {name: request.get(name, usual) for name, usual in _OPTIONS.items()}
    values["apart"] = next(name for name, meant in APART.items() if meant is request.get("apart", False))
    values |= layout_values(request.get("layout"))
    known = {concept.name for concept in studio.library.concepts()}
    concepts = [(each["name"], float(each["strength"])) for each in recipe.get("concepts", []) if each["name"] in known]
    values["concepts"] = [name for name, _ in concepts[:MOST_CONCEPTS]]
    return values | {f"strength-{at}": strength for at, (_, strength) in enumerate(concepts[:MOST_CONCEPTS])}
