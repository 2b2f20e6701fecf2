"""SVDiff's own files: the published names and counts, both ways, and nothing that isn't one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines import formats
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.formats import svdiff as form
from pipelines.methods import svdiff
from pipelines.model import Model
from pipelines.shifts import chosen
from tests.tiny import tiny_model

CAT = Subject("<my-cat>", "cat")


def real_size(kind: str) -> Model:
    """Stable Diffusion 1.5 or 2.1 without its numbers."""
    sd1 = kind == "sd1"
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=768 if sd1 else 1024,
            attention_head_dim=8 if sd1 else (5, 10, 20, 20),
            use_linear_projection=not sd1,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768 if sd1 else 1024,
                intermediate_size=3072 if sd1 else 4096,
                num_hidden_layers=12 if sd1 else 23,
                num_attention_heads=12 if sd1 else 16,
            )
        )
    return Model(kind, kind, "", (), (text,), unet, None, {})


def zeros(model: Model, **settings: Any) -> Trained:
    params = svdiff.Params(**settings)
    with svdiff.attach(model, params, [CAT]) as adapter:
        tensors = {name: torch.zeros(values.shape) for name, values in adapter.shifts().items()}
    base = {"id": model.id, "fingerprint": "00ff"}
    return Trained(Concept("my-cat", (CAT,), "svdiff", base, params.model_dump(), seed=3), tensors)


@pytest.mark.parametrize(
    ("kind", "unet", "dimensions", "text"),
    [("sd1", (391, 222_805), (98, 184, 109), (99, 56_166)), ("sd2", (391, 225_877), (66, 216, 109), (187, 142_460))],
)
def test_names_and_counts_are_the_published_ones(
    kind: str, unet: tuple[int, int], dimensions: tuple[int, int, int], text: tuple[int, int], tmp_path: Path
) -> None:
    model = real_size(kind)
    files = form.write(tmp_path, zeros(model))
    assert [file.name for file in files] == ["spectral_shifts.safetensors", "spectral_shifts_te.safetensors"]
    for file, expected in zip(files, (unet, text), strict=True):
        content = load_file(file)
        assert (len(content), sum(values.numel() for values in content.values())) == expected
        assert all(values.dtype == torch.float32 and values.ndim == 1 for values in content.values())
    weights = [module.weight.ndim for module in chosen(model, svdiff.Params(train_text_encoder=False)).values()]
    assert tuple(weights.count(n) for n in (4, 2, 1)) == dimensions
    found = form.read(tmp_path)
    assert len(found["tensors"]) == unet[0] + text[0]
    with svdiff.attach(model, svdiff.Params(**found["params"]), [CAT]) as adapter:
        assert found["tensors"].keys() == adapter.shifts().keys()
        adapter.load(found["tensors"])  # every shape fits
    shifts, words = load_file(files[0]), load_file(files[1])
    if kind == "sd1":
        block = "down_blocks.0.attentions.0"
        for name, length in {
            "conv_in": 36,
            "conv_out": 4,
            "time_embedding.linear_1": 320,
            f"{block}.norm": 1,
            f"{block}.proj_in": 320,
            f"{block}.transformer_blocks.0.attn1.to_q": 320,
            "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": 768,
            f"{block}.transformer_blocks.0.attn1.to_out.0": 320,
            f"{block}.transformer_blocks.0.ff.net.0.proj": 320,
            f"{block}.transformer_blocks.0.ff.net.2": 320,
            "mid_block.resnets.0.time_emb_proj": 1280,
        }.items():
            assert len(shifts[f"{name}.delta"]) == length
        assert len(words["text_model.embeddings.token_embedding.delta"]) == 768
        assert len(words["text_model.embeddings.position_embedding.delta"]) == 77
        assert len(words["text_model.encoder.layers.0.self_attn.k_proj.delta"]) == 768
        assert len(words["text_model.encoder.layers.0.layer_norm1.delta"]) == 1


@pytest.mark.parametrize(("kind", "norms"), [("sd1", 109 + 25), ("sd2", 109 + 47)])
def test_norms_learn_at_their_own_rate(kind: str, norms: int) -> None:
    model, params = real_size(kind), svdiff.Params()
    with svdiff.attach(model, params, [CAT]) as adapter:
        counts = {group["lr"]: len(group["params"]) for group in adapter.param_groups(svdiff.stages(params)[0])}
    assert counts[1e-6] == norms and set(counts) == {1e-3, 1e-6}


@pytest.mark.parametrize(
    ("layers", "kilobytes"),
    [("1d", 430), ("2d", 617), ("4d", 355), ("ca", 194), ("ca-kv", 84.8), ("up", 789), ("down", 469), ("mid", 135)]
    + [("up-ca", 106), ("down-ca", 70.4), ("mid-ca", 17.7), ("all", 1404)],
)
def test_subsets_have_the_papers_sizes(layers: Any, kilobytes: float) -> None:
    """Table of the paper's ablation: fp32 numbers, about 0.36 KB a tensor around them, norms by element."""
    shifts = zeros(real_size("sd1"), layers=layers, mode_1d="element", train_text_encoder=False).tensors
    size = sum(4 * values.numel() + 360 for values in shifts.values()) / 1000
    assert size == pytest.approx(kilobytes, rel=0.03)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("mode", ["scalar", "element"])
