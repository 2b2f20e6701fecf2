"""A picture with the attention of two words captured ÷ the same picture without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.attention.store import AttentionStore
from pipelines.bench import Figures, compare
from pipelines.generate import generate
from pipelines.request import Request
from pipelines.tokens import find_word

if TYPE_CHECKING:
    from pipelines.model import Model

PROMPT, WORDS = "a photo of a cat and a house", ("cat", "house")


def measure(model: Model, steps: int = 10, runs: int = 16) -> Figures:
    """Whole pictures at the base's own size, every step, layer and head kept as far as the usual budget goes.

    Many short pictures rather than a few long ones: the best of them is then more likely an undisturbed one.
    """
    request = Request(PROMPT, steps=steps, preview_every=0)
    words = {word: find_word(model.tokenize(PROMPT), word) for word in WORDS}

    def plain() -> None:
        list(generate(model, request))

    def watched() -> None:
        list(generate(model, request, probes=[AttentionStore(words)]))

    return compare(watched, plain, runs, device=model.device)
