"""Subjects as learned tokens: what `<my-cat>` reads as, what trains, and what is saved.

Each subject has `count` new tokens in every text encoder. They start at the mean of a word's rows in the token table
and are all that trains here; the table itself and the tokenizer come back as they were (`pipelines.token_table`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.tokens import Expansion, added_tokens, placeholder
from pipelines.weights import usable_strength

if TYPE_CHECKING:
    from pipelines.model import Model
    from pipelines.token_table import AddedTokens

KEY = "tokens."  # "tokens.text_encoder": (tokens of all subjects, width), "tokens.text_encoder_2" for SDXL


@contextmanager
def learned_tokens(
    model: Model, subjects: Sequence[Subject], *, count: int = 1, start: str = "", with_noun: bool = True
) -> Iterator[LearnedTokens]:
    """`<name>` means its own tokens, followed by the noun where `with_noun`; at strength 0 the noun alone.

    They start as the noun, or as the word `start`. StudioError when that is no word, or a name is taken.
    """
    names = [token_names(subject, count, subjects) for subject in subjects]
    first = [start or subject.noun for subject in subjects for _ in range(count)]
    with ExitStack() as stack:
        added = stack.enter_context(added_tokens(model, [name for group in names for name in group], first))
        learned = LearnedTokens(model, added)
        for subject, group in zip(subjects, names, strict=True):
            words = " ".join([*group, subject.noun] if with_noun else group)
            meaning = Expansion(words, subject.noun, strength=lambda: learned.strength)
            stack.enter_context(placeholder(model, subject.token, meaning))
        yield learned


def token_names(subject: Subject, count: int, among: Sequence[Subject] = ()) -> list[str]:
    """What the tokens are called inside: of letters and digits alone, so that looking for the word "cat" doesn't find
    it in the name of `<my-cat>`. `among` are all that are learned: `<mycat>` is called otherwise than `<my-cat>`."""
    letters = _letters(subject)
    alike = [one.token for one in among if _letters(one) == letters]
    own = f"{letters}N{alike.index(subject.token)}" if len(alike) > 1 else letters
    return [f"<{own}V{number}>" for number in range(count)]


def _letters(subject: Subject) -> str:
    return re.sub(r"[\W_]", "", subject.token)


class LearnedTokens:
    """The rows of some subjects' tokens, one parameter for each text encoder."""

    def __init__(self, model: Model, added: AddedTokens) -> None:
        self.tokens = added.tokens
        self._model = model
        self._rows = added.rows
        self._first = [rows.detach().clone() for rows in added.rows]
        self._learned = [rows.detach().clone() for rows in added.rows]  # only while strength is not 1
        self._strength = 1.0

    @property
    def strength(self) -> float:
        """s of: start + s (learned - start). At 0 the prompt has the noun instead."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        value = usable_strength(value)
        if self._strength == 1.0:
            self._learned = [rows.detach().clone() for rows in self._rows]
        self._strength = value
        self._show()

    def parameters(self) -> list[nn.Parameter]:
        """One (tokens, width of the table) for each text encoder, fp32."""
        return list(self._rows)

    def learn(self, on: bool) -> None:
        """Whether the rows train; text states are remembered again while they don't."""
        for rows in self._rows:
            if rows.requires_grad != on:
                rows.requires_grad_(on)
                self._model.text_version += 1

    def tensors(self) -> dict[str, Tensor]:
        """{"tokens.text_encoder": (tokens, width)} as learned, detached on the CPU, fp32."""
        rows = self._rows if self._strength == 1.0 else self._learned
        return {
            key: value.detach().to("cpu", torch.float32, copy=True)
            for key, value in zip(self.keys(), rows, strict=True)
        }

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return [KEY + "text_encoder" + (f"_{index + 1}" if index else "") for index in range(len(self._rows))]

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`. StudioError when they are for another number of tokens or another width."""
        for key, own in zip(self.keys(), self._first, strict=True):
            values = tensors.get(key)
            if values is None:
                raise StudioError("This concept holds no learned token for this base. Load the base it was trained on.")
            if values.shape != own.shape:
                raise StudioError(
                    f"This concept brings {_shape(values)} numbers for its tokens, this base needs {_shape(own)}. "
                    "Load the base it was trained on, with the settings it was trained with."
                )
            if not values.isfinite().all():
                raise StudioError("This concept is broken: not all numbers of its tokens are numbers. Train it again.")
        self._learned = [tensors[key].detach().to(own) for key, own in zip(self.keys(), self._first, strict=True)]
        self._show()

    def bake(self) -> None:
        """Nothing trains from here on, so that text states are remembered."""
        self.learn(False)

    @torch.no_grad()
    def _show(self) -> None:
        """Put what was learned, at the present strength, into the table."""
        for rows, first, learned in zip(self._rows, self._first, self._learned, strict=True):
            rows.copy_(learned if self._strength == 1.0 else first + self._strength * (learned - first))
        self._model.text_version += 1


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(side) for side in tensor.shape)
