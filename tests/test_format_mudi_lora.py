"""MuDI's LoRA: several subjects come in with their rare words, and go out so that MuDI and peft read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines import formats
from pipelines.attach import attached
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.formats import several
from pipelines.library import Library
from pipelines.methods import get_method
from pipelines.model import Model
from pipelines.workspace import Workspace
from tests.tiny import tiny_model

CAN, TOY = Subject("<can>", "blue can"), Subject("<toy>", "red robot")
FILE = "pytorch_lora_weights.safetensors"
WORDS = {"id": {"a": "sks blue can", "b": "hta red robot"}}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def trained(model: Model, method: str = "segmix", **settings: Any) -> Trained:
    """Two subjects in a change that does something."""
    found = get_method(method)
    params = found.Params(prior_weight=0.0, rare_word="sks hta", **settings)
    with found.attach(model, params, (CAN, TOY)) as adapter:
        chance = torch.Generator().manual_seed(1)
        tensors = {k: torch.randn(v.shape, generator=chance) * 0.05 for k, v in adapter.tensors().items()}
    base = {"id": model.id, "fingerprint": model.fingerprint, "kind": model.kind}
    return Trained(Concept("both", (CAN, TOY), method, base, params.model_dump(mode="json"), seed=3), tensors)


@torch.no_grad()
def output(model: Model, made: Trained, prompt: str) -> Any:
    with attached(model, [(made, 1.0)]):
        text = model.encode([prompt])
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        return text.prompts[0].text, model.unet(noise, torch.tensor([300]), text.states).sample


def test_out_and_in_again_is_the_same(model: Model, tmp_path: Path) -> None:
    made = trained(model, rank=4, alpha=2.0)
    library = Library(Workspace(tmp_path / "w"))
    library.save(made)
    written = library.export_original("both", tmp_path / "out")
    assert [path.name for path in written] == [FILE, "metadata.jsonl"]
    assert json.loads(written[1].read_text()) == {"id": {"can": "sks blue can", "toy": "hta red robot"}}
    for place in (tmp_path / "out", written[0]):  # the folder, and the file by itself
        library.delete("both")
        back = library.load(library.add(place).name)
        concept = back.concept
        assert (concept.name, concept.method, concept.subjects) == ("both", "segmix", (CAN, TOY))
        assert concept.params["rare_word"] == "sks hta" and concept.base_model["fingerprint"] == model.fingerprint
        words, seen = output(model, back, "a <toy> and a <can>")
        assert words == "a hta red robot and a sks blue can"
        torch.testing.assert_close(seen, output(model, made, "a <toy> and a <can>")[1])
    with pytest.raises(StudioError, match="already there"):
        library.export_original("both", tmp_path / "out")


def test_a_zip_of_the_folder_comes_in(model: Model, tmp_path: Path) -> None:
    """As Library's Original files packs it, or with the folder itself in it."""
    library = Library(Workspace(tmp_path / "w"))
    library.save(trained(model, rank=4))
    library.export_original("both", tmp_path / "out" / "both")
    for number, root in enumerate((tmp_path / "out" / "both", tmp_path / "out")):
        library.delete("both")
        concept = library.add(shutil.make_archive(str(tmp_path / f"zip-{number}"), "zip", root))
        assert (concept.name, concept.method, concept.subjects) == ("both", "segmix", (CAN, TOY))
        assert concept.params["rare_word"] == "sks hta"


def test_the_weights_are_named_as_diffusers_names_them(model: Model, tmp_path: Path) -> None:
    made = trained(model, rank=4, train_text_encoder=True)
    formats.write(made, tmp_path)
    keys = load_file(tmp_path / FILE).keys()
    assert any(key.startswith("text_encoder.text_model.") for key in keys)
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys


def mudi_folder(path: Path, model: Model, *places: str, metadata: Any = WORDS) -> Path:
    """What MuDI leaves behind: old diffusers' spelling, each step in its folder, the metadata beside."""
    content = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): values
        for key, values in trained(model, rank=4).tensors.items()
    }
    for number, place in enumerate(places):
        (path / place).mkdir(parents=True, exist_ok=True)
        save_file({key: values * (number + 1) for key, values in content.items()}, path / place / FILE)
    if metadata is not None:
        (path / "metadata.jsonl").write_text("\n" + json.dumps(metadata) + "\n{broken: never read}\n")
    return path


