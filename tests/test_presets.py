"""Every preset is sound, broken ones say why, and settings are read as they were meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from pipelines.errors import StudioError
from pipelines.methods import get_method, method_names, residual
from pipelines.params import TrainParams
from pipelines.preset import BUILT_IN, load_preset, presets, problems, read_preset, save_preset
from pipelines.settings import fields, parse_settings, validated

PRESETS = sorted(BUILT_IN.rglob("*.toml"))
KINDS = ("sd1", "sd2", "sdxl", "toybox")


def written(folder: Path, text: str, name: str = "mine.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_preset_is_sound(path: Path) -> None:
    preset = read_preset(path, path.parent.name)
    assert preset.built_in and preset.title and preset.title != preset.name
    assert set(preset.bases) <= set(KINDS)
    assert type(preset.params) is get_method(path.parent.name).Params


@pytest.mark.parametrize("method", method_names())
def test_every_method_has_a_preset_for_every_base(method: str) -> None:
    own = [path for path in PRESETS if path.parent.name == method]
    assert BUILT_IN / method / "default.toml" in own
    assert [preset.path for preset in presets(method)] == own
    for kind in KINDS:
        assert type(load_preset(method, base_kind=kind)) is get_method(method).Params
        meant = [preset for preset in presets(method) if kind in preset.bases]
        assert len(meant) <= 1  # else it would depend on their names which is taken


def test_no_preset_lies_where_nobody_looks() -> None:
    assert {path.parent for path in PRESETS} == {BUILT_IN / method for method in method_names()}


def test_the_preset_of_the_base_is_taken_without_a_name() -> None:
    default, toybox = load_preset("residual", "default"), load_preset("residual", "toybox")
    assert load_preset("residual", base_kind="toybox") == toybox != default
    assert load_preset("residual", base_kind="sd2") == default


def test_the_published_residual_recipe() -> None:
    params = load_preset("residual", "default")
    assert isinstance(params, residual.Params)
    assert (params.steps, params.batch_size, params.lr, params.weight_decay) == (4000, 1, 5e-6, 1e-2)
    assert (params.anchor_start, params.anchor_rest, params.max_grad_norm) == (1e-2, 1e-3, 1.0)
    assert params.prompt == "noun" and params.prior_weight == 0 and not params.flip


def test_own_presets_are_found_and_go_before_ours(tmp_path: Path) -> None:
    written(tmp_path, 'title = "Quick"\nmethod = "residual"\n[params]\nsteps = 7\n', "quick.toml")
    written(tmp_path, 'method = "residual"\n[params]\nsteps = 8\n', "default.toml")
    written(tmp_path, 'method = "svdiff"\n[params]\nsteps = 9\n', "other.toml")
    names = [preset.name for preset in presets("residual", tmp_path)]
    assert names[-2:] == ["default", "quick"] and "other" not in names
    assert load_preset("residual", "quick", folder=tmp_path).steps == 7
    assert load_preset("residual", "default", folder=tmp_path).steps == 8
    assert load_preset("residual", base_kind="sd2", folder=tmp_path).steps == 4000  # only when it is asked for
    assert load_preset("residual", str(tmp_path / "quick.toml")).steps == 7
    with pytest.raises(StudioError, match="Did you mean 'quick'"):
        load_preset("residual", "qick", folder=tmp_path)
    with pytest.raises(StudioError, match="is for the method 'svdiff', not 'residual'"):
        load_preset("residual", str(tmp_path / "other.toml"))
    with pytest.raises(StudioError, match="no method 'foo'"):
        load_preset("foo")


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (
            "[params]\nstps = 3\nlr = 2.0",
            ["no setting 'stps' (did you mean 'steps'?)", "lr = 2.0", "less than or equal"],
        ),
        ("[params]\nzzz = 3", ["no setting 'zzz' (known are steps, batch_size"]),
        ('[params]\nsteps = "100"', ["steps = '100' should be a valid integer"]),
        ("[params]\nsteps = true", ["steps = True"]),
        ("[params]\nsteps = 1.5", ["steps = 1.5"]),
        ('[params]\nprompt = "nouns"', ["prompt = 'nouns' should be 'noun', 'templates' or 'captions'"]),
        ("[params]\nlr = nan", ["lr = nan"]),
        ("[params]\nlr = 2024-01-01", ["lr"]),
        ("[params]\nprior_weight = 0.5", ["prior_weight must be 0"]),
        ("steps = 3", ["no setting 'steps' (known are title, bases, method, params)"]),
        ('bases = "toybox"', ["bases"]),
        ('method = "svdiff"', ["for the method 'svdiff', not 'residual'"]),
        ("[params", ["no valid TOML"]),
        ("x = 1\nx = 2", ["no valid TOML"]),
        ("[params]\nsteps = 3  # " + "x" * 70_000, ["too large"]),
    ],
)
def test_a_broken_preset_gives_a_reason_for_every_field(tmp_path: Path, text: str, reasons: list[str]) -> None:
    with pytest.raises(StudioError) as caught:
        read_preset(written(tmp_path, text), "residual")
    assert all(reason in str(caught.value) for reason in reasons), caught.value
    assert "mine.toml" in str(caught.value)


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'title = "\xe9"')
    with pytest.raises(StudioError, match="no valid TOML"):
        read_preset(tmp_path / "latin.toml", "residual")
    with pytest.raises(StudioError, match="Cannot read the preset"):
        load_preset("residual", str(tmp_path / "missing.toml"))
    with pytest.raises(StudioError, match='names no method. Add a line such as: method = "'):
        read_preset(written(tmp_path, "[params]\nsteps = 3"))


def test_one_broken_preset_does_not_hide_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, 'method = "residual"\n[params]\nsteps = 7\n', "good.toml")
    broken = written(tmp_path, 'method = "residual"\n[params]\nstps = 7\n', "bad.toml")
    assert [preset.name for preset in presets(None, tmp_path) if not preset.built_in] == ["good"]
    assert "did you mean 'steps'" in caplog.text
    assert list(problems(tmp_path)) == [broken] and "stps" in problems(tmp_path)[broken]
    assert problems(tmp_path / "nowhere") == {}
    with pytest.raises(StudioError, match="stps"):  # asked for by name: why it can't be had, not that there is none
        load_preset("svdiff", broken.stem, folder=tmp_path)


@pytest.mark.parametrize("method", method_names())
def test_saved_settings_come_back(tmp_path: Path, method: str) -> None:
    params = get_method(method).Params(steps=77, lr=1e-05, masked_loss=True)
    path = save_preset(tmp_path / "presets", "my-own", method, params, 'Mine: "best" \\ é \u202e🐈')
    preset = read_preset(path)
    assert preset.params == params and preset.method == method and not preset.built_in
    assert preset.title.startswith('Mine: "best" \\ é')
    assert load_preset(method, "my-own", folder=tmp_path / "presets") == params


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "CON:", "a b", "x" * 100, ".hidden"])
def test_a_preset_can_only_be_called_a_plain_word(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudioError, match="can't name a preset"):
        save_preset(tmp_path, name, "residual", residual.Params())
    assert list(tmp_path.iterdir()) == []


def test_settings_are_typed_by_params() -> None:
    read = parse_settings(residual.Params, ["steps=100", "lr = 1e-4", "flip=yes", "prompt=captions", "steps=50"])
    assert read == {"steps": 50, "lr": 1e-4, "flip": True, "prompt": "captions"}
    assert type(read["steps"]) is int and type(read["flip"]) is bool
    assert parse_settings(residual.Params, []) == {}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("steps", "not a setting. Write KEY=VALUE"),
        ("=3", "not a setting. Write KEY=VALUE"),
        ("stesp=3", "did you mean 'steps'"),
        ("steps=many", "steps = 'many' should be a valid integer"),
        ("steps=0", "steps = '0' should be greater than or equal to 1"),
        ("prompt=a=b", "prompt = 'a=b' should be 'noun', 'templates' or 'captions'"),
        ("lr=", "lr = ''"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(setting: str, reason: str) -> None:
    with pytest.raises(StudioError) as caught:
        parse_settings(residual.Params, [setting])
    assert reason in str(caught.value)


class _Form(TrainParams):
    """Every kind of field."""

    mode: Literal["a", "b"] = Field("a", description="Which")
    share: float | None = Field(None, gt=0, lt=1, description="Part", json_schema_extra={"basic": True})
    layers: tuple[str, ...] = Field(("mid",), description="Where", title="Layers to use")


def test_a_form_is_drawn_from_params_alone() -> None:
    found = {field.name: field for field in fields(_Form)}
    assert list(found) == list(_Form.model_fields)
    steps = found["steps"]
    assert (steps.kind, steps.default, steps.low, steps.high) == ("integer", 500, 1, 100_000)
    assert steps.label == "Steps" and steps.help == "Training steps" and steps.range() == "1 to 100000"
    assert (found["lr"].kind, found["lr"].above, found["lr"].range()) == ("number", True, "more than 0, at most 1")
    assert found["flip"].kind == "switch" and found["flip"].range() == ""
    assert found["sample_every"].range() == "at least 0"
    assert (found["mode"].kind, found["mode"].choices, found["mode"].range()) == ("choice", ("a", "b"), "a | b")
    share = found["share"]
    assert share.optional and share.basic and share.kind == "number" and share.default is None
    assert share.range() == "more than 0, less than 1"
    assert found["layers"].kind == "text" and found["layers"].label == "Layers to use"


def test_lists_in_a_file_may_fill_tuples() -> None:
    assert validated(_Form, {"layers": ["up", "down"]}).layers == ("up", "down")
    with pytest.raises(StudioError, match="layers"):
        validated(_Form, {"layers": "up"})


def test_presets_are_read_without_heavy_libraries() -> None:
    """--help and the first page wait for them."""
    code = (
        "import sys; from pipelines.preset import presets, fields; presets('residual'); "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'gradio') if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(root)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == "[]"
