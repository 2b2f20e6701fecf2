"""What Toybox can name, and how it says it: the vocabulary of the world and the captions drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.templates import TEMPLATES

CATEGORIES = ("ball", "cube", "cone", "star", "mushroom", "robot", "car", "house", "fish", "tree", "cup", "cat")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "orange": (246, 138, 24),
    "yellow": (250, 220, 50),
    "green": (44, 160, 66),
    "blue": (40, 84, 214),
    "purple": (128, 52, 178),
    "pink": (250, 148, 196),
    "brown": (122, 74, 38),
    "black": (36, 36, 42),
    "white": (246, 246, 246),
}
PATTERNS = ("plain", "striped", "dotted")
# background name -> the words that follow the toys in a caption
BACKGROUNDS: dict[str, str] = {
    "grass": "on the grass",
    "sand": "on the sand",
    "snow": "in the snow",
    "sea": "by the sea",
    "night": "at night",
    "road": "on the road",
    "table": "on a table",
    "carpet": "on a carpet",
    "simple": "simple background",
}
RARE_WORDS = ("sks", "ohwx", "zwx", "olis", "hta", "vtr", "qix", "bnha")
NUMBERS = {2: "two", 3: "three", 4: "four"}
# The frames that the methods put around their words, so that none of them is foreign to the model.
FRAMES = TEMPLATES


@dataclass(frozen=True)
class Wording:
    """How often a caption leaves something unsaid (probabilities)."""

    color: float = 0.9
    second: float = 0.15
    pattern: float = 0.75
    background: float = 0.85
    places: float = 0.2
    rare: float = 0.04
    bare: float = 0.03
    plain_frame: float = 0.6


TRUTHFUL = Wording(color=1, second=0, pattern=1, background=1, places=0, rare=0, bare=0, plain_frame=1)


@dataclass(frozen=True)
class Caption:
    """A caption, and per toy what it said of it (index into the scene's toys, noun's character span, attributes)."""

    text: str
    said: tuple[tuple[int, tuple[int, int], str, str | None, str | None], ...]  # toy, noun span, noun, colour, pattern
    background: str | None


def phrase(
    category: str, colors: Sequence[str], pattern: str, rng: np.random.Generator, wording: Wording
) -> tuple[str, str | None, str | None]:
    """Words for one toy, and which colour and pattern they name (None where they are silent)."""
    words = []
    if rng.random() < wording.rare:
        words.append(str(rng.choice(RARE_WORDS)))
    color = None
    if rng.random() < wording.color:
        color = colors[0]
        words.append(f"{colors[0]} and {colors[1]}" if rng.random() < wording.second else color)
    said = None
    if pattern != "plain" and rng.random() < wording.pattern:
        said = pattern
        words.append(pattern)
    return " ".join([*words, category]), color, said


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def caption(toys: Sequence[dict], background: str, rng: np.random.Generator, wording: Wording = TRUTHFUL) -> Caption:
    """One way to say a scene.

    Args:
        toys: truth of each toy: {"category", "colors", "pattern", "box"}; box = x0, y0, x1, y1 in pixels.
        background: a key of BACKGROUNDS.
        rng: decides what is left unsaid.
        wording: how often.
    """
    order = rng.permutation(len(toys))
    phrases = [phrase(toys[i]["category"], toys[i]["colors"], toys[i]["pattern"], rng, wording) for i in order]
    if len(toys) == 1 and rng.random() < wording.bare:
        words, color, pattern = phrases[0]
        start = len(words) - len(toys[0]["category"])
        return Caption(words, ((0, (start, len(words)), toys[0]["category"], color, pattern),), None)
    if len(toys) == 1:
        plain = rng.random() < wording.plain_frame
        frame = ("a photo of a {}", "a {}")[int(rng.integers(2))] if plain else FRAMES[int(rng.integers(len(FRAMES)))]
        head, tail = frame.split("{}")
        if head.endswith(" a ") or head == "a ":
            head = head[:-2] + _article(phrases[0][0]) + " "
        parts = [head, phrases[0][0], tail]
    else:
        parts = _several([p[0] for p in phrases], toys, order, rng, wording)
    text, said, cursor = "", [], 0
    for part in parts:
        text += part
        if cursor < len(phrases) and part == phrases[cursor][0]:
            index, (_, color, pattern) = int(order[cursor]), phrases[cursor]
            noun = toys[index]["category"]
            said.append((index, (len(text) - len(noun), len(text)), noun, color, pattern))
            cursor += 1
    named = rng.random() < wording.background
    if named:
        text += f"{', ' if background == 'simple' else ' '}{BACKGROUNDS[background]}"
    return Caption(text, tuple(said), background if named else None)


def _several(
    words: list[str], toys: Sequence[dict], order: np.ndarray, rng: np.random.Generator, wording: Wording
) -> list[str]:
    """The pieces of a sentence about two to four toys; every toy's phrase is a piece of its own."""
    starts = ["a photo of ", ""]
    if rng.random() < 0.15:
        starts = [f"{len(words)} objects: ", f"{NUMBERS[len(words)]} objects: "]
    parts = [str(rng.choice(starts))]
    places = len(words) == 2 and rng.random() < wording.places
    left = min(range(len(toys)), key=lambda i: toys[i]["box"][0])
    for position, text in enumerate(words):
        if position:
            parts.append(" and " if position == len(words) - 1 else ", ")
        parts += [_article(text) + " ", text]
        if places:
            parts.append(" on the left" if order[position] == left else " on the right")
    return parts
