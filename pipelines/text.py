"""From texts to what the UNet is conditioned on, exactly as diffusers' own pipelines do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.tokens import Span


@dataclass(frozen=True)
class Tokenized:
    """One prompt as the encoder reads it. `ids`, `words`, `offsets` have one entry per position, padding included."""

    text: str  # after placeholders were expanded, nothing cut
    ids: tuple[int, ...]
    words: tuple[str, ...]  # the piece of `text` at each position; "" for start, end and padding
    offsets: tuple[tuple[int, int], ...]  # its characters in `text`; (0, 0) for start, end and padding
    truncated: str = ""  # the end of `text` that did not fit
    spans: tuple[Span, ...] = ()  # where placeholders went


@dataclass(frozen=True)
class TextStates:
    """What the UNet is conditioned on, one row per prompt."""

    states: Tensor  # (rows, tokens, width)
    pooled: Tensor | None  # (rows, width of the projection), SDXL only
    prompts: tuple[Tokenized, ...]


def text_length(tokenizer: Any, encoder: Any) -> int:
    """Positions the encoder reads: the tokenizer's limit, or the encoder's own where the tokenizer names none."""
    return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))


def tokenize(tokenizer: Any, text: str, length: int | None = None, spans: Sequence[Span] = ()) -> Tokenized:
    """One text, padded or cut to `length` positions (None: the tokenizer's limit) as diffusers' pipelines do."""
    read = tokenizer(
        text,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    hidden = read["special_tokens_mask"]
    offsets = tuple((0, 0) if special else at for at, special in zip(read["offset_mapping"], hidden, strict=True))
    words = tuple(text[start:end] for start, end in offsets)
    cut = _cut(tokenizer, text, max(end for _, end in offsets))
    return Tokenized(text, tuple(read["input_ids"]), words, offsets, cut, tuple(spans))


def _cut(tokenizer: Any, text: str, kept: int) -> str:
    """What comes after the `kept` first characters, if the tokenizer sees anything there."""
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text[kept:].strip() if whole and whole[-1][1] > kept else ""


def covered(tokenized: Tokenized, start: int, end: int) -> list[int]:
    """The positions whose characters lie in text[start:end], in order; fewer where the text was cut."""
    return [at for at, (first, last) in enumerate(tokenized.offsets) if first < last and first < end and last > start]


def run_encoders(
    tokenizers: Sequence[Any], encoders: Sequence[Any], texts: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """(rows, tokens, width) states and SDXL's pooled text (rows, width of the projection).

    SD 1 and 2 take the encoder's last hidden state, after the final LayerNorm. SDXL takes the last but one of both
    encoders, side by side, and the pooled and projected text of the second (Podell et al. 2023, section 2.1).
    """
    if len(encoders) == 1:
        return _outputs(tokenizers[0], encoders[0], texts, hidden=False)[0], None
    import torch

    outputs = [_outputs(*pair, texts, hidden=True) for pair in zip(tokenizers, encoders, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0]


def _outputs(tokenizer: Any, encoder: Any, texts: Sequence[str], hidden: bool) -> Any:
    length = text_length(tokenizer, encoder)
    read = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = getattr(encoder.config, "use_attention_mask", False) and not hidden  # SDXL's pipeline never masks
    mask = {"attention_mask": read.attention_mask.to(encoder.device)} if masked else {}
    return encoder(read.input_ids.to(encoder.device), output_hidden_states=hidden, **mask)
