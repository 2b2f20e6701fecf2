"""Files with a prompt in every line, as evaluations use them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.tokens import named_tokens

if TYPE_CHECKING:
    from pipelines.concept import Concept

GAP = "{}"
_LIMIT = 4_000_000  # bytes


def read_prompts(path: str | Path, concepts: Sequence[Concept] = (), known: Collection[str] | None = None) -> list[str]:
    """The prompts of a file, with every {} filled by the concept's token; blank lines are left out.

    Of several subjects each fills one {}, in order. StudioError with file and line where that doesn't come out even,
    and for a word in <> that is none of the `known` tokens, where these are given.
    """
    return [prompt for _, prompt in numbered_prompts(path, concepts, known)]


def numbered_prompts(
    path: str | Path, concepts: Sequence[Concept] = (), known: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """The same, each with where it stands: ("prompts.txt, line 3", "a <my-cat> in the snow")."""
    numbered = [(where, filled(line, concepts, where)) for where, line in prompt_lines(path)]
    for where, prompt in numbered:
        unknown = [] if known is None else [word for word in named_tokens(prompt) if word not in known]
        if unknown:
            raise StudioError(f"{where}: there is no concept {printable(unknown[0])}. Train it, or take the word out.")
    return numbered


def prompt_lines(path: str | Path) -> list[tuple[str, str]]:
    """The prompts as they are written, each with where it stands. StudioError for what is no text or has none."""
    path = Path(path)
    name = printable(path.name)
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
    except OSError as error:
        raise StudioError(f"Cannot read '{name}': {error.strerror}. Check the path.") from error
    if len(content) > _LIMIT:
        raise StudioError(f"'{name}' is too large for a file of prompts. Choose another file.")
    text = content.decode("utf-8-sig", errors="replace")
    if {"\0", "\N{REPLACEMENT CHARACTER}"} & set(text):
        raise StudioError(f"'{name}' is no UTF-8 text. Write one prompt in every line, and save it as plain text.")
    lines = text.splitlines()
    numbered = [(f"{name}, line {at}", line.strip()) for at, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise StudioError(f"'{name}' has no prompt. Write one in every line.")
    return numbered


def filled(prompt: str, concepts: Sequence[Concept], where: str = "The prompt") -> str:
    """A prompt with its {} filled. StudioError where that doesn't come out even, saying `where`."""
    tokens = [subject.token for concept in concepts for subject in concept.subjects]
    first, *rest = prompt.split(GAP)
    fillings = list(tokens) * len(rest) if len(tokens) == 1 else list(tokens)
    if not rest:
        return prompt
    if not tokens:
        raise StudioError(f"{where}: nothing says what {GAP} stands for. Choose a concept for it.")
    if len(fillings) != len(rest):
        raise StudioError(
            f"{where}: {len(rest)} times {GAP} for {len(tokens)} subjects ({', '.join(tokens)}). Write one for each."
        )
    return first + "".join(filling + piece for filling, piece in zip(fillings, rest, strict=True))
