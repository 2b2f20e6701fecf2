"""A grid of clickable cards: concepts, results, photos. Reports `pick` with the card's id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

_REPORT = """
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-id]');
  if (card) trigger('pick', {id: card.dataset.id});
});
"""


@dataclass(frozen=True)
class Card:
    """One card. `image` is a data URI or ""; `badge` is a short word in the corner."""

    id: str
    title: str = ""
    text: str = ""
    image: str = ""
    badge: str = ""


def cards(elem_id: str, label: str) -> gr.HTML:
    """The component; its value is what `cards_markup` writes. Listen with `.pick(handler)`, then `picked(event)`."""
    return gr.HTML("", elem_id=elem_id, label=label, js_on_load=_REPORT, apply_default_css=False)


def picked(event: gr.EventData) -> str:
    """The id of the card that was clicked. It comes from the browser: look it up, never use it as a path."""
    return str(event._data.get("id", "")) if isinstance(event._data, dict) else ""


def cards_markup(items: Sequence[Card], chosen: str = "", empty: str = "") -> str:
    """The grid, everything escaped; `empty` is the sentence shown when there are no cards."""
    if not items:
        return f'<p class="empty">{escape(empty)}</p>' if empty else ""
    return f'<div class="cards">{"".join(_card(item, item.id == chosen) for item in items)}</div>'


def _card(item: Card, chosen: bool) -> str:
    label = escape(item.title or item.text or item.id, quote=True)
    picture = f'<img src="{escape(item.image, quote=True)}" alt="{label}" loading="lazy">' if item.image else ""
    badge = f'<span class="badge">{escape(item.badge)}</span>' if item.badge else ""
    title = f"<b>{escape(item.title)}</b>" if item.title else ""
    text = f"<span>{escape(item.text)}</span>" if item.text else ""
    return (
        f'<button type="button" class="card{" chosen" if chosen else ""}" data-id="{escape(item.id, quote=True)}" '
        f'aria-pressed="{str(chosen).lower()}" title="{label}">'
        f'<span class="frame">{picture}{badge}</span>{title}{text}</button>'
    )
