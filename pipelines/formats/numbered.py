"""Files with one JSON object a line: a broken line is told by its number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.formats.json_lines import half_character

MAX_BYTES = 16 * 2**20


def numbered_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and content of every line that isn't blank.

    StudioError, with file and line, for a line that is no JSON object or says something twice.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise StudioError(f"{file.name} is far too large for a list of pictures. Choose another folder.")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise StudioError(f"There is no {file.name} in '{printable(file.parent.name)}'. Choose its folder.") from error
    except UnicodeDecodeError as error:
        raise StudioError(f"{file.name} is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise StudioError(f"{file.name} can't be read ({error.strerror}). Choose another folder.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _object(f"{file.name}, line {number}", line)


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        content = json.loads(line, object_pairs_hook=lambda pairs: _unique(where, pairs))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        reason = (
            f"{error.msg} at character {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "too deep or too long"
        )
        raise StudioError(f"{where} is no JSON ({reason}). Every line is one {{...}} by itself.") from error
    if not isinstance(content, dict):
        raise StudioError(f"{where} is {printable(content)}, not {{...}}. Every line is one {{...}} by itself.")
    if half_character(json.dumps(content, ensure_ascii=False)):
        raise StudioError(f"{where} has half a character (\\ud800 to \\udfff alone). Write the whole one, or none.")
    return content


def _unique(where: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise StudioError(f"{where} says '{printable(key)}' twice. Give each its own name.")
        found[key] = value
    return found
