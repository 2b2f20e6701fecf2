"""Layouts: which part of the picture belongs to which word of the prompt.

A region is drawn as a colour of an image, as a box or as a mask, and bound to a word and, where the prompt has it more
than once, to one of its occurrences. How strongly words are drawn to their regions is Cones 2's layout guidance
(arXiv:2305.19327, section 3.3); `pipelines.attention.guidance` applies it.

Two regions may have the same word: then each takes an occurrence of its own, in order, and a word that occurs only once
may look into both. (In the released code their weights are added, which forbids the word everywhere.)
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError
from pipelines.files import printable

if TYPE_CHECKING:
    from pipelines.text import Tokenized

Mask = NDArray[np.bool_]  # (height, width)

LARGEST_SIDE = 8192
LARGEST_NUMBER = 1e30  # in fp32 it can still be multiplied by what attention brings
MODES = ("strict", "figure")


@dataclass(frozen=True)
class Area:
    """Part of a drawing of `height` x `width` pixels, stretched over the picture. `bits`: rows of pixels, packed."""

    height: int
    width: int
    bits: bytes

    @classmethod
    def of(cls, where: NDArray[Any]) -> Area:
        """From (height, width): what is not zero is inside. StudioError for another shape or a huge one."""
        if where.ndim != 2 or not 0 < min(where.shape) <= max(where.shape) <= LARGEST_SIDE:
            raise StudioError(f"A region is a mask of at most {LARGEST_SIDE} pixels a side, not {where.shape}.")
        return cls(where.shape[0], where.shape[1], np.packbits(where != 0).tobytes())

    @classmethod
    def box(cls, corners: Sequence[float], size: tuple[int, int]) -> Area:
        """From left, top, right, bottom in pixels of a drawing of `size` (height, width); right and bottom excluded.

        StudioError for a box that is not in the drawing or holds no pixel.
        """
        height, width = size
        known = len(corners) == 4 and all(math.isfinite(value) for value in corners)
        left, top, right, bottom = (round(value) for value in corners) if known else (0, 0, 0, 0)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            given = ", ".join(f"{value:g}" for value in corners)
            raise StudioError(
                f"The box {given} holds nothing of a drawing {width} x {height}. Give left, top, right, bottom in it."
            )
        where = np.zeros((height, width), bool)
        where[top:bottom, left:right] = True
        return cls.of(where)

    @cached_property
    def mask(self) -> Mask:
        """(height, width), True inside."""
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.height * self.width)
        return bits.reshape(self.height, self.width).astype(bool)

    def to_json(self) -> list[Any]:
        """Plain JSON data, the inverse of `from_json`."""
        return [self.height, self.width, base64.b64encode(zlib.compress(self.bits, 9)).decode("ascii")]

    @classmethod
    def from_json(cls, data: Any) -> Area:
        """ValueError or TypeError for anything that `to_json` did not make."""
        height, width, text = data
        if not (type(height) is type(width) is int and 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE):
            raise ValueError("not a size")
        wanted = -(-height * width // 8)
        try:
            bits = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), wanted + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(bits) != wanted:
            raise ValueError("too few or too many pixels")
        return cls(height, width, bits)


@dataclass(frozen=True)
class Region:
    """One part of the picture and the words whose place it is."""

    words: str  # "cat", "pet cat", "<my-cat>"
    area: Area
    occurrence: int | None = None  # 0 = the first; None = every one, shared among regions with the same words
    weight: float = 2.5  # how much the words are strengthened inside

    def check(self) -> None:
        """StudioError for a region that could have no effect, or a senseless one."""
        if not self.words.strip():
            raise StudioError("A region has no word. Say which word of the prompt it is the place of.")
        if not any(self.area.bits):
            raise StudioError(f"The region of '{printable(self.words)}' is empty. Draw it, or leave it out.")
        _number(self.weight, f"The weight of '{printable(self.words)}'")


@dataclass(frozen=True)
class Layout:
    """Regions, and how attention is led to them; the defaults are the published ones.

    `strength` is Cones 2's guidance weight (0: attention is left alone, and regions only say where concepts act).
    `steps`: during the first so many (None = all). `negative` is the weight outside: everywhere outside the word's
    region in mode "strict" (the released code), only in regions of other words in mode "figure" (the paper's figure).
    """

    regions: tuple[Region, ...]
    strength: float = 0.08
    steps: int | None = None
    negative: float = -1e8
    mode: str = "strict"

    def check(self) -> None:
        """StudioError for anything that can't be painted."""
        if not self.regions:
            raise StudioError("The layout has no regions. Draw one, or leave the layout out.")
        for region in self.regions:
            region.check()
        _number(self.strength, "The layout's strength")
        _number(self.negative, "The layout's weight outside")
        if self.strength < 0 or self.negative > 0:
            raise StudioError("The layout's strength is 0 or more, and its weight outside 0 or less.")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 0):
            raise StudioError(f"The layout can't guide {self.steps} steps. Give 0 or more, or leave the number out.")
        if self.mode not in MODES:
            raise StudioError(f"There is no layout mode '{printable(self.mode)}'. Choose one of: {', '.join(MODES)}.")

    def guides(self, step: int) -> bool:
        """Whether attention is led at this step, 0 = the first."""
        return self.strength > 0 and (self.steps is None or step < self.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, the inverse of `from_json`."""
        regions = [
            {"words": one.words, "area": one.area.to_json(), "occurrence": one.occurrence, "weight": one.weight}
            for one in self.regions
        ]
        settings = {"strength": self.strength, "steps": self.steps, "negative": self.negative, "mode": self.mode}
        return {"regions": regions} | settings

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """StudioError for anything that `to_json` did not make."""
        try:
            regions = tuple(
                Region(str(one["words"]), Area.from_json(one["area"]), _whole(one["occurrence"]), float(one["weight"]))
                for one in data["regions"]
            )
            strength, negative = float(data["strength"]), float(data["negative"])
            layout = cls(regions, strength, _whole(data["steps"]), negative, str(data["mode"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StudioError("The layout in this file is damaged or from a newer Attune. Draw it again.") from error
        layout.check()
        return layout


@dataclass(frozen=True)
class Bound:
    """A region and where its words stand in a prompt."""

    region: Region
    tokens: tuple[int, ...]


def bind(layout: Layout, prompt: Tokenized) -> list[Bound]:
    """Each region with its token positions. StudioError for words that aren't in the prompt.

    Regions that would claim the same tokens share them out: named occurrences first, then longer words ("pet cat"
    before "cat"), then in the order of the layout, each one occurrence. Where nothing is left, the rest have it too.
    """
    groups = [_occurrences(region, prompt) for region in layout.regions]
    words = [" ".join(region.words.casefold().split()) for region in layout.regions]
    taken: set[int] = set()
    found: dict[int, tuple[int, ...]] = {}
    named = [region.occurrence is not None for region in layout.regions]
    for place in sorted(range(len(words)), key=lambda place: (not named[place], -len(words[place]), place)):
        free = [group for group in groups[place] if not taken & set(group)] or groups[place]
        later = [other for other in range(place + 1, len(words)) if words[other] == words[place] and not named[other]]
        chosen = free[:1] if later else free
        found[place] = tuple(sorted({position for group in chosen for position in group}))
        taken.update(found[place])
    return [Bound(region, found[place]) for place, region in enumerate(layout.regions)]


def contested(layout: Layout, prompt: Tokenized) -> list[str]:
    """Sentences about regions that claim the same tokens without saying which occurrence they mean."""
    open_ = [region for region in layout.regions if region.occurrence is None]
    claims = [{position for group in _occurrences(region, prompt) for position in group} for region in open_]
    found = {one.region: one.tokens for one in bind(layout, prompt)}
    sharing = [
        region
        for place, region in enumerate(open_)
        if any(claims[place] & claim for other, claim in enumerate(claims) if other != place)
    ]
    if not sharing:
        return []
    told = ", ".join(f"'{printable(one.words, 40)}' has token {_listed(found[one])}" for one in sharing)
    return [f"Several regions claim the same words of the prompt, so they share them: {told}."]


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def _occurrences(region: Region, prompt: Tokenized) -> list[list[int]]:
    """The positions of each occurrence that the region may claim."""
    from pipelines.tokens import find_word

    if region.occurrence is not None:
        return [find_word(prompt, region.words, region.occurrence)]
    every = set(find_word(prompt, region.words))
    groups: list[list[int]] = []
    while every - {position for group in groups for position in group}:
        groups.append(find_word(prompt, region.words, len(groups)))
    return groups


def colour_areas(
    image: Any, colours: Sequence[tuple[int, int, int]], size: tuple[int, int] | None = None
) -> dict[tuple[int, int, int], Area]:
    """The area of each colour in a PIL image: pixels that are exactly that colour, as in Cones 2; alpha is ignored.

    With `size` (height, width) the image is first stretched to it as the released code does (bicubic, so that blended
    pixels at edges belong to nothing; palette images keep their colours). StudioError for a colour that isn't there.
    """
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]))
    pixels = np.asarray(image.convert("RGB"))
    areas = {}
    for colour in colours:
        where = (pixels == np.array(colour, np.uint8)).all(-1)
        if not where.any():
            known = ", ".join(",".join(map(str, one)) for one in _palette(pixels))
            raise StudioError(f"The drawing has no pixel of the colour {','.join(map(str, colour))}. It has: {known}.")
        areas[colour] = Area.of(where)
    return areas


def _palette(pixels: NDArray[np.uint8], most: int = 6) -> Iterator[tuple[int, ...]]:
    """The colours that cover most of a picture."""
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    for place in counts.argsort(kind="stable")[::-1][:most]:
        yield tuple(int(value) for value in found[place])


def labels(areas: Mapping[str, Area], size: tuple[int, int]) -> tuple[NDArray[np.intp], list[frozenset[str]]]:
    """Which of the named areas each pixel of (height, width) lies in: a number per pixel, and what the numbers mean."""
    codes: NDArray[np.int64] = np.zeros(size, np.int64)
    rows, columns = np.arange(size[0]), np.arange(size[1])
    for bit, area in enumerate(areas.values()):
        stretched = area.mask[np.ix_(rows * area.height // size[0], columns * area.width // size[1])]
        codes |= stretched.astype(np.int64) << bit
    values, places = np.unique(codes, return_inverse=True)
    names = list(areas)
    meaning = [frozenset(name for bit, name in enumerate(names) if value >> bit & 1) for value in values.tolist()]
    return places.reshape(size), meaning


def _number(value: float, what: str) -> None:
    if not math.isfinite(value) or abs(value) > LARGEST_NUMBER:
        raise StudioError(f"{what} is {value}, which is no usable number. The published ones are 2.5, 0.08 and -1e8.")


def _whole(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise TypeError("not a whole number")
    return value
