"""Configuration files of Cones 2 and its forks: read as they stand, painted, and put right in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config_subjects import place_subjects
from pipelines.configs import config_request, paint_configs
from pipelines.errors import StudioError
from pipelines.events import Event, Note, Snapshot
from pipelines.files import save_tensors
from pipelines.formats.cones_config import Config, read_config
from pipelines.formats.json_lines import read_located
from pipelines.intake import load_tensors
from pipelines.layout import bind
from pipelines.model import Model
from pipelines.regions import RoutedStage, staged
from pipelines.request import Request
from pipelines.results import again, make_pictures
from pipelines.scene import make_scene
from pipelines.workspace import Workspace
from tests.test_format_cones import wide_model
from tests.test_layout import GREEN, RED, WHITE, drawn
from tests.test_regions import shifted
from tests.tiny import tiny_model

BLUE = (0, 0, 255)
REQUEST = Request("", seeds=(0,), steps=2, preview_every=0, recur=1)
PROMPT = "a dog, a toy cat and a dog in the sand"  # a 1, dog 2, "," 3, a 4, toy 5, cat 6, and 7, a 8, dog 9
WIDTH = 48


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd2v")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Residuals (of which one as their authors leave them) and a layout."""
    for number, name in enumerate(("dog", "dog6", "cat")):
        rows = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(number))
        save_tensors(tmp_path / f"{name}.safetensors", {"residual": rows})
    torch.save(rows.requires_grad_(), tmp_path / "cat.pt")
    drawn((768, 768), RED, ((381, 16, 758, 753), GREEN), ((248, 246, 370, 755), BLUE)).convert("RGBA").save(
        tmp_path / "layout.png"
    )
    return tmp_path


def element(**changes: Any) -> dict[str, Any]:
    one = {
        "prompt": PROMPT,
        "residual_dict": {"<dog>": "dog.safetensors", "<dog6>": "dog6.safetensors", "<toy_cat>": "cat.safetensors"},
        "color_context": {"255,0,0": ["dog,", 2.5], " 0,255, 0": ["toy cat", 2.5], "0,0,255": ["dog", 2]},
        "guidance_steps": 50,
        "guidance_weight": 0.08,
        "weight_negative": -1e8,
        "layout": "layout.png",
        "subject_list": [["<dog>", 2], ["<toy_cat>", 6], ["<dog6>", 9]],
    }
    return {key: value for key, value in (one | changes).items() if value is not None}


def written(folder: Path, *elements: Any) -> Path:
    path = folder / "guidance.json"
    path.write_text(json.dumps(list(elements), indent=1), encoding="utf-8")
    return path


def planned(model: Model, folder: Path, **changes: Any) -> tuple[Request, list[str]]:
    (config,) = read_config(written(folder, element(**changes)))
    return config_request(model, config, REQUEST)


def test_it_is_read_as_it_stands(model: Model, folder: Path) -> None:
    request, notes = planned(model, folder)
    assert notes == [] and request.prompt == PROMPT and request.recur == 1
    layout = request.layout
    assert layout is not None and (layout.strength, layout.steps, layout.negative) == (0.08, 50, -1e8)
    assert [(one.words, one.weight) for one in layout.regions] == [("dog,", 2.5), ("toy cat", 2.5), ("dog", 2.0)]
    assert layout.regions[2].area.mask.sum() == 123 * 510
    assert [(one.name, one.position) for one in request.placed] == [("<dog>", 2), ("<toy_cat>", 6), ("<dog6>", 9)]
    theirs, _ = planned(model, folder, residual_dict={"<toy_cat>": "cat.pt"}, subject_list=[["<toy_cat>", 6]])
    assert theirs.placed == request.placed[1:2]


