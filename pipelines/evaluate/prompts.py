"""The prompts of an evaluation: a line each, `{}` for the subject, and the texts that a picture is compared with."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.errors import StudioError
from pipelines.files import printable

PLAIN = "a photo of a {}"

# backgrounds, things beside it, colours, styles: the four kinds of AttnDreamBooth's evaluation
_EVERYDAY = (
    PLAIN,
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} in the jungle",
    "a photo of a {} on a cobblestone street",
    "a {} floating on the water",
    "a {} with a city in the background",
    "a photo of a {} and a red ball",
    "a photo of a {} next to a cup of coffee",
    "a {} on top of a wooden floor",
    "a {} inside a box",
    "a red {}",
    "a purple {}",
    "an oil painting of a {}",
    "a watercolor painting of a {}",
    "a pencil drawing of a {}",
    "a {} made of lego",
)
_TOYBOX = (  # what its world can show
    PLAIN,
    "a photo of a {} on the grass",
    "a photo of a {} in the snow",
    "a photo of a {} by the sea",
    "a photo of a {} at night",
    "a photo of a {} on a table",
    "a photo of a {} and a red ball",
    "a photo of a {} and a blue cube on the sand",
    "a photo of a {} and a yellow cup in the snow",
)


def default_prompts(kind: str) -> tuple[str, ...]:
    """Those for a kind of base ("toybox" or any other)."""
    return _TOYBOX if kind == "toybox" else _EVERYDAY


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, blank lines left out. StudioError with the line's number where `{}` isn't there once."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudioError(
            f"'{printable(path.name)}' can't be read as text. Name a file with one prompt a line."
        ) from error
    return prompts_in(text, f"'{printable(path.name)}'")


def prompts_in(text: str, where: str) -> tuple[str, ...]:
    """`read_prompts` of a text; messages name it as `where`."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and line.count("{}") != 1:
            raise StudioError(
                f"{where}, line {number}: '{printable(line.strip(), 60)}' needs {{}} once, where the subject goes."
            )
        found.append(line.strip())
    if not any(found):
        raise StudioError(f"{where} has no prompts. Write one a line, with {{}} for the subject.")
    return tuple(dict.fromkeys(filter(None, found)))


def with_subject(prompt: str, words: str) -> str:
    """The prompt with `words` in the subject's place: a token to paint it, a category to compare with."""
    return prompt.replace("{}", words)


def without_subject(prompt: str) -> str:
    """The prompt with the subject and its article left out: "a photo of in the snow" (Textual Inversion's protocol,
    so that a picture is not rewarded for showing just any cat)."""
    bare = re.sub(r"\b(?:an?|the|my|one)\s+\{\}|\{\}", "", prompt, count=1, flags=re.IGNORECASE)
    return " ".join(bare.split()) or PLAIN.partition(" a {}")[0]
