"""The JSON file that tells Cones 2 and its forks what to paint: prompt, residuals, layout, and who is where.

    [{"prompt": "a mug and a dog on the beach",
      "residual_dict": {"mug": "residuals/mug.pt", ...},        name -> file
      "color_context": {"255,192,0": ["mug", 2.5], ...},        colour of the layout -> words of the prompt, weight
      "layout": "layouts/beach.png", "weight_negative": -1e8, "guidance_weight": 0.08, "guidance_steps": 50,
      "subject_list": [["mug", 2], ["dog", 5]]}]                name -> token of the prompt, 0 = the start token

Every element of the list is painted (there, the first), paths count from the file's own folder, then from where the
program runs (there, only that). A subject may also say its word, or a word and which occurrence of it (0 = the first):
["<cat2>", "cat"], ["<cat2>", "cat", 1]; a colour may do the same: ["cat", 2.5, 1]. A given token number is taken as it
is, with a warning where it is not on the subject's word. Words may also be a concept's <token>, which then acts in that
colour alone. The layout is only read when it is needed: when steps are guided, or for such a concept.

The original takes its guided steps twice by their number alone, also with a weight of 0. So it is here when these are
all steps; when they are fewer and nothing is guided, no step is taken again, and the person is told. Departures: the
same subject twice at the same token is refused (there, it acts twice as strongly), and so are a colour that the layout
lacks and words that the prompt lacks (there, a warning, and it is painted without them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import StudioError
from pipelines.files import printable
from pipelines.formats.json_lines import read_located

SIZE = (768, 768)  # layouts are stretched to it, as the original does
STEPS, GUIDANCE, SCHEDULER, COUNT, RECUR = 50, 7.5, "euler", 4, 1  # what it is painted with there
_LIMIT = 4_000_000  # bytes of a configuration
LARGEST = 64_000_000  # pixels of a layout
_MOST = 10**9  # of steps, and as a number of a token or an occurrence
_FIELDS = {
    "prompt": str,
    "residual_dict": dict,
    "color_context": dict,
    "guidance_steps": int,
    "guidance_weight": float,
    "weight_negative": float,
    "layout": str,
    "subject_list": list,
}


@dataclass(frozen=True)
class Colour:
    """What one colour of the layout means."""

    rgb: tuple[int, int, int]
    words: str
    weight: float
    occurrence: int | None
    line: int


@dataclass(frozen=True)
class Subject:
    """Where a residual is added: at a token, or at (an occurrence of) a word."""

    name: str
    at: int | str
    occurrence: int
    line: int


@dataclass(frozen=True)
class Config:
    """One element of a file. `lines` says where each field stands."""

    file: Path
    prompt: str
    residuals: Mapping[str, str]
    colours: tuple[Colour, ...]
    subjects: tuple[Subject, ...]
    guidance_steps: int
    guidance_weight: float
    weight_negative: float
    layout: str
    lines: Mapping[str, int]

    @property
    def folder(self) -> str:
        """Where the original puts its pictures: "<names>/<prompt>", with the characters no file system minds.

        So "A cat." is A_cat here (there, A_cat.), and <cat2> is cat2.
        """
        names = "_".join(sorted(subject.name for subject in self.subjects))
        return f"{plain_name(names)}/{plain_name('_'.join(self.prompt.split()))}"

    @property
    def legacy_folder(self) -> str:
        """The same to the letter, as on Linux: "<dog>_<cat>/A_dog,_a_cat.". What would lead elsewhere is left out."""
        names = "_".join(sorted(subject.name for subject in self.subjects))
        return f"{_one_level(names)}/{_one_level('_'.join(self.prompt.split()))}"

    def wrong(self, field: str, problem: str) -> StudioError:
        """The one sentence about a field."""
        return StudioError(f"{self.file.name}, line {self.lines.get(field, 1)}: {problem}")


def read_config(path: str | Path) -> list[Config]:
    """Every element of a configuration file; StudioError with file and line for what can't be meant."""
    path = Path(path)
    name = printable(path.name)
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise StudioError(f"Cannot read '{name}': {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise StudioError(f"'{name}' is no text. Choose a guidance configuration (.json).") from error
    if len(content) > _LIMIT:
        raise StudioError(f"'{name}' is too large for a guidance configuration. Choose another file.")
    data, lines = read_located(text, name)
    whole = data if isinstance(data, list) else [data]
    if not whole or not all(isinstance(one, dict) for one in whole):
        raise StudioError(f"{name}, line 1: a guidance configuration is a list of objects. See Cones 2's example.")
    starts: list[tuple[str | int, ...]] = [(place,) for place in range(len(whole))] if whole is data else [()]
    return [_Element(path, one, start, lines).read() for one, start in zip(whole, starts, strict=True)]


class _Element:
    """One element while it is checked."""

    def __init__(
        self, file: Path, data: dict[str, Any], start: tuple[str | int, ...], lines: Mapping[tuple[str | int, ...], int]
    ) -> None:
        self.file, self.data, self.start, self.lines = file, data, start, lines

    def line(self, *path: str | int) -> int:
        return self.lines.get((*self.start, *path), 1)

    def wrong(self, problem: str, *path: str | int) -> StudioError:
        return StudioError(f"{printable(self.file.name)}, line {self.line(*path)}: {problem}")

    def read(self) -> Config:
        for field, kind in _FIELDS.items():
            if field not in self.data:
                raise self.wrong(f"'{field}' is missing. Add it.")
            value = self.data[field]
            fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
            if not fits or isinstance(value, bool) or (kind is float and not abs(value) <= 1e30):
                raise self.wrong(f"'{field}' is {printable(value, 40)}, which is no {_KINDS[kind]}.", field)
        for name, file in self.data["residual_dict"].items():
            if not isinstance(file, str):
                raise self.wrong(f"the file of '{printable(name)}' is no text.", "residual_dict", name)
        for field in ("guidance_steps", "guidance_weight"):
            if self.data[field] < 0:
                raise self.wrong(f"'{field}' is less than 0. Give 0 (off) or more.", field)
        if self.data["guidance_steps"] > _MOST:
            raise self.wrong("so many steps can't be guided. Give the number of all steps, or less.", "guidance_steps")
        self._check_subjects(self.data["subject_list"])
        return Config(
            self.file,
            self.data["prompt"],
            self.data["residual_dict"],
            tuple(self._colour(key, value) for key, value in self.data["color_context"].items()),
            tuple(self._subject(place, value) for place, value in enumerate(self.data["subject_list"])),
            self.data["guidance_steps"],
            float(self.data["guidance_weight"]),
            float(self.data["weight_negative"]),
            self.data["layout"],
            {field: self.line(field) for field in _FIELDS},
        )

    def _check_subjects(self, subjects: list[Any]) -> None:
        """The same subject at the same place is a slip of the pen: it would act twice as strongly."""
        seen: set[str] = set()
        for place, one in enumerate(map(repr, subjects)):
            if one in seen:
                raise self.wrong(f"{printable(one, 60)} is there twice. Leave one out.", "subject_list", place)
            seen.add(one)

    def _colour(self, key: str, value: Any) -> Colour:
        numbers = re.findall(r"\d+", key) if re.fullmatch(r"\s*\d+\s*,\s*\d+\s*,\s*\d+\s*", key, re.ASCII) else []
        if len(numbers) != 3 or any(len(number) > 9 or int(number) > 255 for number in numbers):
            raise self.wrong(
                f"'{printable(key, 40)}' is no colour. Write red, green and blue, 0 to 255, as in \"255,192,0\".",
                "color_context",
                key,
            )
        parts: list[Any] = [*value, None, None] if isinstance(value, list) else [None] * 3
        words, weight, occurrence = parts[:3]
        sound = isinstance(words, str) and _is_number(weight) and (occurrence is None or _is_whole(occurrence))
        if not sound or not words.strip() or not 2 <= len(value) <= 3:
            raise self.wrong(
                f'the colour {key} needs its words and their weight, as in ["mug", 2.5].', "color_context", key
            )
        red, green, blue = (int(number) for number in numbers)
        return Colour((red, green, blue), words, float(weight), occurrence, self.line("color_context", key))

    def _subject(self, place: int, value: Any) -> Subject:
        parts: list[Any] = [*value, None, None, 0] if isinstance(value, list) else [None] * 3
        name, at, occurrence = parts[:3]
        if isinstance(value, list) and len(value) == 2:
            occurrence = 0
        sound = isinstance(value, list) and 2 <= len(value) <= 3 and isinstance(name, str) and _is_whole(occurrence)
        if not sound or not (_is_whole(at) or (isinstance(at, str) and at.strip())):
            raise self.wrong(
                'a subject is its name and its token in the prompt, as in ["mug", 2].', "subject_list", place
            )
        if name not in self.data["residual_dict"]:
            known = ", ".join(printable(one, 40) for one in self.data["residual_dict"]) or "none"
            raise self.wrong(
                f"'{printable(name, 40)}' has no file in 'residual_dict'. It has: {known}.", "subject_list", place
            )
        return Subject(name, at, occurrence, self.line("subject_list", place))


_KINDS: dict[type, str] = {str: "text", dict: "object", list: "list", int: "whole number", float: "usable number"}


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e30  # a whole number may be too large for a float


def _one_level(name: str) -> str:
    """One folder's name and no way to another."""
    kept = "".join(letter for letter in name if letter.isprintable() and letter not in "/\\")
    kept = kept.encode()[:240].decode(errors="ignore")
    return plain_name(kept) if not kept.strip(". ") or re.match(r"[A-Za-z]:", kept) else kept


def plain_name(name: str) -> str:
    """A folder's name on every system: without what separates, hides or is reserved; never empty, never long."""
    kept = "".join(letter for letter in name if letter.isprintable() and letter not in '<>:"/\\|?*')
    kept = kept.encode()[:120].decode(errors="ignore").strip(". ")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", kept)
    return f"{kept}_" if reserved else kept or "untitled"