def test_the_residual_changes_its_row_of_the_prompt_alone(model: Model, folder: Path) -> None:
    files = {"<dog>": "dog.safetensors", "<twin>": "dog.safetensors", "<toy_cat>": "cat.safetensors"}
    subjects = [["<dog>", 2], ["<twin>", 2], ["<toy_cat>", 6]]
    request, _ = planned(model, folder, residual_dict=files, subject_list=subjects)
    whole = replace(request, width=64, height=64)
    placed, plain = (make_scene(model, one).text.states for one in (whole, replace(whole, placed=())))
    moved = load_tensors(folder / "dog.safetensors")[0]["residual"][0]
    assert torch.equal(placed[0], plain[0])  # the negative prompt
    assert torch.allclose(placed[1, 2], plain[1, 2] + 2 * moved)  # the same place twice adds twice
    others = [at for at in range(77) if at not in (2, 6)]
    assert torch.equal(placed[1, others], plain[1, others]) and not torch.equal(placed[1, 6], plain[1, 6])


def test_a_token_that_is_not_on_its_word_is_honoured_with_a_warning(model: Model, folder: Path) -> None:
    request, notes = planned(model, folder, subject_list=[["<dog>", 2], ["<toy_cat>", 4], ["<dog6>", 76]])
    assert [one.position for one in request.placed] == [2, 4, 76]
    assert len(notes) == 2
    assert "guidance.json, line" in notes[0] and "token 4, which is 'a'; 'toy' would be token 5" in notes[0]
    assert "token 76, which is padding" in notes[1] and "'dog' would be token 9" in notes[1]


def test_two_subjects_on_one_token_both_act_there_with_a_warning(model: Model, folder: Path) -> None:
    request, notes = planned(model, folder, subject_list=[["<dog>", 2], ["<dog6>", 2]])
    assert [one.position for one in request.placed] == [2, 2]
    lines = (folder / "guidance.json").read_text().splitlines()
    line = max(at for at, text in enumerate(lines, 1) if text.strip() == "[")
    assert notes == [
        f"guidance.json, line {line}: '<dog6>' is put on token 2, where '<dog>' is already; both act there."
    ]


@pytest.mark.parametrize(
    ("name", "prompt", "folder"),
    [
        ("<dog6>", "A dog, a pet cat.", "<dog6>/A_dog,_a_pet_cat."),
        ("../../etc", "/etc/passwd", "....etc/etcpasswd"),
        ("..", "..", "untitled/untitled"),
        ("/", ".", "untitled/untitled"),
        ("C:", "\\\\host\\x", "C/hostx"),
        ("a" * 300, "b" * 300, f"{'a' * 240}/{'b' * 240}"),
    ],
)
def test_legacy_names_are_the_original_s_and_lead_nowhere_else(
    tmp_path: Path, name: str, prompt: str, folder: str
) -> None:
    file = {"residual_dict": {name: "dog.safetensors"}, "subject_list": [[name, 1]], "color_context": {}}
    (config,) = read_config(written(tmp_path, element(prompt=prompt, **file)))
    assert config.legacy_folder == folder
    assert (tmp_path / config.legacy_folder).resolve().parent.parent == tmp_path.resolve()


def test_the_forks_mistaken_configuration_is_painted_with_a_word_about_each_mistake(model: Model, folder: Path) -> None:
    """Two numbers are one off after the comma, and "dog" has two colours of which one claims both."""
    one = element(subject_list=[["<dog>", 2], ["<toy_cat>", 4], ["<dog6>", 8]])
    runs = paint_configs(Workspace(folder / "w"), model, read_config(written(folder, one)), REQUEST, out=folder / "out")
    told = [event.text for run in runs for event in run if isinstance(event, Note)]
    assert ["token 4" in told[0], "token 8" in told[1], "claim the same words" in told[2]] == [True] * 3
    assert len(told) == 3 and all("line" in text for text in told[:2])
    (config,) = read_config(folder / "guidance.json")
    request, _ = config_request(model, config, REQUEST)
    assert request.layout is not None
    tokens = {one.region.words: one.tokens for one in bind(request.layout, model.tokenize(PROMPT))}
    assert tokens == {"dog,": (2, 3), "toy cat": (5, 6), "dog": (9,)}  # the original forbids token 2 everywhere


