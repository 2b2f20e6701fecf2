"""What `<my-cat>` means in a prompt, where its words land among the tokens, and tokens that training adds.

A placeholder is replaced by ordinary words before the tokenizer sees the prompt, so nothing here depends on a
vocabulary. Which token a word became is read from the tokenizer's own character offsets, never guessed from ids:
sub-words, punctuation, repeated words and padding (SD 1.x pads with EOS, SD 2.x with "!") need no special case.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.text import Tokenized, covered

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.model import Model
    from pipelines.token_table import AddedTokens

_PLACEHOLDER = re.compile(r"<\w[\w.-]*>")


def _full_strength() -> float:
    return 1.0


@dataclass(frozen=True, eq=False)
class Expansion:
    """What a placeholder stands for.

    `rows` are added to the text encoder's output at the noun's tokens, one row a token: (tokens of the noun, width).
    A callable is asked anew for every prompt, so that a concept in training always shows its present state.
    """

    words: str  # "sks cat", "cat", "<my-cat-0> <my-cat-1> cat"
    noun: str
    rows: Tensor | Callable[[], Tensor | None] | None = None
    strength: Callable[[], float] = _full_strength

    def text(self) -> str:
        """The words in the prompt; the noun alone at strength 0, where the concept must leave no trace."""
        return self.words if self.strength() else self.noun

    def now(self) -> Expansion:
        """The same with `rows` and `strength` as they are at this moment; no rows at strength 0."""
        strength = self.strength()
        rows = self.rows() if callable(self.rows) and strength else self.rows
        return replace(self, rows=rows if strength else None, strength=lambda: strength)


@dataclass(frozen=True)
class Span:
    """Where one placeholder went, in characters of the expanded text (end exclusive), and what it stood for then."""

    token: str  # "<my-cat>"
    start: int
    end: int
    noun: tuple[int, int]
    expansion: Expansion


def named_tokens(prompt: str) -> list[str]:
    """The words in <> of a prompt, in order: those that stand for concepts."""
    return re.findall(r"<[^<>\s]+>", prompt)


def check_token(token: str) -> str:
    """The token itself, or StudioError when it could not be told from other text in a prompt."""
    if not _PLACEHOLDER.fullmatch(token):
        raise StudioError(
            f"'{token}' can't name a concept in a prompt. Write one word of letters, digits, '-', '_' or '.' in angle "
            "brackets, such as <my-cat>."
        )
    return token


def expand(prompt: str, placeholders: Mapping[str, Expansion]) -> tuple[str, list[Span]]:
    """The prompt with every `<name>` replaced by what it means, and where those words are.

    A noun typed right after the placeholder is not doubled ("<my-cat> Cat" is one cat), and the words always stand by
    themselves: a space parts them from letters they would merge with. Other angle brackets are left as they are.
    Raises StudioError for a `<name>` that no active concept answers to.
    """
    prompt = unicodedata.normalize("NFC", prompt)  # the tokenizer does so too; names are kept in this form
    text, done, spans = "", 0, []
    for match in _PLACEHOLDER.finditer(prompt):
        token = match.group()
        if token not in placeholders:
            raise StudioError(_unknown(token, placeholders))
        expansion = placeholders[token].now()
        text += prompt[done : match.start()]
        done = _skip_noun(prompt, match.end(), expansion.noun)
        if text and (text[-1].isalnum() or text[-1] in "'’"):  # "'s", "'t" ... would swallow a first letter
            text += " "
        spans.append(_span(token, expansion, len(text)))
        text += expansion.text()
        if done < len(prompt) and prompt[done].isalnum():
            text += " "
    return text + prompt[done:], spans


def _unknown(token: str, placeholders: Mapping[str, Expansion]) -> str:
    active = ", ".join(sorted(placeholders)) or "none"
    return (
        f"The prompt says {token}, but no such concept is switched on (active: {active}). "
        f"Switch it on, or take {token} out of the prompt."
    )


def _skip_noun(prompt: str, at: int, noun: str) -> int:
    """The place after a noun typed at `at`, or `at` itself."""
    words = r"\s+".join(re.escape(word) for word in noun.split())
    typed = re.compile(rf"\s+{words}(?![\w-])", re.IGNORECASE).match(prompt, at) if words else None
    return typed.end() if typed else at


def _span(token: str, expansion: Expansion, start: int) -> Span:
    words = expansion.text()
    end = start + len(words)
    noun = words.rfind(expansion.noun) if expansion.noun else -1
    at = (start, end) if noun < 0 else (start + noun, start + noun + len(expansion.noun))  # no noun: the whole is it
    return Span(token, start, end, at, expansion)


@contextmanager
def placeholder(model: Model, token: str, expansion: Expansion) -> Iterator[None]:
    """Let `token` mean `expansion` in every prompt of this model while the context is open.

    Raises StudioError when another active concept has the same token: a prompt could not tell them apart.
    """
    check_token(token)
    if token in model.placeholders:
        raise StudioError(f"Two concepts answer to {token}. Rename one of them, or use only one.")
    model.placeholders[token] = expansion
    try:
        yield
    finally:
        del model.placeholders[token]


def find_word(tokenized: Tokenized, word: str, occurrence: int | None = None) -> list[int]:
    """The positions of a word's tokens: of every occurrence, or of one (0 = the first).

    `word` may be several words, in any case; "<my-cat>" finds the whole expansion. Raises StudioError when the word is
    not in the prompt (naming the words that are), or when it was cut off with the end of a long prompt.
    """
    places = _places(tokenized, word)
    if not places:
        known = ", ".join(dict.fromkeys(re.findall(r"\w+", tokenized.text))) or "no words"
        raise StudioError(f"'{word}' is not in the prompt. Choose a word it has: {known}.")
    if occurrence is not None:
        if not 0 <= occurrence < len(places):
            raise StudioError(f"'{word}' is in the prompt {len(places)} times; there is no number {occurrence + 1}.")
        places = places[occurrence : occurrence + 1]
    read = max((end for _, end in tokenized.offsets), default=0)
    found = [covered(tokenized, start, end) for start, end in places if end <= read]
    if not found:
        raise StudioError(
            f"'{word}' was cut off: the prompt is longer than the text encoder reads. Shorten the prompt."
        )
    return sorted({position for group in found for position in group})


def _places(tokenized: Tokenized, word: str) -> list[tuple[int, int]]:
    """Character ranges of a word or a placeholder, in reading order."""
    word = unicodedata.normalize("NFC", word)
    spans = [(span.start, span.end) for span in tokenized.spans if span.token == word.strip()]
    if spans or not word.split():
        return spans
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    before = r"(?<![^\W_])" if word.strip()[0].isalnum() else ""
    after = r"(?![^\W_])" if word.strip()[-1].isalnum() else ""
    return [match.span() for match in re.finditer(before + pattern + after, tokenized.text, re.IGNORECASE)]


@contextmanager
def added_tokens(model: Model, tokens: Sequence[str], init_words: Sequence[str]) -> Iterator[AddedTokens]:
    """Learned tokens on, for every text encoder of the model; off again on exit, to the very same objects.

    `init_words[i]` says where `tokens[i]` starts: at the mean of that text's rows in the token table. Yields the new
    rows as parameters, the only ones here that train. See `pipelines.token_table`.
    """
    from pipelines.token_table import grown  # torch is heavy, and prompts can be read without it

    for token in tokens:
        check_token(token)
    with grown(model, tuple(tokens), tuple(init_words)) as added:
        yield added
