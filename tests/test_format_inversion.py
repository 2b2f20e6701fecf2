"""Learned tokens and checkpoints in other tools' files: the real layouts in, and out again so that they can be read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import formats
from pipelines.attach import attached
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.formats import attndreambooth, inversion
from pipelines.incoming import import_original
from pipelines.library import Library
from pipelines.methods import get_method
from pipelines.model import Model, from_pipeline, load_model
from pipelines.workspace import Workspace
from tests.test_format_cones import WIDTH, wide_model
from tests.tiny import tiny_folder, tiny_model, tiny_pipeline

CAT = Subject("<my-cat>", "cat")


def rows(count: int = 1, width: int = 32, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def output(model: Model, prompt: str) -> Tensor:
    noise, text = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), model.encode([prompt])
    sizes = model.conditioning(text, [(48, 64)], [(0, 0)], [(48, 64)])
    result: Tensor = model.unet(noise, torch.tensor([300]), text.states, **sizes).sample
    return result


def concept(method: str, model: Model, **params: Any) -> tuple[Trained, Tensor]:
    """A concept with numbers that make a difference, and what it paints."""
    found = get_method(method)
    settings = found.Params(**params)
    draw = torch.Generator().manual_seed(3)
    with found.attach(model, settings, [CAT]) as adapter:
        adapter.load(
            {name: value + 0.05 * torch.randn(value.shape, generator=draw) for name, value in started(adapter).items()}
        )
        adapter.bake()
        seen = output(model, "a photo of a <my-cat>")
        base = {"id": model.id, "fingerprint": model.fingerprint}
        return Trained(Concept("my-cat", (CAT,), method, base, settings.model_dump()), adapter.tensors()), seen


def started(adapter: Any) -> dict[str, Tensor]:
    """Everything an adapter may save, also what has not moved yet."""
    if hasattr(adapter, "_crossing"):
        weights = adapter._crossing._values | getattr(adapter._rest, "_values", {})
        return adapter.tensors() | {name: value.detach().clone() for name, value in weights.items()}
    return dict(adapter.tensors()) or {n: v.detach().clone() for n, v in adapter.change._values.items()}


@pytest.mark.parametrize(("end", "count"), [(".bin", 1), (".safetensors", 1), (".safetensors", 3)])
def test_embeds_come_back_as_they_were_written(end: str, count: int, tmp_path: Path) -> None:
    file = tmp_path / f"learned_embeds{end}"
    inversion.write_embeds(file, {"<toy>": rows(count)})
    assert inversion.detect(file) and formats.detect(file) == "inversion"
    found = inversion.read_embeds(file)
    assert list(found) == ["<toy>"] and torch.equal(found["<toy>"], rows(count))
    inside = torch.load(file, weights_only=True) if end == ".bin" else load_file(file)
    assert inside["<toy>"].shape == ((32,) if count == 1 else (3, 32))
    read = formats.read(file)
    assert read["method"] == "textual_inversion" and read["name"] == "toy"
    assert read["params"] == {"tokens": count, "with_noun": False}


def test_the_released_numbered_form(tmp_path: Path) -> None:
    file = tmp_path / "learned_embeds_steps_60.bin"
    torch.save({"new_concept_v0": rows()[0], "new_concept_v1": rows(seed=1)[0]}, file)
    assert formats.detect(tmp_path) == "inversion"
    found = inversion.read(tmp_path)
    assert found["name"] == "new_concept" and found["params"] == {"tokens": 2, "with_noun": True}
    assert torch.equal(found["tensors"]["tokens.text_encoder"], torch.cat([rows(), rows(seed=1)]))
    inversion.write_numbered(tmp_path / "learned_embeds_steps_70.bin", "new_concept", rows(2))
    again = torch.load(tmp_path / "learned_embeds_steps_70.bin", weights_only=True)
    assert list(again) == ["new_concept_v0", "new_concept_v1"] and again["new_concept_v0"].shape == (32,)
    assert torch.equal(inversion.read(tmp_path)["tensors"]["tokens.text_encoder"], rows(2))  # the newest


def test_tokens_from_the_middle_of_a_training_lose_to_all_later_ones(tmp_path: Path) -> None:
    names = ["-merging-step", "-step-200", "-step-400", "_final"]  # ConceptExpress, in the order of its training
    for number, name in enumerate(names):
        inversion.write_embeds(tmp_path / f"learned_embeds{name}.bin", {"<asset0>": rows(seed=number)})
        newest = inversion.newest(tmp_path)
        assert newest is not None and newest.stem == f"learned_embeds{name}"


def test_a1111_and_sdxl(tmp_path: Path) -> None:
    inversion.write_a1111(tmp_path / "toy.safetensors", rows(2))
    assert inversion.detect(tmp_path / "toy.safetensors")
    assert torch.equal(inversion.read(tmp_path / "toy.safetensors")["tensors"]["tokens.text_encoder"], rows(2))
    assert inversion.read(tmp_path / "toy.safetensors")["name"] == "toy"
    old = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows(2)}, "name": "toy", "step": 100}
    torch.save(old, tmp_path / "old.pt")
    assert inversion.detect(tmp_path / "old.pt")
    assert torch.equal(inversion.read(tmp_path / "old.pt")["tensors"]["tokens.text_encoder"], rows(2))
    save_file({"clip_l": rows(2), "clip_g": rows(2, 48)}, tmp_path / "xl.safetensors")
    found = inversion.read(tmp_path / "xl.safetensors")["tensors"]
    assert torch.equal(found["tokens.text_encoder_2"], rows(2, 48)) and found["tokens.text_encoder"].shape == (2, 32)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_an_embedding_for_a1111_goes_out_and_comes_back(kind: str, tmp_path: Path) -> None:
    trained, _ = concept("textual_inversion", tiny_model(kind), tokens=2)
    (file,) = formats.write(trained, tmp_path, "a1111")
    assert file.name == "my-cat.safetensors"
    assert set(load_file(file)) == ({"emb_params"} if kind == "sd1" else {"clip_l", "clip_g"})
    back = import_original(file, name="", noun="")
    assert back.concept.subjects == (CAT,) and back.concept.params["tokens"] == 2
    assert back.tensors.keys() == trained.tensors.keys()
    assert all(torch.equal(value, back.tensors[key]) for key, value in trained.tensors.items())
    with pytest.raises(StudioError, match="already there"):
        formats.write(trained, tmp_path, "a1111")
    more = Trained(trained.concept, trained.tensors | {"unet.conv_in.delta": torch.zeros(4)})
    with pytest.raises(StudioError, match="changes weights too"):
        formats.write(more, tmp_path / "more", "a1111")
    with pytest.raises(StudioError, match="There is no form 'comfy'. Choose a1111 or peft."):
        formats.write(trained, tmp_path, "comfy")


@pytest.mark.parametrize("count", [1, 2])
def test_diffusers_reads_ours_and_paints_the_same(count: int, tmp_path: Path) -> None:
    model = tiny_model("sd1")
    trained, ours = concept("textual_inversion", model, tokens=count)
    (file,) = formats.write(trained, tmp_path)
    pipeline = tiny_pipeline("sd1")
    pipeline.load_textual_inversion(file)
    theirs = from_pipeline(pipeline, "theirs")
    prompt = pipeline.maybe_convert_prompt("a photo of a <my-cat>", pipeline.tokenizer)
    torch.testing.assert_close(ours, output_of(theirs, prompt), atol=1e-5, rtol=1e-4)
    found = import_original(file, name="", noun="cat", base=trained.concept.base_model)
    assert found.concept.name == "my-cat" and found.concept.method == "textual_inversion"
    with attached(model, [(found, 1.0)]):
        torch.testing.assert_close(ours, output(model, "a photo of a <my-cat>"), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def output_of(model: Model, prompt: str) -> Tensor:
    """A prompt whose tokens the tokenizer itself knows, past our own placeholders."""
    ids = model.tokenizers[0](prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    result: Tensor = model.unet(noise, torch.tensor([300]), model.text_encoders[0](ids)[0]).sample
    return result


@pytest.mark.parametrize("identity", ["full", "lora"])
def test_attndreambooth_s_folder_in_and_out(identity: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    model = tiny_model("sd2")
    trained, ours = concept("attndreambooth", model, identity=identity, rank=2)
    written = attndreambooth.write_checkpoint(tmp_path, model, trained)
    assert [file.name for file in written] == ["config.json", "diffusion_pytorch_model.safetensors"]
    (tmp_path / "learned_embeds").mkdir()
    tokens = trained.tensors["tokens.text_encoder"]
    inversion.write_numbered(tmp_path / "learned_embeds" / "learned_embeds_steps_60.safetensors", "new_concept", tokens)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert theirs.keys() == model.unet.state_dict().keys()
    assert formats.detect(tmp_path) == "attndreambooth"
    found = import_original(tmp_path, name="my-cat", noun="cat", base=trained.concept.base_model)
    assert found.concept.method == "attndreambooth" and found.concept.params["identity"] == "full"
    with attached(model, [(found, 1.0)]):
        torch.testing.assert_close(ours, output(model, "a photo of a <my-cat>"), atol=1e-4, rtol=1e-3)
    assert json.loads(written[0].read_text())["_class_name"] == "UNet2DConditionModel"
    library = Library(Workspace(tmp_path / "w"))
    for root in (tmp_path / "learned_embeds", tmp_path / "unet"):
        shutil.move(root, tmp_path / "zipped" / root.name)
    packed = shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "zipped")
    again = library.load(library.add(packed, name="my-cat", noun="cat", base=trained.concept.base_model).name)
    assert again.tensors.keys() == found.tensors.keys()
    assert all(torch.equal(again.tensors[name], found.tensors[name]) for name in again.tensors)


def test_the_released_layout_is_found_and_the_latest_stage_wins(tmp_path: Path) -> None:
    model = tiny_model("sd1")
    trained, ours = concept("attndreambooth", model)
    models = tmp_path / "learned_models"
    attndreambooth.write_checkpoint(models / "unet_models" / "checkpoint-500", model, trained)
    for other in ("attn_models/checkpoint-1000", "unet_models/checkpoint-60"):
        (models / other / "unet").mkdir(parents=True)
        save_file({"conv_in.bias": torch.zeros(32)}, models / other / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "learned_embeds").mkdir()
    token = trained.tensors["tokens.text_encoder"][0]
    save_file({"new_concept_v0": token}, tmp_path / "learned_embeds" / "learned_embeds_steps_60.safetensors")
    for place in (tmp_path, models / "unet_models" / "checkpoint-500"):
        found = import_original(place, name="my-cat", noun="cat", base=trained.concept.base_model)
        assert found.concept.method == "attndreambooth"
        with attached(model, [(found, 1.0)]):
            torch.testing.assert_close(ours, output(model, "a photo of a <my-cat>"), atol=1e-4, rtol=1e-3)


def test_an_older_release_s_bin_files_are_read_past_what_resuming_needs(tmp_path: Path) -> None:
    """SD 2.1's text width; optimizer.bin and random_states_0.pkl lie beside the UNet, and nobody opens them."""
    model, changed = wide_model(), wide_model().unet
    draw = torch.Generator().manual_seed(5)
    weights = {
        name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in changed.state_dict().items()
    }
    changed.load_state_dict(weights)
    checkpoint = tmp_path / "learned_models" / "unet_models" / "checkpoint-500"
    for folder in (checkpoint / "unet", tmp_path / "learned_embeds"):
        folder.mkdir(parents=True)
    torch.save(weights, checkpoint / "unet" / "diffusion_pytorch_model.bin")
    torch.save(
        {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-6}]}, checkpoint / "optimizer.bin"
    )
    (checkpoint / "random_states_0.pkl").write_bytes(pickle.dumps({"step": 500, "numpy": np.random.RandomState(0)}))
    row = rows(1, WIDTH)[0]
    torch.save({"new_concept_v0": row}, tmp_path / "learned_embeds" / "learned_embeds_steps_60.bin")
    for place in (tmp_path, checkpoint, checkpoint / "unet"):
        assert formats.detect(place) == "attndreambooth"
    found = import_original(tmp_path, name="my-cat", noun="cat", base={"id": "wide", "fingerprint": ""})
    assert found.concept.method == "attndreambooth" and torch.equal(found.tensors["tokens.text_encoder"], row[None])
    assert found.tensors.keys() == {"tokens.text_encoder"} | {f"unet.{name}" for name in weights}
    with attached(model, [(found, 1.0)]), torch.no_grad():
        ours, states = output(model, "a photo of a <my-cat>"), model.encode(["a photo of a <my-cat>"]).states
        noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours, changed(noise, torch.tensor([300]), states).sample, atol=1e-4, rtol=1e-3)
        assert not torch.equal(states, model.encode(["a photo of a cat"]).states)