def test_mudis_own_folder_comes_in(model: Model, tmp_path: Path) -> None:
    first = trained(model, rank=4).tensors
    steps = mudi_folder(tmp_path / "steps", model, "save-200", "save-1000")
    final = mudi_folder(tmp_path / "final", model, "save-200", "save-400", ".")
    for folder, factor in ((steps, 2), (final, 3), (steps / "save-200", 1)):
        assert formats.detect(folder) == "mudi_lora"
        found = formats.read(folder)
        assert found["method"] == "segmix" and found["subjects"] == ["<a>", "<b>"]
        assert found["nouns"] == ["blue can", "red robot"] and found["params"]["rare_word"] == "sks hta"
        assert all(torch.equal(values, first[key] * factor) for key, values in found["tensors"].items())
    concept = Library(Workspace(tmp_path / "w")).add(steps, name="pair")
    assert concept.subjects == (Subject("<a>", "blue can"), Subject("<b>", "red robot"))
    assert concept.params["targets"] == "attention" and concept.params["rank"] == 4
    bare = mudi_folder(tmp_path / "bare", model, ".", metadata=None)
    assert formats.detect(bare) == "lora"  # nothing tells it from any other


def test_a_phrase_of_one_word_has_no_rare_one(model: Model, tmp_path: Path) -> None:
    folder = mudi_folder(tmp_path, model, ".", metadata={"id": {"a": "can", "b": "red robot"}})
    found = formats.read(folder)
    assert found["nouns"] == ["can", "red robot"] and found["params"]["rare_word"] == ""


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"id": {}}, "metadata.jsonl, line 2 must name the subjects first"),
        ({"id": {"a": "sks can", "b": "SKS  can"}}, "line 2 calls two subjects"),
        ({"id": {"a b": "sks can"}}, "line 2: '<a b>' can't name a concept"),
        ({"id": {"a": 3}}, "line 2: 'a' needs a phrase"),
    ],
)
def test_broken_metadata_is_told_with_its_line(model: Model, tmp_path: Path, metadata: Any, said: str) -> None:
    with pytest.raises(StudioError, match=said):
        formats.read(mudi_folder(tmp_path, model, ".", metadata=metadata))


@pytest.mark.parametrize("method", ["dreambooth", "svdiff"])
def test_other_forms_keep_several_subjects_too(model: Model, tmp_path: Path, method: str) -> None:
    library = Library(Workspace(tmp_path / "w"))
    library.save(trained(model, method))
    library.export_original("both", tmp_path / "out")
    library.delete("both")
    concept = library.add(tmp_path / "out")
    assert concept.subjects == (CAN, TOY) and concept.method == method and concept.params["rare_word"] == "sks hta"


@pytest.mark.parametrize("method", ["dreambooth", "svdiff", "segmix"])
def test_no_rare_word_stays_none(model: Model, tmp_path: Path, method: str) -> None:
    made = trained(model, method)
    params = made.concept.params | {"rare_word": ""}
    library = Library(Workspace(tmp_path / "w"))
    library.save(Trained(Concept("both", (CAN, TOY), method, made.concept.base_model, params), made.tensors))
    library.export_original("both", tmp_path / "out")
    library.delete("both")
    concept = library.add(tmp_path / "out")
    assert (concept.subjects, concept.params["rare_word"]) == ((CAN, TOY), "")


@pytest.mark.parametrize(
    "note", ["{", "[]", '[["<a>", "x", "y"]]', '[["a", "cat"]]', '[["<a>", "cat"], ["<a>", "dog"]]', '[["<a>", 3]]']
)
def test_subjects_that_a_file_names_are_checked(note: str) -> None:
    with pytest.raises(StudioError):
        several.subjects_noted({several.KEY: note})


def test_nothing_of_several_is_said_of_one(model: Model, tmp_path: Path) -> None:
    made = trained(model)
    one = Trained(Concept("x", (CAN,), "dreambooth", made.concept.base_model, made.concept.params), made.tensors)
    formats.write(one, tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        assert several.KEY not in file.metadata()
