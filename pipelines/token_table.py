"""Learned tokens beside a text encoder's own: the table and the tokenizer are lent out, never written to.

While tokens are on, the encoder's embedding is wrapped by one that looks new ids up in extra rows, and the tokenizer is
a copy that knows them. Several sets may come and go in any order; with the last one gone the encoder and the model hold
the very same objects as before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.model import Model


_LEGACY_END = 2


@dataclass(frozen=True, eq=False)
class AddedTokens:
    """One set of learned tokens; `rows[e]` belongs to text encoder e: (tokens, width of its table), fp32, trainable."""

    tokens: tuple[str, ...]
    rows: tuple[nn.Parameter, ...]


class GrownEmbedding(nn.Module):
    """An embedding with extra rows behind the `first` known ids. Known ids give bit-identical rows."""

    def __init__(
        self,
        base: nn.Module,
        first: int,
        rows: Sequence[Tensor],
        tokenizers: tuple[Any, ...],
        active: list[AddedTokens],
    ) -> None:
        super().__init__()
        self.base = base
        self.first = first
        self.rows = nn.ParameterList(rows)
        self.tokenizers = tokenizers  # the model's own, to be given back
        self.active = active

    @property
    def weight(self) -> Tensor:
        """The table of the known ids, for code that asks its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, tokens) ids -> (rows, tokens, width)."""
        known = self.base(ids.clamp(max=self.first - 1))
        new = torch.cat(list(self.rows)).to(known)[(ids - self.first).clamp(min=0)]
        return torch.where((ids >= self.first).unsqueeze(-1), new, known)


@contextmanager
def grown(model: Model, tokens: tuple[str, ...], init_words: tuple[str, ...]) -> Iterator[AddedTokens]:
    """See `pipelines.tokens.added_tokens`."""
    if len(tokens) != len(init_words):
        raise ValueError("every added token needs one init word")
    originals = _state(model)[0]
    rows = tuple(
        nn.Parameter(_first_rows(tokenizer, _base(encoder), init_words))
        for tokenizer, encoder in zip(originals, model.text_encoders, strict=True)
    )
    added = AddedTokens(tokens, rows)
    _put(model, [*_state(model)[1], added])
    try:
        yield added
    finally:
        _put(model, [other for other in _state(model)[1] if other is not added])


def _state(model: Model) -> tuple[tuple[Any, ...], list[AddedTokens]]:
    """The model's own tokenizers and the sets of tokens that are on."""
    table = model.text_encoders[0].get_input_embeddings()
    return (table.tokenizers, list(table.active)) if isinstance(table, GrownEmbedding) else (model.tokenizers, [])


def _base(encoder: Any) -> nn.Module:
    table: nn.Module = encoder.get_input_embeddings()
    return table.base if isinstance(table, GrownEmbedding) else table


def _first_rows(tokenizer: Any, table: nn.Module, init_words: Sequence[str]) -> Tensor:
    """(tokens, width): the mean of each init word's own rows."""
    rows = []
    for words in init_words:
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        if not ids:
            raise StudioError("A learned token needs a word to start from. Give an ordinary word, such as 'toy'.")
        weight: Any = table.weight
        rows.append(weight.detach()[ids].float().mean(0))
    return torch.stack(rows)


def _put(model: Model, active: list[AddedTokens]) -> None:
    """Make exactly these sets known to the model; with none, give it back its own tokenizers and tables."""
    originals = _state(model)[0]
    tokenizers = tuple(_with_tokens(tokenizer, active) for tokenizer in originals) if active else originals
    for place, (tokenizer, encoder) in enumerate(zip(originals, model.text_encoders, strict=True)):
        base, rows = _base(encoder), [added.rows[place] for added in active]
        encoder.set_input_embeddings(GrownEmbedding(base, len(tokenizer), rows, originals, active) if active else base)
        _pool_at_end(encoder, tokenizer.eos_token_id, bool(active))
    model.tokenizers = tokenizers
    model.text_version += 1


def _with_tokens(tokenizer: Any, active: Sequence[AddedTokens]) -> Any:
    """A copy of the tokenizer that knows the tokens, in order; letter case is theirs."""
    from transformers import AddedToken

    grown_copy = copy.deepcopy(tokenizer)
    for token in (token for added in active for token in added.tokens):
        if not grown_copy.add_tokens([AddedToken(token, normalized=False)]):
            raise StudioError(f"The tokenizer already knows '{token}'. Give the concept another name.")
    return grown_copy


def _pool_at_end(encoder: Any, end: int, on: bool) -> None:
    """Old configs (eos_token_id 2) pool text at the highest id, which a new token's would be; look for the end instead.

    Gives the same position for every text without new tokens, since the end has the highest id of the known ones.
    """
    for module in encoder.modules():
        if on and getattr(module, "eos_token_id", None) == _LEGACY_END != end:
            module.eos_token_id, module.attune_legacy_end = end, True
        elif not on and "attune_legacy_end" in vars(module):
            module.eos_token_id = _LEGACY_END
            del module.attune_legacy_end