def test_a_half_precision_variant_is_read_as_fp32(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    bias = torch.arange(4).half()
    save_file({"conv_in.bias": bias}, tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert formats.detect(tmp_path) == "attndreambooth"
    (values,) = formats.read(tmp_path)["tensors"].values()
    assert values.dtype == torch.float32 and torch.equal(values, bias.float())


def test_a_unet_alone_is_a_dreambooth_and_a_pipeline_is_none(tmp_path: Path) -> None:
    model = tiny_model("sd1")
    trained, ours = concept("dreambooth", model, tune="full", prior_weight=0.0)
    attndreambooth.write_checkpoint(tmp_path / "run", model, trained)
    found = import_original(tmp_path / "run", name="my-cat", noun="cat", base=trained.concept.base_model)
    assert found.concept.method == "dreambooth" and found.concept.params["tune"] == "full"
    with attached(model, [(found, 1.0)]):
        torch.testing.assert_close(ours, output(model, "a photo of a <my-cat>"), atol=1e-4, rtol=1e-3)
    (tmp_path / "run" / "model_index.json").write_text("{}")
    assert not attndreambooth.detect(tmp_path / "run")
    with pytest.raises(StudioError, match="can't be found by its name"):
        formats.write(trained, tmp_path / "out")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_text_that_learned_with_the_unet_comes_back_with_its_words(kind: str, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    base = str(tiny_folder(tmp_path / "tiny", kind))
    settings: dict[str, Any] = {"tune": "full", "prior_weight": 0.0, "rare_word": "hta", "train_text_encoder": True}
    trained, ours = concept("dreambooth", load_model(base, device="cpu"), **settings)
    library = Library(Workspace(tmp_path / "w"))
    library.save(trained)
    written = library.export_original("my-cat", tmp_path / "out", base)
    assert len(written) == (4 if kind == "sd1" else 6)
    model = load_model(base, device="cpu")
    for name, loader in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if name.endswith("_2") and kind == "sd1":
            continue
        theirs = loader.from_pretrained(tmp_path / "out" / name).state_dict()
        for key, values in theirs.items():
            assert torch.equal(values, trained.tensors[f"{name}.{key.removeprefix('text_model.')}"])
    library.delete("my-cat")
    back = library.load(library.add(tmp_path / "out").name)
    assert back.concept.subjects == (CAT,) and back.concept.base_model["fingerprint"] == model.fingerprint
    assert back.concept.params["rare_word"] == "hta" and back.concept.params["train_text_encoder"] is True
    assert back.tensors.keys() == trained.tensors.keys()
    with attached(model, [(back, 1.0)]):
        assert model.tokenize("a <my-cat>").text == "a hta cat"
        torch.testing.assert_close(ours, output(model, "a photo of a <my-cat>"), atol=1e-4, rtol=1e-3)


def test_the_first_stage_alone_comes_back(tmp_path: Path) -> None:
    model = tiny_model("sd2")
    trained, _ = concept("attndreambooth", model, steps=0, attention_steps=0)
    words = {name: value for name, value in trained.tensors.items() if name.startswith("tokens.")}
    library = Library(Workspace(tmp_path / "w"))
    library.save(Trained(trained.concept, words))
    written = library.export_original("my-cat", tmp_path / "out")
    assert {path.parent.name for path in written} == {"learned_embeds"}
    found = import_original(tmp_path / "out", name="my-cat", noun="cat", base=trained.concept.base_model)
    states = []
    for one in (Trained(trained.concept, words), found):
        with attached(model, [(one, 1.0)]):
            states.append(model.encode(["a photo of a <my-cat>"]).states)
    assert torch.equal(*states)


@pytest.mark.parametrize(("count", "with_noun"), [(1, True), (2, False)])
def test_several_subjects_come_back_with_all_their_tokens(count: int, with_noun: bool, tmp_path: Path) -> None:
    model, both = tiny_model("sd1"), (Subject("<my-toy>", "toy"), CAT)
    params = get_method("textual_inversion").Params(tokens=count, with_noun=with_noun)
    base = {"id": model.id, "fingerprint": model.fingerprint}
    made = Concept("both", both, "textual_inversion", base, params.model_dump())
    one = Trained(made, {"tokens.text_encoder": rows(2 * count)})
    library = Library(Workspace(tmp_path / "w"))
    library.save(one)
    library.export_original("both", tmp_path / "out")
    library.delete("both")
    back = library.load(library.add(tmp_path / "out").name)
    assert (back.concept.name, back.concept.method, back.concept.subjects) == ("both", "textual_inversion", both)
    assert (back.concept.params["tokens"], back.concept.params["with_noun"]) == (count, with_noun)
    assert torch.equal(back.tensors["tokens.text_encoder"], one.tensors["tokens.text_encoder"])
    inversion.write_embeds(tmp_path / "theirs.bin", {"<b>": rows(2), "<a>": rows(2, seed=1)})
    found = formats.read(tmp_path / "theirs.bin")
    assert (found["method"], found["subjects"], found["params"]["tokens"]) == ("textual_inversion", ["<a>", "<b>"], 2)


def test_a_base_that_lies_in_a_folder_is_named_for_the_export(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny", "sd1")
    trained, _ = concept("attndreambooth", load_model(str(folder), device="cpu"))
    library = Library(Workspace(tmp_path / "w"))
    name = library.save(trained).name
    with pytest.raises(StudioError, match=r"'tiny' can't be found by its name. Say where it lies \(--base\)"):
        library.export_original(name, tmp_path / "out")
    written = library.export_original(name, tmp_path / "out", str(folder))
    assert [path.suffix for path in written] == [".bin", ".safetensors", ".json", ".safetensors"]
    assert list(torch.load(written[0], weights_only=True)) == [f"{name}_v0"]
    assert library.find(name).concept.base_model["id"] == "tiny"  # only the export was told
    other = tiny_folder(tmp_path / "other", "sd1", seed=1)
    with pytest.raises(StudioError, match="was trained on another base than"):
        library.export_original(name, tmp_path / "out2", str(other))


def test_what_is_no_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.bin").write_bytes(b"PK\x03\x04nothing")
    save_file({"unet.a.weight": torch.zeros(2, 32)}, tmp_path / "weights.safetensors")
    torch.save({"conv.weight": torch.zeros(2, 32)}, tmp_path / "weights.bin")
    torch.save(torch.zeros(1, 32), tmp_path / "embeds.bin")
    for name in ("noise.bin", "weights.safetensors", "weights.bin", "embeds.bin", "missing.bin", "."):
        assert not inversion.detect(tmp_path / name), name
    two = {"<a>": rows(), "<b>": rows()}
    inversion.write_embeds(tmp_path / "two.safetensors", two)
    assert inversion.read_embeds(tmp_path / "two.safetensors").keys() == two.keys()
    with pytest.raises(StudioError, match="holds 2 concepts"):
        inversion.read(tmp_path / "two.safetensors")
    inversion.write_embeds(tmp_path / "wide.safetensors", {"<a>": torch.zeros(100, 32)})
    assert not inversion.detect(tmp_path / "wide.safetensors")
    with pytest.raises(StudioError, match="no learned token"):
        inversion.read_embeds(tmp_path / "wide.safetensors")
    with pytest.raises(StudioError, match="no learned tokens"):
        inversion.embeds_of(Trained(Concept("x", (CAT,), "svdiff", {"id": "", "fingerprint": ""}), {}))
