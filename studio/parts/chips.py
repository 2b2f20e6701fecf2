"""The prompt as the text encoder reads it: one clickable chip a word, sub-words visible, the cut part struck out."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

_REPORT = """
element.addEventListener('click', (event) => {
  const chip = event.target.closest('[data-word]');
  if (chip) trigger('pick', {id: chip.dataset.word});
});
"""
_WORD = re.compile(r"<[^<>\s]+>|\w+(?:['’-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Chip:
    """One word of a prompt: `pieces` are its tokens, `kept` is False beyond the encoder's limit."""

    word: str
    pieces: tuple[str, ...]
    kept: bool = True

    @property
    def concept(self) -> bool:
        return self.word.startswith("<") and self.word.endswith(">")


def chips(elem_id: str) -> gr.HTML:
    """The component; reports `pick` with the word (read it with `cards.picked`)."""
    return gr.HTML("", elem_id=elem_id, js_on_load=_REPORT, apply_default_css=False)


def split(prompt: str, tokenizer: Any) -> list[Chip]:
    """The words of `prompt` with their tokens. A `<concept>` is one chip: what it expands to is its method's matter."""
    words = list(_WORD.finditer(prompt))
    if tokenizer is None:
        return [Chip(word.group(), (word.group(),)) for word in words]
    from pipelines import tokenize  # late: it brings torch, and the first page must not wait for that

    read = tokenize(tokenizer, prompt)
    end = len(prompt) - len(read.truncated) if read.truncated else len(prompt)
    found = []
    for word in words:
        start, stop = word.span()
        pieces = [prompt[max(a, start) : min(b, stop)] for a, b in read.offsets if a < stop and b > start]
        named = word.group().startswith("<") and word.group().endswith(">") and len(word.group()) > 2
        found.append(Chip(word.group(), (word.group(),) if named else tuple(filter(None, pieces)), kept=start < end))
    return found


def chips_markup(words: Sequence[Chip], watched: Collection[str]) -> str:
    """The row of chips with a count of tokens and what to do with them."""
    if not words:
        return ""
    row = "".join(_chip(word, word.word in watched) for word in words)
    tokens = sum(len(word.pieces) for word in words if word.kept)
    lost = [word.word for word in words if not word.kept]
    note = f"{tokens} tokens. Click the words whose attention you want to see."
    cut = f'<p class="message problem">Too long: the base does not read “{escape(" ".join(lost))}”.</p>' if lost else ""
    return f'<div class="chips">{row}</div><p class="hint">{escape(note)}</p>{cut}'


def _chip(chip: Chip, watched: bool) -> str:
    inner = "<i></i>".join(escape(piece) for piece in chip.pieces) or escape(chip.word)
    if not re.search(r"\w", chip.word):
        return f'<span class="chip mark">{inner}</span>'
    names = ["chip", *(["watched"] if watched else []), *(["named"] if chip.concept else [])]
    names += [] if chip.kept else ["lost"]
    return (
        f'<button type="button" class="{" ".join(names)}" data-word="{escape(chip.word, quote=True)}" '
        f'aria-pressed="{str(watched).lower()}"{"" if chip.kept else " disabled"}>{inner}</button>'
    )