@pytest.mark.parametrize(
    "name, at, rows, says",
    [
        ("goku", 60, 1, "'goku' is put on token 60, which is padding; whether that is its word, the file doesn't say."),
        ("goku", 1, 1, "token 1, which is 'a'; whether"),
        ("goku", 0, 1, "token 0, which is the start token"),
        ("goku", 5, 1, "token 5, which is the end token"),
        ("cat", 5, 1, "token 5, which is the end token; 'cat' would be token 2."),
        ("my-cat", 2, 2, "token 3, which is 'and'; its file changes 2 tokens, from token 2 on."),
        ("cat2", 3, 6, "token 3, which is 'and' and token 4, which is 'dog' and token 5, which is the end token …;"),
        ("cat2", 2, 1, ""),
        ("my-cat", 2, 1, ""),
    ],
)
def test_every_token_that_is_not_its_word_is_told(
    model: Model, folder: Path, name: str, at: int, rows: int, says: str
) -> None:
    save_tensors(folder / "rows.safetensors", {"residual": torch.ones(rows, WIDTH)})
    subject = {"residual_dict": {name: "rows.safetensors"}, "subject_list": [[name, at]]}
    _, notes = planned(model, folder, prompt="a cat and dog", color_context={}, **subject)
    assert [says in note for note in notes] == [True] * bool(says)


def test_words_of_a_colour_tell_where_a_subject_ends(model: Model, folder: Path) -> None:
    save_tensors(folder / "rows.safetensors", {"residual": torch.ones(2, WIDTH)})
    subject = {"residual_dict": {"toy": "rows.safetensors"}, "subject_list": [["toy", 5]]}
    assert planned(model, folder, **subject)[1] == []


def test_a_subject_may_name_its_word_and_occurrence(model: Model, folder: Path) -> None:
    request, notes = planned(model, folder, subject_list=[["<dog>", "dog"], ["<dog6>", "dog", 1], ["<toy_cat>", "cat"]])
    assert [one.position for one in request.placed] == [2, 9, 6] and notes == []


def test_without_guided_steps_the_layout_is_not_needed(model: Model, folder: Path) -> None:
    request, _ = planned(model, folder, guidance_steps=0, layout="gone.png")
    assert request.layout is None and request.recur == 0 and len(request.placed) == 3


def test_steps_are_taken_again_as_the_original_does_by_their_number_alone(model: Model, folder: Path) -> None:
    for change in ({"guidance_weight": 0}, {"color_context": {}}):
        request, notes = planned(model, folder, **change, layout="gone.png")
        assert request.layout is None and request.recur == 1 and notes == []
    request, notes = planned(model, folder, guidance_weight=0, guidance_steps=1)
    assert request.recur == 0 and "would take the first 1 again" in notes[0] and len(notes) == 1
    (config,) = read_config(written(folder, element(guidance_steps=0)))
    request, notes = config_request(model, config, replace(REQUEST, recur=2))
    assert request.recur == 0 and notes == ["guidance.json, line 23: no step is guided, so none is taken again."]


def test_what_is_said_about_the_layout_counts_before_the_file(model: Model, folder: Path) -> None:
    (config,) = read_config(written(folder, element(guidance_steps=0)))
    request, notes = config_request(model, config, REQUEST, {"steps": 1, "strength": 0.2})
    assert request.layout is not None and (request.layout.steps, request.layout.strength) == (1, 0.2)
    assert request.recur == 1 and notes == []
    request, notes = config_request(model, config, REQUEST, {"strength": 0.2, "mode": "figure"})
    assert request.layout is None and "line 23: 'guidance_steps' is 0" in notes[0] and "no effect" in notes[0]
    assert config_request(model, config, REQUEST, {"steps": 0})[1] == []  # that is what was asked for
    (config,) = read_config(written(folder, element(color_context={})))
    assert "'color_context' is empty" in config_request(model, config, REQUEST, {"steps": 3})[1][0]
    with pytest.raises(StudioError, match="^The layout can't guide -1 steps"):
        config_request(model, config, REQUEST, {"steps": -1})


