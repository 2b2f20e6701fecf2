"""Pydantic `Params` -> Gradio fields -> `Params`. A method's settings are written once, in its `Params`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import gradio as gr
from pydantic import BaseModel

from pipelines import Setting, TrainParams, fields, validated

Params = TypeVar("Params", bound=BaseModel)


def basic(params: type[BaseModel]) -> set[str]:
    """The settings a form shows at once: those marked so here or, where a method redeclares one, in `TrainParams`."""
    return {setting.name for kind in (params, TrainParams) for setting in fields(kind) if setting.basic}


def component(setting: Setting, value: Any, prefix: str = "param") -> gr.components.Component:
    """One setting as a Gradio component that shows `value`.

    Bounds stand in the help and are not given to the component: Gradio's own complaint would not say which field it
    means.
    """
    common: dict[str, Any] = {"label": setting.help or setting.label, "info": _info(setting), "interactive": True}
    common |= {"elem_id": f"{prefix}-{setting.name}", "min_width": 150}
    match setting.kind:
        case "switch":
            return gr.Checkbox(value=bool(value), **common)
        case "choice":
            return gr.Dropdown(choices=list(setting.choices), value=value, **common)
        case "integer":
            return gr.Number(value=value, precision=0, **common)
        case "number":
            return gr.Number(value=value, **common)
        case _:
            return gr.Textbox(value=_written(value), **common)


def read(params: type[Params], values: Mapping[str, Any]) -> Params:
    """The settings that a form holds; StudioError with a reason for every field that is wrong."""
    known = {setting.name: setting for setting in fields(params)}
    return validated(
        params, {name: _value(known[name], value) if name in known else value for name, value in values.items()}
    )


def _info(setting: Setting) -> str:
    """The name as the command line and a preset know it, and the bounds."""
    bounds = setting.range() if setting.kind in ("integer", "number") else ""
    return " · ".join(filter(None, [setting.name, bounds]))


def _written(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _value(setting: Setting, value: Any) -> Any:
    """What the component holds as what the field means: an empty field is None, 12.0 in a whole-number field is 12."""
    if setting.optional and (value is None or value == ""):
        return None
    if setting.kind == "text" and isinstance(value, str) and isinstance(setting.default, tuple | list):
        return [_item(part.strip(), setting.default) for part in value.split(",") if part.strip()]
    if setting.kind == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _item(text: str, like: tuple[Any, ...] | list[Any]) -> Any:
    """One entry of a list: a number where the default holds numbers; what is none stays text, for the check to name."""
    try:
        return type(like[0])(text) if like and type(like[0]) in (int, float) else text
    except ValueError:
        return text
