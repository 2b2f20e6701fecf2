"""The residuals of a configuration: read from their files, and each at its token of the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.formats.cones_config import Config, Subject
from pipelines.placed import Placed

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.model import Model
    from pipelines.text import Tokenized


def place_subjects(model: Model, config: Config, prompt: Tokenized) -> tuple[tuple[Placed, ...], list[str]]:
    """The residuals at their tokens, and a sentence for each that is not on its subject's word."""
    width = model.encode([""]).states.shape[-1]
    read: dict[str, Tensor] = {}
    placed: list[Placed] = []
    notes = []
    for subject in config.subjects:
        if subject.name not in read:
            read[subject.name] = _residual(config, subject)
        rows = read[subject.name]
        if rows.shape[1] != width:
            raise wrong_at(
                config,
                subject.line,
                f"'{printable(subject.name, 40)}' was made for text states {rows.shape[1]} wide, those of this base "
                f"have {width}. Name the --base it is for.",
            )
        position = _position(config, subject, prompt, len(rows))
        if (subject.name, position) in [(one.name, one.position) for one in placed]:
            raise wrong_at(
                config, subject.line, f"'{printable(subject.name, 40)}' is on token {position} twice. Leave one out."
            )
        tokens = range(position, position + len(rows))
        notes += _doubt(config, subject, prompt, tokens) + _shared(config, subject, placed, tokens)
        placed.append(Placed.of(subject.name, position, rows))
    return tuple(placed), notes


def _position(config: Config, subject: Subject, prompt: Tokenized, rows: int) -> int:
    """The first token that a subject's rows are added to."""
    from pipelines.tokens import find_word

    if isinstance(subject.at, int):
        if subject.at + rows > len(prompt.ids):
            changes = f"its file changes {rows} tokens, from token {subject.at} on, and " if rows > 1 else ""
            raise wrong_at(
                config,
                subject.line,
                f"there is no token {max(subject.at, len(prompt.ids))}: {changes}this base reads {len(prompt.ids)}, "
                f"numbered 0 to {len(prompt.ids) - 1}. Give the number of its word.",
            )
        return subject.at
    try:
        tokens = find_word(prompt, subject.at, subject.occurrence)
    except StudioError as error:
        raise wrong_at(config, subject.line, str(error)) from error
    if len(tokens) != rows:
        raise wrong_at(
            config,
            subject.line,
            f"'{printable(subject.at, 40)}' has {len(tokens)} token(s), the file of '{printable(subject.name, 40)}' "
            f"changes {rows}. Give the words it was trained with.",
        )
    return tokens[0]


def _doubt(config: Config, subject: Subject, prompt: Tokenized, tokens: range) -> list[str]:
    """A warning where tokens that were given by number are not the subject's word, or nobody can tell."""
    if not isinstance(subject.at, int):
        return []
    own = _own(config, subject, prompt, tokens[0])
    off = [at for at in tokens if at not in own]
    if not off:
        return []
    hits = " and ".join(f"token {at}, which is {_called(prompt, at)}" for at in off[:3]) + " …" * (len(off) > 3)
    advice = "whether that is its word, the file doesn't say"
    if tokens[0] in own:
        advice = f"its file changes {len(tokens)} tokens, from token {tokens[0]} on"
    elif own:
        nearest = min(own, key=lambda at: (abs(at - tokens[0]), at))
        advice = f"'{printable(prompt.words[nearest], 40)}' would be token {nearest}"
    return [
        f"{printable(config.file.name)}, line {subject.line}: '{printable(subject.name, 40)}' is put on {hits}; "
        f"{advice}."
    ]


def _shared(config: Config, subject: Subject, placed: Sequence[Placed], tokens: range) -> list[str]:
    """A warning where a token is another subject's already: both act there, which is seldom meant."""
    for other in placed:
        shared = [at for at in tokens if other.position <= at < other.position + len(other.rows)]
        if shared:
            return [
                f"{printable(config.file.name)}, line {subject.line}: '{printable(subject.name, 40)}' is put on token "
                f"{shared[0]}, where '{printable(other.name, 40)}' is already; both act there."
            ]
    return []


def _own(config: Config, subject: Subject, prompt: Tokenized, first: int) -> set[int]:
    """The positions of a subject's words: of its name ("toy_cat" is "toy cat"), else of the last part of the name that
    the prompt has ("my-cat"), else of any colour. A colour's words that begin with its own belong to it as well."""
    parts = re.sub(r"[\W\d_]+", " ", subject.name).split()
    coloured = [_everywhere(prompt, [colour.words]) for colour in config.colours]
    for words in (" ".join(parts), *reversed(parts)):
        if own := _everywhere(prompt, [words]):
            return own.union(*(one for one in coloured if first in own & one))
    return set().union(*coloured)


def _called(prompt: Tokenized, at: int) -> str:
    """What stands at a position, for a sentence."""
    if prompt.words[at]:
        return f"'{printable(prompt.words[at], 40)}'"
    end = 1 + max((place for place, word in enumerate(prompt.words) if word), default=0)
    return "the start token" if at == 0 else "the end token" if at == end else "padding"


def _everywhere(prompt: Tokenized, words: Sequence[str]) -> set[int]:
    """All positions of words, as far as the prompt has them."""
    from pipelines.tokens import find_word

    found: set[int] = set()
    for word in words:
        try:
            found |= set(find_word(prompt, word))
        except StudioError:
            continue
    return found


def _residual(config: Config, subject: Subject) -> Tensor:
    """(tokens, width) fp32, from the original's file or from safetensors with one tensor."""
    from pipelines.formats import cones
    from pipelines.intake import load_tensors

    path = find_file(config, config.residuals[subject.name], subject.line)
    try:
        if path.suffix == ".safetensors":
            tensors = load_tensors(path)[0]
            found = tensors if len(tensors) != 1 else next(iter(tensors.values()))
            rows: Tensor = cones.as_rows(found, f"'{printable(path.name)}'")
        else:
            (rows,) = cones.read(path)["tensors"].values()
    except StudioError as error:
        raise wrong_at(config, subject.line, str(error)) from error
    return rows


def find_file(config: Config, name: str, line: int) -> Path:
    """A file of the configuration: beside it, or else where the program runs."""
    try:
        for path in (config.file.parent / name, Path(name)):
            if path.is_file():
                return path
    except (OSError, ValueError) as error:
        raise wrong_at(config, line, f"'{printable(name)}' can't be the path of a file. Shorten it.") from error
    raise wrong_at(
        config, line, f"there is no file '{printable(name)}'. Paths count from the configuration's own folder."
    )


def wrong_at(config: Config, line: int, problem: str) -> StudioError:
    """The one sentence about a line of the file."""
    return StudioError(f"{printable(config.file.name)}, line {line}: {problem}")