def test_a_concept_of_the_prompt_can_be_named_and_kept_to_its_colour(model: Model, folder: Path) -> None:
    trained = shifted(model, "<sv-cat>", "cat", 1)
    changes = {"color_context": {"255,0,0": ["<sv-cat>", 2.5], "0,255,0": ["dog", 2.5]}, "guidance_weight": 0}
    subjects = [["<dog>", "dog"]]
    one = element(prompt="a <sv-cat> and a dog", subject_list=subjects, **changes)
    configs = read_config(written(folder, one))
    out = folder / "out"
    for run in paint_configs(Workspace(folder / "w"), model, configs, REQUEST, [(trained, 1.0)], out=out):
        list(run)
    (made,) = out.rglob("0001.png")
    request = again(made).request
    assert request.prompt == "a <sv-cat> and a dog" and request.placed[0].position == 6  # "a sks cat and a dog"
    assert request.layout is not None and request.layout.regions[0].words == "<sv-cat>" and request.recur == 0
    with staged(model, request, [(trained, 1.0)]) as stage:
        assert isinstance(stage, RoutedStage)


def test_whole_numbers_are_weights_too(model: Model, folder: Path) -> None:
    request, _ = planned(model, folder, weight_negative=-1, color_context={"255,0,0": ["dog", 2]})
    assert request.layout is not None and request.layout.negative == -1.0


def test_folders_are_called_as_the_original_calls_them_and_safe(folder: Path) -> None:
    (config,) = read_config(written(folder, element(prompt="A dog, a toy cat. ")))
    assert config.folder == "dog6_dog_toy_cat/A_dog,_a_toy_cat"
    hostile = replace(config, prompt="../../x\\y:z\x00", subjects=())
    assert hostile.folder == "untitled/xyz" and replace(hostile, prompt=" ..").folder == "untitled/untitled"
    assert len(Path(replace(config, prompt="ä" * 999).folder).name.encode()) <= 120
    assert replace(config, prompt="con").folder.endswith("con_")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "line 2: 'prompt' is missing"),
    ({"prompt": 3}, "line 3: 'prompt' is 3"),
    ({"guidance_steps": 2.5}, "'guidance_steps' is 2.5, which is no whole number"),
    ({"guidance_steps": -1}, "less than 0"),
    ({"guidance_weight": "x"}, "no usable number"),
    ({"color_context": {"red": ["dog", 2.5]}}, "'red' is no colour"),
    ({"color_context": {"0,0,256": ["dog", 2.5]}}, "is no colour"),
    ({"color_context": {"255,0,0": "dog"}}, "needs its words and their weight"),
    ({"subject_list": [["<cow>", 2]]}, "'<cow>' has no file in 'residual_dict'. It has: <dog>"),
    ({"subject_list": [["<dog>", -2]]}, "its name and its token"),
    ({"subject_list": [["<dog>", 77]]}, "there is no token 77"),
    ({"subject_list": [["<dog>", "house"]]}, "'house' is not in the prompt"),
    ({"subject_list": [["<dog>", "toy cat"]]}, "has 2 token(s)"),
    ({"residual_dict": {"<dog>": "gone.pt"}, "subject_list": [["<dog>", 2]]}, "there is no file 'gone.pt'"),
    ({"residual_dict": {"<dog>": "layout.png"}, "subject_list": [["<dog>", 2]]}, "layout.png"),
    (
        {"residual_dict": {"<dog>": "wide.safetensors"}, "subject_list": [["<dog>", 2]]},
        "7 wide, those of this",
    ),
    ({"subject_list": [["<dog>", 2], ["<toy_cat>", 6], ["<dog>", 2]]}, "line 36: ['<dog>', 2] is there twice"),
    ({"subject_list": [["<dog>", 2], ["<dog>", "dog"]]}, "'<dog>' is on token 2 twice"),
    (
        {"residual_dict": {"<dog>": "two.safetensors"}, "subject_list": [["<dog>", 76]]},
        "no token 77: its file changes 2 tokens, from token 76 on, and this base reads 77, numbered 0 to 76",
    ),
    ({"residual_dict": {"<dog>": f"{'x' * 300}.pt"}, "subject_list": [["<dog>", 2]]}, "can't be the path of a file"),
    ({"layout": "x" * 300}, "can't be the path of a file"),
    ({"prompt": "a \ud800 cat"}, "line 3: the text has characters that are not Unicode"),
    ({"prompt": "a <sv-cat>"}, "line 3: The prompt says <sv-cat>, but no such concept"),
    ({"color_context": {"255,0,0": ["dog", 10**400]}}, "line 12: a number of 401 digits"),
    ({"color_context": {"255,0,0": ["dog", 10**350]}}, "the colour 255,0,0 needs its words and their weight"),
    ({"color_context": {f"{'9' * 5000},0,0": ["dog", 2.5]}}, "is no colour"),
    ({"guidance_steps": 10**350}, "so many steps can't be guided"),
    ({"layout": "gone.png"}, "there is no file 'gone.png'"),
    ({"layout": "cat.pt"}, "no readable picture"),
    ({"color_context": {"9,9,9": ["dog", 2.5]}}, "no pixel of the colour 9,9,9"),
    ({"color_context": {"255,0,0": ["house", 2.5]}}, "'house' is not in the prompt"),
    ({"weight_negative": 5}, "weight outside 0 or less"),
]


