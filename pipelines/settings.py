"""`Params` described for forms and --help, and read from what people write. Bounds stand in `Params` alone."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipelines.errors import StudioError

Params = TypeVar("Params", bound=BaseModel)
Kind = Literal["integer", "number", "switch", "choice", "text"]
_SIMPLE: dict[Any, Kind] = {bool: "switch", int: "integer", float: "number"}


@dataclass(frozen=True)
class Setting:
    """One field of a `Params` class. Bounds are inclusive unless `above` or `below` says otherwise."""

    name: str
    label: str
    kind: Kind
    default: Any
    help: str = ""
    low: float | None = None
    high: float | None = None
    above: bool = False  # `low` itself is not allowed
    below: bool = False  # `high` itself is not allowed
    choices: tuple[Any, ...] = ()
    optional: bool = False  # None is allowed
    basic: bool = False  # shown at once; the others wait under "Advanced"

    def range(self) -> str:
        """The bounds or choices in words: "0 to 1", "at least 1", "more than 0", "noun | templates", or ""."""
        if self.choices:
            return " | ".join(map(str, self.choices))
        low = f"{'more than' if self.above else 'at least'} {self.low:g}" if self.low is not None else ""
        high = f"{'less than' if self.below else 'at most'} {self.high:g}" if self.high is not None else ""
        if low and high and not (self.above or self.below):
            return f"{self.low:g} to {self.high:g}"
        return ", ".join(part for part in (low, high) if part)


def fields(params: type[BaseModel]) -> list[Setting]:
    """Every field of a `Params` class, in the order of its declaration."""
    return [_field(name, info) for name, info in params.model_fields.items()]


def validated(
    params: type[Params], values: Mapping[str, Any], where: str = "The settings", *, text: bool = False
) -> Params:
    """The `Params` with these values; StudioError with a reason for every field that is wrong.

    `text`: the values are strings that a person typed. Otherwise types are taken strictly, as a file states them.
    """
    try:
        if text:
            return params.model_validate_strings(dict(values))
        return params.model_validate_json(json.dumps(values, default=str), strict=True)  # so that a list may be a tuple
    except ValidationError as error:
        reasons = "; ".join(_reason(params, dict(problem)) for problem in error.errors())
        raise StudioError(f"{where} can't be used: {reasons}.") from error


def parse_settings(params: type[BaseModel], written: Sequence[str]) -> dict[str, Any]:
    """["steps=100", "lr=1e-4"] -> {"steps": 100, "lr": 1e-4}, typed by `params`; the last of equal names counts.

    StudioError when one is not KEY=VALUE, when there is no such setting, or when a value is of another type or out of
    its bounds.
    """
    values = {}
    for item in written:
        name, sign, value = item.partition("=")
        if not sign or not name.strip():
            raise StudioError(f"'{item}' is not a setting. Write KEY=VALUE, such as steps=100.")
        values[name.strip()] = value.strip()
    checked = validated(params, values, text=True)
    return {name: getattr(checked, name) for name in values}


def _field(name: str, info: FieldInfo) -> Setting:
    kind, choices, optional = _kind(info.annotation)
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    low, above = _bound(info, Ge, Gt)
    high, below = _bound(info, Le, Lt)
    return Setting(
        name=name,
        label=info.title or name.replace("_", " ").capitalize(),
        kind=kind,
        default=info.get_default(call_default_factory=True),
        help=info.description or "",
        low=low,
        high=high,
        above=above,
        below=below,
        choices=choices,
        optional=optional,
        basic=bool(extra.get("basic", False)),
    )


def _kind(annotation: Any) -> tuple[Kind, tuple[Any, ...], bool]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        kind, choices, _ = _kind(inner[0]) if len(inner) == 1 else ("text", (), False)
        return kind, choices, len(inner) < len(typing.get_args(annotation))
    if origin is Literal:
        return "choice", typing.get_args(annotation), False
    return _SIMPLE.get(annotation, "text"), (), False


def _bound(info: FieldInfo, inclusive: type, exclusive: type) -> tuple[float | None, bool]:
    """The bound and whether it is exclusive."""
    for rule in info.metadata:
        for kind in (inclusive, exclusive):
            if isinstance(rule, kind):
                return float(getattr(rule, kind.__name__.lower())), kind is exclusive
    return None, False


def _reason(params: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """One field's problem in words."""
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, params.model_fields, n=1, cutoff=0.7)
        known = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(params.model_fields)}"
        return f"there is no setting '{name}' ({known})"
    words = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not name:  # about several fields at once
        return str(words)
    return f"{name} = {problem['input']!r} {words}" if problem["msg"].startswith("Input ") else f"{name}: {words}"
