"""Where things stand in a JSON text: people who edit a file want to know the line."""

from __future__ import annotations

import json
from json.decoder import JSONDecoder
from typing import Any

from pipelines.errors import StudioError

Path = tuple[str | int, ...]
_SPACE = " \t\n\r"
_DIGITS = 400  # of a number; Python itself refuses whole ones of more than 4300, and beyond 308 they fit no float


def half_character(text: str) -> bool:
    """Whether half of a character stands alone in a text, which no file name and no prompt can hold."""
    return any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def read_located(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """The data, and the line of every value by its path of keys and indices; of a key twice in one object, the second.

    StudioError with file and line for what isn't JSON, is nested beyond reason, has a key twice, a number too long to
    be one, or text that isn't Unicode.
    """
    try:
        data = json.loads(text, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise StudioError(f"{name}, line {error.lineno}: this is no JSON ({error.msg}). Put it right there.") from error
    except RecursionError as error:
        raise StudioError(f"{name}: it is nested too deeply to be a configuration. Choose another file.") from error
    lines: dict[Path, int] = {}
    _Walk(text, name, lines).value(0, ())
    return data, lines


class _Walk:
    """Once more through a text that is known to be JSON, noting lines."""

    def __init__(self, text: str, name: str, lines: dict[Path, int]) -> None:
        self.text, self.name, self.lines = text, name, lines
        self._counted, self._line = 0, 1
        self._scalar = JSONDecoder(parse_int=_whole)

    def value(self, at: int, path: Path) -> int:
        """Note the value that starts at or after `at`; the position after it."""
        at = self._skip(at)
        self.lines.setdefault(path, self._at(at))
        if self.text[at] == "{":
            return self._object(at + 1, path)
        if self.text[at] == "[":
            return self._array(at + 1, path)
        return self._read(at)[1]

    def _read(self, at: int) -> tuple[Any, int]:
        """The text, number or word at a position, and the position after it."""
        found, end = self._scalar.raw_decode(self.text, at)
        if isinstance(found, float) and end - at > _DIGITS:
            raise StudioError(
                f"{self.name}, line {self._at(at)}: a number of {end - at} digits can't be meant. Write a shorter one."
            )
        if isinstance(found, str) and half_character(found):
            raise StudioError(
                f"{self.name}, line {self._at(at)}: the text has characters that are not Unicode. Type it again."
            )
        return found, end

    def _object(self, at: int, path: Path) -> int:
        at, keys = self._skip(at), set()
        while self.text[at] != "}":
            at = self._skip(at + (self.text[at] == ","))
            key, after = self._read(at)
            if key in keys:
                raise StudioError(f"{self.name}, line {self._at(at)}: '{key}' is there twice. Leave one out.")
            keys.add(key)
            self.lines[(*path, key)] = self._at(at)
            at = self._skip(self.value(self._skip(after) + 1, (*path, key)))
        return at + 1

    def _array(self, at: int, path: Path) -> int:
        at, count = self._skip(at), 0
        while self.text[at] != "]":
            at = self._skip(self.value(at + (self.text[at] == ","), (*path, count)))
            count += 1
        return at + 1

    def _skip(self, at: int) -> int:
        while self.text[at] in _SPACE:
            at += 1
        return at

    def _at(self, at: int) -> int:
        """The line of a position; positions only grow."""
        self._line += self.text.count("\n", self._counted, at)
        self._counted = max(self._counted, at)
        return self._line


def _whole(digits: str) -> int | float:
    """A whole number; one too long to be read exactly becomes a float, and its place is told where lines are known."""
    return int(digits) if len(digits) <= _DIGITS else float(digits)