@pytest.mark.parametrize("change, says", WRONG)
def test_what_is_wrong_is_said_with_file_and_line(
    model: Model, folder: Path, change: dict[str, Any], says: str
) -> None:
    save_tensors(folder / "wide.safetensors", {"residual": torch.zeros(1, 7)})
    save_tensors(folder / "two.safetensors", {"residual": torch.zeros(2, WIDTH)})
    with pytest.raises(StudioError) as error:
        planned(model, folder, **change)
    assert says in str(error.value) and str(error.value).startswith("guidance.json, line ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "line 1: this is no JSON"),
        ('[\n{"a": 1,\n}]', "line 3: this is no JSON"),
        ('[\n{"a": 1,\n\n "a": 2}]', "line 4: 'a' is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[3]", "a list of objects"),
        ("[]", "a list of objects"),
        ('[\n{"a":\n' + "9" * 5000 + "}]", "line 3: a number of 5000 digits"),
        ('[\n{"a":\n' + "-9." + "9" * 5000 + "}]", "line 3: a number of 5003 digits"),
        ('[\n{"\\udc80": 1}]', "line 2: the text has characters that are not Unicode"),
    ],
)
def test_text_that_is_no_configuration(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "guidance.json"
    path.write_text(text)
    with pytest.raises(StudioError, match=says):
        read_config(path)
    with pytest.raises(StudioError, match="Cannot read"):
        read_config(tmp_path / "gone.json")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudioError, match="no text"):
        read_config(path)


def test_lines_are_those_of_an_editor() -> None:
    text = '\n{"a": [1, {"b":\n "x\\"\\u00e4"},\n\ttrue],\n "c,": {},\n"d": []}\n'
    data, lines = read_located(text, "x")
    assert data == {"a": [1, {"b": 'x"ä'}, True], "c,": {}, "d": []}
    assert lines == {(): 2, ("a",): 2, ("a", 0): 2, ("a", 1): 2, ("a", 1, "b"): 2, ("a", 2): 4, ("c,",): 5, ("d",): 6}


