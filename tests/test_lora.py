"""Low-rank changes: the formula, exact restoring, and the same numbers through peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines import formats
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.formats import lora as files
from pipelines.lora import Lora, Targets, lora, lora_layers
from pipelines.model import Model, from_pipeline
from pipelines.weights import base_weight, weights_of
from tests.test_fulltune import real_sdxl
from tests.tiny import tiny_model, tiny_pipeline

CAT = Subject("<my-cat>", "cat")


@torch.no_grad()
def output(model: Model, prompt: str = "a photo of a cat") -> Tensor:
    noise, text = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), model.encode([prompt])
    sizes = model.conditioning(text, [(48, 64)], [(0, 0)], [(48, 64)])
    result: Tensor = model.unet(noise, torch.tensor([300]), text.states, **sizes).sample
    return result


@torch.no_grad()
def scribble(adapter: Lora) -> None:
    """Numbers that make a difference."""
    draw = torch.Generator().manual_seed(1)
    for change in adapter.changes.values():
        change.up.copy_(0.3 * torch.randn(change.up.shape, generator=draw))
    adapter._switched.refresh()


def concept(tensors: dict[str, Tensor], **params: Any) -> Trained:
    return Trained(Concept("my-cat", (CAT,), "dreambooth", {"id": "x", "fingerprint": "y"}, params), tensors)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("targets", ["attention", "all-linear", "all"])
def test_it_follows_its_formula_and_leaves_nothing(kind: str, targets: Targets) -> None:
    model = tiny_model(kind)
    before, weights = output(model), {name: id(module.weight) for name, module in weights_of(model).items()}
    layers = lora_layers(model, targets, True)
    kinds = (nn.Linear, nn.Conv2d) if targets == "all" else (nn.Linear,)
    assert layers and all(isinstance(module, kinds) for module in layers.values())
    assert {name.split(".")[0] for name in layers} >= {"unet", "text_encoder"}
    name, module = next((name, module) for name, module in layers.items() if name.startswith("unet."))
    with lora(model, rank=2, alpha=6.0, targets=targets, text_encoder=True) as adapter:
        assert torch.equal(before, output(model))  # up is zero
        assert len(adapter.parameters()) + len(adapter.text_parameters()) == 2 * len(layers)
        scribble(adapter)
        live = output(model)
        adapter.bake()
        change = adapter.changes[name]
        plain = module.weight - base_weight(module)
        torch.testing.assert_close(plain.flatten(1), 3.0 * change.up @ change.down, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(live, output(model), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(before, live, atol=1e-3)
        adapter.strength = 0.0
        assert torch.equal(before, output(model))
    assert torch.equal(before, output(model))
    assert weights == {name: id(module.weight) for name, module in weights_of(model).items()}


def test_sdxls_attention_learns_as_many_numbers_as_published() -> None:
    """MuDI, rank 32: 186 MB in fp32."""
    layers = lora_layers(real_sdxl(), "attention", False)
    assert len(layers) == 70 * 2 * 4 and all(name.startswith("unet.") for name in layers)
    sides = [layer.in_features + layer.out_features for layer in layers.values() if isinstance(layer, nn.Linear)]
    assert len(sides) == 560 and 32 * sum(sides) == 46_448_640


def test_the_seed_decides_how_it_starts_and_nothing_else() -> None:
    model = tiny_model("sd1")
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        with lora(model, rank=2, alpha=2.0) as adapter:
            starts.append(adapter.parameters()[0].detach().clone())
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert starts[0].std().item() == pytest.approx(0.5, rel=0.5)


def test_gradients_reach_only_the_factors() -> None:
    model = tiny_model("sd1")
    with lora(model, rank=2, alpha=2.0, text_encoder=True) as adapter:
        scribble(adapter)
        text = model.encode(["a photo of a cat"])
        model.unet(torch.randn(1, 4, 8, 8), torch.tensor([3]), text.states).sample.square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in [*adapter.parameters(), *adapter.text_parameters()])
    assert all(p.grad is None for p in model.unet.parameters())


def test_saved_and_loaded_is_the_same_and_what_does_not_fit_is_refused() -> None:
    model = tiny_model("sd1")
    with lora(model, rank=2, alpha=2.0) as adapter:
        scribble(adapter)
        kept, expected = adapter.tensors(), output(model)
    with lora(model, rank=2, alpha=2.0) as adapter:
        adapter.load(kept)
        assert torch.equal(expected, output(model))
        again = adapter.tensors()
        assert again.keys() == kept.keys() and all(torch.equal(again[key], kept[key]) for key in kept)
        key = next(iter(kept))
        for broken, reason in (
            ({key: kept[key][:1]}, "doesn't fit"),
            ({key: torch.full_like(kept[key], float("nan"))}, "broken"),
            ({"unet.elsewhere.lora_A.weight": kept[key]}, "elsewhere.*lacks"),
        ):
            with pytest.raises(StudioError, match=reason):
                adapter.load(kept | broken)
        with pytest.raises(StudioError, match="one of its two factors"):
            adapter.load({name: values for name, values in kept.items() if name != key})
        assert torch.equal(expected, output(model))
        adapter.load({})
        assert torch.equal(output(tiny_model("sd1")), output(model))
    with pytest.raises(StudioError, match="rank of 0"), lora(model, rank=0, alpha=1.0):
        pass


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_what_we_write_and_gives_the_same_picture(kind: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(kind)
    model = from_pipeline(pipeline, "tiny")
    with lora(model, rank=3, alpha=6.0, targets="attention") as adapter:
        scribble(adapter)
        ours, kept = output(model), adapter.tensors()
    (file,) = files.write(tmp_path, concept(kept, rank=3, alpha=6.0))
    assert files.detect(file) and files.detect(tmp_path)
    pipeline.load_lora_weights(tmp_path)
    theirs = output(model)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    found = files.read(file)
    assert found["params"]["rank"] == 3 and found["params"]["alpha"] == 3.0 and found["noun"] == "cat"
    with lora(model, rank=3, alpha=3.0, targets=found["params"]["targets"]) as adapter:
        adapter.load(found["tensors"])
        torch.testing.assert_close(ours, output(model), atol=1e-5, rtol=1e-4)


def test_peft_s_own_file_is_read_with_its_scale(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    pipeline = tiny_pipeline("sd1")
    model = from_pipeline(pipeline, "tiny")
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    wrapped = get_peft_model(pipeline.unet, settings)
    theirs = output(model)
    wrapped.save_pretrained(tmp_path)
    model = tiny_model("sd1")
    found = files.read(tmp_path)
    assert found["params"] | {"targets": ""} == {
        "tune": "lora", "rank": 2, "alpha": 2.0, "targets": "", "train_text_encoder": False,
    }  # fmt: skip
    with lora(model, rank=2, alpha=2.0, targets=found["params"]["targets"]) as adapter:
        adapter.load(found["tensors"])
        torch.testing.assert_close(theirs, output(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_peft_reads_the_adapter_that_we_write(targets: Targets, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model("sd1")
    with lora(model, rank=3, alpha=6.0, targets=targets) as adapter:
        scribble(adapter)
        ours, kept = output(model), adapter.tensors()
    written = formats.write(concept(kept, rank=3, alpha=6.0, rare_word="hta"), tmp_path, "peft")
    assert [file.name for file in written] == ["adapter_model.safetensors", "adapter_config.json"]
    pipeline = tiny_pipeline("sd1")
    PeftModel.from_pretrained(pipeline.unet, str(tmp_path))
    torch.testing.assert_close(ours, output(from_pipeline(pipeline, "tiny")), atol=1e-5, rtol=1e-4)
    found = formats.read(tmp_path)
    assert (found["noun"], found["params"]["rare_word"], found["params"]["rank"]) == ("cat", "hta", 3)
    with lora(model, rank=3, alpha=3.0, targets=found["params"]["targets"]) as adapter:
        adapter.load(found["tensors"])
        torch.testing.assert_close(ours, output(model), atol=1e-5, rtol=1e-4)
    with pytest.raises(StudioError, match="of the UNet alone"):
        formats.write(concept({f"text_encoder{key[4:]}": one for key, one in kept.items()}), tmp_path, "peft")


def test_older_spellings_and_mixed_ranks(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    content = {
        f"{path}.processor.to_q_lora.down.weight": torch.randn(4, 32, generator=draw),
        f"{path}.processor.to_q_lora.up.weight": torch.randn(32, 4, generator=draw),
        f"{path}.to_out.0.lora.down.weight": torch.randn(2, 32, generator=draw),
        f"{path}.to_out.0.lora.up.weight": torch.randn(32, 2, generator=draw),
        f"{path}.to_out.0.alpha": torch.tensor(1.0),
    }
    save_file(content, tmp_path / "old.safetensors")
    assert files.detect(tmp_path / "old.safetensors")
    found = files.read(tmp_path / "old.safetensors")["tensors"]
    assert {tuple(values.shape) for values in found.values()} == {(4, 32), (32, 4)}
    query = found[f"{path}.to_q.lora_B.weight"] @ found[f"{path}.to_q.lora_A.weight"]
    out = found[f"{path}.to_out.0.lora_B.weight"] @ found[f"{path}.to_out.0.lora_A.weight"]
    down, up = content[f"{path}.to_out.0.lora.down.weight"], content[f"{path}.to_out.0.lora.up.weight"]
    torch.testing.assert_close(out, 0.5 * up @ down)
    assert query.shape == (32, 32)


def test_other_files_are_not_taken_for_one(tmp_path: Path) -> None:
    save_file({"unet.conv_in.delta": torch.zeros(3)}, tmp_path / "svdiff.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"nothing")
    assert not files.detect(tmp_path / "svdiff.safetensors") and not files.detect(tmp_path / "noise.safetensors")
    assert not files.detect(tmp_path)
    pair = {"unet.a.lora_A.weight": torch.zeros(2, 3), "unet.b.lora_B.weight": torch.zeros(3, 2)}
    save_file(pair, tmp_path / "half.safetensors")
    with pytest.raises(StudioError, match="no pair"):
        files.read(tmp_path / "half.safetensors")
    dora = tmp_path / "dora"
    dora.mkdir()
    save_file(pair, dora / "adapter_model.safetensors")
    (dora / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(StudioError, match="DoRA"):
        files.read(dora)
    assert load_file(dora / "adapter_model.safetensors").keys() == pair.keys()