def test_out_and_in_again(kind: str, mode: Any, tmp_path: Path) -> None:
    trained = zeros(tiny_model(kind), mode_1d=mode, rare_word="hta")
    chance = torch.Generator().manual_seed(0)
    for values in trained.tensors.values():
        values.copy_(torch.randn(values.shape, generator=chance))
    files = formats.write(trained, tmp_path)
    assert len(files) == (3 if kind == "sdxl" else 2)
    assert all(key.startswith("text_model.") for file in files[1:] for key in load_file(file))
    for path in (tmp_path, files[0]):
        found = formats.read(path)
        assert found["method"] == "svdiff" and found["format"] == "svdiff"
        assert found["tensors"].keys() == trained.tensors.keys()
        assert all(torch.equal(found["tensors"][name], values) for name, values in trained.tensors.items())
        assert found["params"] == {"mode_1d": mode, "train_text_encoder": True, "rare_word": "hta"}
        assert (found["name"], found["noun"]) == ("my-cat", "cat")
        assert found["base"]["fingerprint"] == "00ff"
    with safe_open(files[0], framework="pt") as file:
        notes = file.metadata()
    assert notes["instance_prompt"] == "a photo of hta cat" and notes["class_prompt"] == "a photo of a cat"


def published(folder: Path, **changes: Tensor) -> Path:
    """Files as svdiff-pytorch writes them for a tiny model: no metadata, and an old buffer in the text side."""
    trained = zeros(tiny_model("sd1"))
    unet = {k.removeprefix("unet."): v + 0.1 for k, v in trained.tensors.items() if k.startswith("unet.")}
    text = {
        k.replace("text_encoder.", "text_model."): v + 0.1 for k, v in trained.tensors.items() if k.startswith("text")
    }
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(unet | changes, folder / "spectral_shifts.safetensors")
    save_file(text, folder / "spectral_shifts_te.safetensors")
    return folder


def test_a_published_folder_loads_into_the_model(tmp_path: Path) -> None:
    found = formats.read(published(tmp_path))
    assert "base" not in found and "name" not in found
    assert found["params"] == {"mode_1d": "scalar", "train_text_encoder": True}
    with svdiff.attach(tiny_model("sd1"), svdiff.Params(**found["params"]), [CAT]) as adapter:
        adapter.load(found["tensors"])
        assert all((values == 0.1).all() for values in adapter.tensors().values())


def test_without_a_text_side(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "spectral_shifts_te.safetensors").unlink()
    assert formats.read(folder)["params"]["train_text_encoder"] is False
    renamed = (folder / "spectral_shifts.safetensors").rename(folder / "my dog.safetensors")
    assert form.detect(renamed) and not form.detect(folder)
    assert all(name.startswith("unet.") for name in formats.read(renamed)["tensors"])


def test_only_a_text_side(tmp_path: Path) -> None:
    file = published(tmp_path) / "spectral_shifts_te.safetensors"
    (tmp_path / "words.safetensors").write_bytes(file.read_bytes())
    for path in (file, tmp_path / "words.safetensors"):
        found = form.read(path)
        assert len(found["tensors"]) == 19 and found["params"]["train_text_encoder"]
        assert all(name.startswith("text_encoder.") and "text_model" not in name for name in found["tensors"])


def test_another_model_is_refused_naming_the_first_key_that_differs(tmp_path: Path) -> None:
    found = formats.read(published(tmp_path))
    misfit = pytest.raises(StudioError, match=r"layer '[\w.]+'.*brings \d+ numbers, the base needs \d+")
    with svdiff.attach(tiny_model("sd2"), svdiff.Params(**found["params"]), [CAT]) as adapter, misfit:
        adapter.load(found["tensors"])


def test_what_is_broken_or_something_else_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path)
    file = folder / "spectral_shifts.safetensors"
    whole = file.read_bytes()
    for number, bad in enumerate((whole[:100], whole[:-8], b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]")):
        file.write_bytes(bad)
        with pytest.raises(StudioError, match="Choose the folder"):
            form.read(file)
        (other := tmp_path / f"{number}.safetensors").write_bytes(bad)
        assert form.detect(other) == (number == 1)
    for values in (torch.full((32,), float("inf")), torch.zeros(4, 8), torch.zeros(32, dtype=torch.int64)):
        with pytest.raises(StudioError, match="conv_in"):
            form.read(published(tmp_path, **{"conv_in.delta": values}))
    with pytest.raises(StudioError, match="conv_in.weight"):
        form.read(published(tmp_path, **{"conv_in.weight": torch.zeros(3)}))
    with pytest.raises(StudioError):
        form.read(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    assert not form.detect(tmp_path / "empty") and not form.detect(tmp_path / "nowhere.safetensors")
    with pytest.raises(StudioError):
        form.read(tmp_path / "empty")
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    assert not form.detect(tmp_path / "lora.safetensors")
