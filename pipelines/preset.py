"""Presets: named settings of a method, one TOML file each.

title = "Toybox, in two minutes"
bases = ["toybox"]          # the kinds of base it is meant for; none = any
method = "residual"         # only in a person's own preset; ours lie in presets/<method>/

[params]
steps = 400
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.errors import StudioError
from pipelines.files import printable, write_atomic
from pipelines.methods import get_method, method_names
from pipelines.params import TrainParams
from pipelines.settings import fields, parse_settings, validated

__all__ = ["Preset", "fields", "load_preset", "parse_settings", "presets", "problems", "read_preset", "save_preset"]

BUILT_IN = Path(__file__).parents[1] / "presets"
MAX_BYTES = 64 * 1024  # a preset is a page of text; anything larger is something else
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """Named settings: `params` is complete and checked, `title` is for people, `bases` are kinds of base models."""

    method: str
    name: str  # the file's name without .toml
    title: str
    bases: tuple[str, ...]
    params: TrainParams
    path: Path

    @property
    def built_in(self) -> bool:
        return self.path.is_relative_to(BUILT_IN)


class _File(BaseModel):
    """What stands in the file, beside which nothing may stand."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field("", max_length=200)
    bases: list[str] = []
    method: str = ""
    params: dict[str, Any] = {}


def read_preset(path: Path, method: str = "") -> Preset:
    """One preset file, checked. `method` is what its folder says, where it says so.

    StudioError with a reason for every field when the file is missing, no TOML, for another method, or names settings
    that the method does not have or values out of bounds.
    """
    where = f"The preset {path.name}"
    content = validated(_File, _toml(path), where)
    if content.method and method and content.method != method:
        raise StudioError(f"{where} is for the method '{content.method}', not '{method}'. Choose one for '{method}'.")
    if not (method or content.method):
        raise StudioError(f'{where} names no method. Add a line such as: method = "{method_names()[0]}".')
    used = method or content.method
    params = validated(get_method(used).Params, content.params, where)
    return Preset(used, path.stem, content.title or path.stem, tuple(content.bases), params, path)


def presets(method: str | None = None, folder: Path | None = None) -> list[Preset]:
    """Ours and then those in `folder` (a workspace's own), of one method or of all. Broken ones of a person's own are
    left out and logged; `problems` says why."""
    names = method_names() if method is None else [method]
    ours = [read_preset(path, name) for name in names for path in sorted((BUILT_IN / name).glob("*.toml"))]
    own, broken = _own(folder)
    for reason in broken.values():
        _log.warning("%s", reason)
    return ours + [preset for preset in own if preset.method in names]


def problems(folder: Path | None = None) -> dict[Path, str]:
    """Why each broken preset of `folder` can't be used; what an app shows at its start. StudioError when one of ours is
    broken."""
    presets()
    return _own(folder)[1]


def load_preset(
    method: str, name: str | None = None, base_kind: str = "toybox", folder: Path | None = None
) -> TrainParams:
    """The settings of a preset: by name (ours, or one in `folder`), by the path of a .toml file, or, without a name,
    the one that names the base's kind, else `default`. StudioError naming those there are when there is no such."""
    get_method(method)
    if name and (name.endswith(".toml") or os.sep in name):
        return read_preset(Path(name).expanduser(), method).params
    known = presets(method, folder)
    if name is None:
        meant = [preset for preset in known if preset.built_in and base_kind in preset.bases]
        return (meant or [preset for preset in known if preset.name == "default"] or known)[0].params
    for preset in reversed(known):  # a person's own goes before ours of the same name
        if preset.name == name:
            return preset.params
    broken = {path.stem: reason for path, reason in _own(folder)[1].items()}
    if name in broken:
        raise StudioError(broken[name])
    names = [preset.name for preset in known]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"Choose one of: {', '.join(names)}, or name a .toml file."
    raise StudioError(f"There is no preset '{name}' for '{method}'. {hint}")


def save_preset(folder: Path, name: str, method: str, params: TrainParams, title: str = "") -> Path:
    """Write settings as a preset of a person's own into `folder`; only what differs from the method's defaults.

    Replaces one of the same name. StudioError when the name is no plain file name or the disk is full.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise StudioError(f"'{printable(name)}' can't name a preset. Use small letters, digits, '-' and '_'.")
    path = folder / f"{name}.toml"
    changed = params.model_dump(exclude_defaults=True)
    lines = [f"title = {_written(title or name)}", f"method = {_written(method)}", "", "[params]"]
    lines += [f"{key} = {_written(value)}" for key, value in changed.items() if value is not None]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def _own(folder: Path | None) -> tuple[list[Preset], dict[Path, str]]:
    good, broken = [], {}
    for path in sorted(folder.glob("*.toml")) if folder else []:
        try:
            good.append(read_preset(path))
        except StudioError as error:
            broken[path] = str(error)
    return good, broken


def _toml(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise StudioError(f"{path.name} is too large for a preset. Choose a .toml file of settings.")
        return tomllib.loads(content.decode())
    except OSError as error:
        raise StudioError(f"Cannot read the preset {path}: {error.strerror}. Choose another file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StudioError(f"The preset {path.name} is no valid TOML: {error}. Correct it and try again.") from error


def _written(value: Any) -> str:
    """A TOML value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(printable(value, 200), ensure_ascii=False) if isinstance(value, str) else repr(value)
