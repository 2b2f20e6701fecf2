"""How a picture was made, as a table."""

from __future__ import annotations

from html import escape
from typing import Any

from studio.results import Painted


def recipe_facts(painted: Painted) -> str:
    """Prompt, seed, settings, concepts, base."""
    recipe, about = painted.result.recipe, painted.about
    request = recipe["request"]
    concepts = ", ".join(f"{each['name']} at {each['strength']:g}" for each in recipe.get("concepts", []))
    facts: dict[str, Any] = {
        "Prompt": request["prompt"],
        "Negative": request.get("negative"),
        "Concepts": concepts,
        "Seed": about["seed"],
        "Steps": request["steps"],
        "Guidance": f"{request['guidance']:g}",
        "Scheduler": request["scheduler"],
        "Size": f"{about['width']} × {about['height']}",
        "Attention": ", ".join(painted.words),
        "Base": recipe.get("base", {}).get("id"),
    }
    rows = [
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>"
        for key, value in facts.items()
        if value not in (None, "")
    ]
    return f'<dl class="facts" data-picture="{escape(painted.id, quote=True)}">{"".join(rows)}</dl>'
