"""Words on their way to the text encoders: what a prompt became, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pipelines.tokens import Span

END_OF_WORD = "</w>"


@dataclass(frozen=True)
class Tokenized:
    """One prompt as the encoder reads it. All tuples have one entry per position, padding included."""

    text: str  # after placeholders were expanded
    ids: tuple[int, ...]
    words: tuple[str, ...]  # readable sub-words; "" for start, end and padding
    offsets: tuple[tuple[int, int], ...]  # character range in `text`; (0, 0) for start, end and padding
    truncated: str = ""  # the end of `text` that did not fit
    spans: tuple[Span, ...] = ()  # where placeholders went


@dataclass(frozen=True)
class TextStates:
    """What the UNet is conditioned on, one row per prompt."""

    states: Tensor  # (rows, tokens, width)
    pooled: Tensor | None  # (rows, width of the projection), SDXL only
    prompts: tuple[Tokenized, ...]


def tokenize(tokenizer: Any, text: str, spans: Sequence[Span] = ()) -> Tokenized:
    """One text as the tokenizer of the first encoder splits it, padded or cut to the encoder's own limit."""
    limit = tokenizer.model_max_length
    whole = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    padded = tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_offsets_mapping=True)
    special = tokenizer(
        text, padding="max_length", max_length=limit, truncation=True, return_special_tokens_mask=True
    ).special_tokens_mask
    offsets = tuple(
        (0, 0) if hidden else (start, end) for (start, end), hidden in zip(padded.offset_mapping, special, strict=True)
    )
    words = tuple(text[start:end] for start, end in offsets)
    return Tokenized(text, tuple(padded.input_ids), words, offsets, _cut(text, whole, limit), tuple(spans))


def _cut(text: str, whole: Any, limit: int) -> str:
    """The part of `text` beyond the encoder's limit. Two positions belong to start and end."""
    if len(whole.input_ids) <= limit:
        return ""
    return text[whole.offset_mapping[limit - 1][0] :].strip()


def covered(tokenized: Tokenized, start: int, end: int) -> list[int]:
    """The positions whose characters lie in text[start:end], in order; fewer where the text was cut."""
    return [at for at, (first, last) in enumerate(tokenized.offsets) if first < last and first < end and last > start]


def input_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(rows, tokens) ids as diffusers' pipelines make them."""
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