def test_every_element_is_painted_into_its_folder_and_again_from_the_picture(
    model: Model, folder: Path, tmp_path: Path
) -> None:
    cat = element(prompt="a cat", color_context={"255,0,0": ["cat", 2.5]}, subject_list=[["<toy_cat>", 2]])
    path = written(folder, element(subject_list=[["<dog>", 4]]), cat)
    out, workspace = tmp_path / "out", Workspace(tmp_path / "workspace")
    request = replace(REQUEST, seeds=(0, 1))
    runs = paint_configs(workspace, model, read_config(path), request, out=out)
    events: list[Event] = [event for run in runs for event in run]
    assert sum(isinstance(event, Snapshot) for event in events) == 4
    assert sum(isinstance(event, Note) and "token 4" in event.text for event in events) == 1
    first, second = out / "dog" / PROMPT.replace(" ", "_"), out / "toy_cat" / "a_cat"
    for made in (first, second):
        assert sorted(file.name for file in made.iterdir()) == ["0001.png", "0002.png", "all_images.png"]
    with Image.open(first / "all_images.png") as sheet:
        assert sheet.size == (128, 64)
        assert np.array_equal(np.asarray(sheet)[:, 64:], np.asarray(Image.open(first / "0002.png")))
    for file in folder.glob("*.safetensors"):
        file.unlink()  # the picture brings what it needs
    recipe = again(first / "0002.png")
    list(make_pictures(workspace, model, recipe.request, out=tmp_path / "again"))
    assert (tmp_path / "again" / "0001.png").read_bytes() == (first / "0002.png").read_bytes()


def test_a_configuration_is_painted_on_a_model_of_the_published_width(folder: Path, tmp_path: Path) -> None:
    """States 1024 wide, as in SD 2.1: each residual and the guidance change the picture."""
    model = wide_model()
    residuals = {"<dog>": "1.safetensors", "<toy_cat>": "2.safetensors"}
    for number, path in enumerate(residuals.values()):
        save_tensors(folder / path, {"residual": torch.full((1, 1024), 0.6 + number)})
    one = element(residual_dict=residuals, subject_list=[["<dog>", 2], ["<toy_cat>", 6]], guidance_steps=1)
    other = one | {"subject_list": one["subject_list"][:1]}
    configs = read_config(written(folder, one, other, one | {"guidance_steps": 0}))
    request = replace(REQUEST, scheduler="euler")
    runs = paint_configs(Workspace(tmp_path / "w"), model, configs, request, out=tmp_path / "out")
    made = [event for run in runs for event in run if isinstance(event, Snapshot)]
    recipes = [again(str(event.path)).request for event in made]
    assert [[(one.position, one.width) for one in recipe.placed] for recipe in recipes][0] == [(2, 1024), (6, 1024)]
    assert [recipe.layout is None for recipe in recipes] == [False, False, True]
    assert len({event.image.tobytes() for event in made if event.image is not None}) == 3
    wide = again(str(made[0].path)).request
    with pytest.raises(StudioError, match="made for text states 1024 wide"):
        make_scene(tiny_model("sd2v"), replace(wide, width=64, height=64))


def test_nothing_is_painted_when_a_later_element_is_wrong(model: Model, folder: Path, tmp_path: Path) -> None:
    path = written(folder, element(), element(layout="gone.png"))
    with pytest.raises(StudioError, match="gone.png"):
        list(paint_configs(Workspace(tmp_path / "w"), model, read_config(path), REQUEST, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_paths_count_from_the_file_and_then_from_where_the_program_runs(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "configs").mkdir()
    config: Config = read_config(written(folder / "configs", element(subject_list=[["<dog>", 2]])))[0]
    prompt = model.tokenize(PROMPT)
    with pytest.raises(StudioError, match="no file 'dog.safetensors'"):
        place_subjects(model, config, prompt)
    monkeypatch.chdir(folder)
    assert len(place_subjects(model, config, prompt)[0]) == 1


def test_white_is_a_background_like_any_other(model: Model, folder: Path) -> None:
    drawn((768, 768), WHITE, ((0, 0, 300, 767), RED)).save(folder / "layout.png")
    request, _ = planned(model, folder, color_context={"255,0,0": ["dog", 2.5]})
    assert request.layout is not None and request.layout.regions[0].area.mask.sum() == 301 * 768
