"""Attention: one picture, and where each of its words looked, by step, layer and head."""

from __future__ import annotations

from typing import Any

import gradio as gr

from studio.page import Page, Watch
from studio.parts.cards import cards, cards_markup, picked
from studio.parts.message import answering
from studio.parts.scrubber import scrubber
from studio.results import Painted, attention_payload, find, picture_cards, pictures, results_sign
from studio.session import Studio

TITLE = "Attention"
ID = "attention"
MOST = 40
EMPTY = "Make a picture first: the attention of its concepts, and of the words you click, is kept."
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(studio: Studio, page: Page) -> None:
    shown = cards("attention-pictures", "Pictures")
    view = scrubber("scrubber")
    message = gr.HTML("", elem_id="attention-message")
    word = gr.State("")
    page.watch(
        Watch(
            [shown],
            lambda chosen: (chosen, results_sign(studio.workspace)),
            lambda chosen: [_strip(studio, chosen)],
            [page.result],
        )
    )

    @answering(1)
    def draw(chosen: str, word: str) -> tuple[Any, str]:
        painted = _chosen(studio, chosen)
        if painted is None:
            return "", ""
        return attention_payload(painted, word if word in painted.words else painted.words[0]), ""

    def choose(event: gr.EventData) -> str:
        return picked(event)

    page.watch(
        Watch(
            [view, message],
            lambda chosen, word: (getattr(_chosen(studio, chosen), "id", ""), word),
            draw,
            [page.result, word],
        )
    )
    shown.pick(choose, None, page.result, **QUIET)
    view.pick(choose, None, word, **QUIET)
    gr.on([page.result.change, word.change], draw, [page.result, word], [view, message], **QUIET)


def _with_attention(studio: Studio) -> list[Painted]:
    return [painted for painted in pictures(studio.workspace) if painted.words]


def _chosen(studio: Studio, chosen: str) -> Painted | None:
    """The chosen picture, else the newest one that has attention."""
    painted = find(studio.workspace, chosen) if chosen else None
    if painted is not None and painted.words:
        return painted
    return next(iter(_with_attention(studio)), None)


def _strip(studio: Studio, chosen: str) -> str:
    now = _chosen(studio, chosen)
    return cards_markup(picture_cards(_with_attention(studio)[:MOST]), now.id if now else "", EMPTY)
