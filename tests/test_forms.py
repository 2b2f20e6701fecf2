"""Params -> fields -> Params, for every method and for every kind of field."""

from __future__ import annotations

from typing import Any, Literal

import gradio as gr
import pytest
from pydantic import BaseModel, ConfigDict, Field

from pipelines import StudioError, fields, get_method, load_preset, method_names, presets
from studio.forms import basic, component, read


class Everything(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(3, ge=1, le=9, description="How many")
    rate: float = Field(1e-4, gt=0, le=1)
    on: bool = False
    kind: Literal["a", "b"] = "a"
    word: str = "sks"
    limit: int | None = None
    names: tuple[str, ...] = ("x", "y")
    levels: tuple[int, ...] = (1, 2)


def shown(params: BaseModel) -> dict[str, Any]:
    """What a browser would send back for an untouched form."""
    values = {}
    for setting in fields(type(params)):
        box = component(setting, getattr(params, setting.name))
        assert isinstance(box, gr.components.Component)
        values[setting.name] = box.preprocess(box.postprocess(box.value))
    return values


@pytest.mark.parametrize("method", method_names())
def test_every_method_gets_its_defaults_back(method: str) -> None:
    params = get_method(method).Params()
    assert read(type(params), shown(params)) == params


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: f"{preset.method}-{preset.name}")
def test_every_preset_gets_its_values_back(preset: Any) -> None:
    params = load_preset(preset.method, preset.name)
    assert read(type(params), shown(params)) == params


def test_every_kind_of_field_comes_back() -> None:
    params = Everything(count=5, rate=0.25, on=True, kind="b", word="olis", names=("p", "q r"), levels=(4,))
    assert read(Everything, shown(params)) == params
    kinds = {setting.name: type(component(setting, setting.default)).__name__ for setting in fields(Everything)}
    assert kinds["on"] == "Checkbox" and kinds["kind"] == "Dropdown" and kinds["count"] == "Number"


def test_whole_numbers_may_arrive_as_floats() -> None:
    assert read(Everything, shown(Everything()) | {"count": 4.0}).count == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"count": 10}, ["count", "9"]),
        ({"count": 2.5}, ["count"]),
        ({"rate": 0}, ["rate", "greater than 0"]),
        ({"count": None}, ["count"]),
        ({"kind": "c"}, ["kind", "'a'"]),
        ({"levels": "1, two"}, ["levels"]),
        ({"counts": 3}, ["counts", "count"]),
        ({"count": 10, "rate": 2}, ["count", "rate"]),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StudioError) as caught:
        read(Everything, shown(Everything()) | wrong)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bounds_and_name_stand_in_the_help() -> None:
    setting = next(each for each in fields(Everything) if each.name == "count")
    box = component(setting, 3)
    assert box.label == "How many" and "count" in str(box.info) and "1 to 9" in str(box.info)


def test_a_form_shows_the_basic_settings_first() -> None:
    for method in method_names():
        assert {"steps", "lr"} <= basic(get_method(method).Params)
