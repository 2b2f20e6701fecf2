"""Marks that a person makes in photos: clicks, lines and boxes, in pixels of the whole upright photo.

On the command line a mark is `FILE:X,Y` or `FILE:X0,Y0,X1,Y1`, with `NAME=` before it where several things are masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.tokens import check_token

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.evaluate.sights import Box
    from pipelines.photos import Photo

Point = tuple[float, float]  # x, y
KINDS = {"click": "X,Y", "away": "X,Y", "line": "X0,Y0,X1,Y1", "box": "X0,Y0,X1,Y1"}
_SAMPLE = {"X,Y": "120,80", "X0,Y0,X1,Y1": "40,30,200,180"}


@dataclass(frozen=True)
class Given:
    """A mark as it was typed."""

    kind: str  # of KINDS
    text: str

    def split(self, files: Mapping[str, str]) -> tuple[str, str, tuple[float, ...]]:
        """The mask's name ("" = not said), the photo and the numbers. `files`: what a photo may be called -> its file.

        StudioError when it can't be read or there is no such photo.
        """
        form = KINDS[self.kind]
        before, colon, after = self.text.rpartition(":")
        try:
            numbers = tuple(float(number) for number in after.split(","))
        except ValueError:
            numbers = ()
        wanted = len(form.split(","))
        several = self.kind == "line" and len(numbers) > wanted and len(numbers) % 2 == 0
        if not colon or not all(map(math.isfinite, numbers)) or not (len(numbers) == wanted or several):
            raise StudioError(
                f"'{printable(self.text)}' is no {self.kind}. Write --{self.kind} FILE:{form} in pixels of the photo, "
                f"as in cat.png:{_SAMPLE[form]}."
            )
        if before in files:
            return "", files[before], numbers
        name, equals, file = before.partition("=")
        if not equals or file not in files:
            known = ", ".join(list(dict.fromkeys(files.values()))[:4])
            missing = printable(file if equals else before)
            raise StudioError(f"There is no photo '{missing}' in the folder. It has: {printable(known, 200)}.")
        return name, files[file], numbers


@dataclass(frozen=True)
class Marking:
    """All marks of one thing in one photo."""

    clicks: tuple[Point, ...] = ()
    away: tuple[Point, ...] = ()  # places that are not it
    lines: tuple[tuple[Point, ...], ...] = ()
    box: Box | None = None

    def scaled(self, across: float, down: float) -> Marking:
        """The same marks in a photo so many times as wide and as tall."""

        def moved(points: Sequence[Point]) -> tuple[Point, ...]:
            return tuple((x * across, y * down) for x, y in points)

        box = self.box and (self.box[0] * across, self.box[1] * down, self.box[2] * across, self.box[3] * down)
        return Marking(moved(self.clicks), moved(self.away), tuple(map(moved, self.lines)), box)

    def with_mark(self, kind: str, numbers: Sequence[float]) -> Marking:
        """And one mark more; StudioError for a second box."""
        points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        if kind == "click":
            return replace(self, clicks=self.clicks + points)
        if kind == "away":
            return replace(self, away=self.away + points)
        if kind == "line":
            return replace(self, lines=(*self.lines, points))
        if self.box is not None:
            raise StudioError("two boxes are drawn around one thing. Leave one out, or give each a name: NAME=FILE:...")
        left, top, right, bottom = numbers
        return replace(self, box=(left, top, right, bottom))

    def check(self, size: tuple[int, int]) -> None:
        """StudioError for what is not in a photo of `size` (width, height), for a box without area, and for marks that
        only say where it is not."""
        width, height = size
        corners = [] if self.box is None else [self.box[:2], self.box[2:]]
        for x, y in [*self.clicks, *self.away, *(point for line in self.lines for point in line), *corners]:
            if not (0 <= x <= width and 0 <= y <= height):
                raise StudioError(f"({x:g}, {y:g}) is outside the photo of {width} x {height} pixels. Mark inside it.")
        if self.box is not None and (self.box[2] - self.box[0] < 1 or self.box[3] - self.box[1] < 1):
            given = ",".join(f"{value:g}" for value in self.box)
            raise StudioError(f"the box {given} has no area. Give left, top, right, bottom, each side a pixel or more.")
        if not self.clicks and not self.lines and self.box is None:
            raise StudioError("it is only said where it is not. Click on it too, or draw a line or a box.")


Marks = dict[tuple[str, str], Marking]  # (the photo's file, the mask's name) -> what marks it


def read_marks(given: Sequence[Given], photos: Sequence[Photo], names: Sequence[str] = ()) -> Marks:
    """What was typed, by photo and thing. `names` are the masks that are wanted, () = those that the marks name.

    StudioError, naming the file, for what can't be meant.
    """
    files = _callings([photo.path for photo in photos])
    found: Marks = {}
    for one in given:
        name, file, numbers = one.split(files)
        if name:
            check_token(f"<{name}>")
        elif len(names) == 1:
            name = names[0]
        if names and name not in names:
            raise StudioError(
                f"'{printable(one.text)}' doesn't say which mask it is for. Write NAME=FILE:..., with one of: "
                f"{', '.join(names)}."
                if not name
                else f"There is no mask called '{printable(name)}' to make. Choose one of: {', '.join(names)}."
            )
        try:
            found[file, name] = found.get((file, name), Marking()).with_mark(one.kind, numbers)
        except StudioError as error:
            raise StudioError(f"{file}: {error}") from error
    sizes = {photo.path.name: photo.size for photo in photos}
    for (file, _), marking in found.items():
        try:
            marking.check(sizes[file])
        except StudioError as error:
            raise StudioError(f"{file}: {error}") from error
    return found


def _callings(paths: Sequence[Path]) -> dict[str, str]:
    """What a photo may be called: its file, or that without the ending where only one is called so."""
    stems = [path.stem for path in paths]
    short = {path.stem: path.name for path in paths if stems.count(path.stem) == 1}
    return short | {path.name: path.name for path in paths}
