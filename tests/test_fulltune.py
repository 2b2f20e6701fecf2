"""Whole weights as a change: every parameter counts, and the base comes back to the bit."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipelines.attention.probe import find_sites
from pipelines.errors import StudioError
from pipelines.fulltune import FullTune, fulltune
from pipelines.lora import lora
from pipelines.model import Model
from tests.test_format_svdiff import real_size
from tests.tiny import tiny_model


@torch.no_grad()
def output(model: Model, prompt: str = "a photo of a cat") -> Tensor:
    noise, text = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), model.encode([prompt])
    sizes = model.conditioning(text, [(48, 64)], [(0, 0)], [(48, 64)])
    noise = noise.to(model.dtype)
    result: Tensor = model.unet(noise, torch.tensor([300]), text.states.to(model.dtype), **sizes).sample
    return result


@torch.no_grad()
def scribble(tuned: FullTune) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    for value in [*tuned.parameters(), *tuned.text_parameters()]:
        value.add_(0.02 * torch.randn(value.shape, generator=draw))
    tuned._switched.refresh()
    return tuned.tensors()


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_parameter_of_the_unet_is_there_once(kind: str) -> None:
    model = tiny_model(kind)
    every = {f"unet.{name}" for name, _ in model.unet.named_parameters()}
    crossing = {name for name in every if ".attn2." in name}
    with fulltune(model, on=False) as tuned:
        assert tuned.names() == every
        assert sum(value.numel() for value in tuned.parameters()) == sum(p.numel() for p in model.unet.parameters())
        assert tuned.tensors() == {} and not tuned.text_parameters()
    with fulltune(model, "cross-attention") as tuned:
        assert tuned.names() == crossing and len(crossing) % 5 == 0  # q, k, v, out and out's bias: 80 in SD
    with fulltune(model, "rest") as tuned:
        assert tuned.names() == every - crossing


@pytest.mark.parametrize(
    ("kind", "layers", "parameters"), [("sd1", 16, 43_962_560), ("sd2", 16, 50_352_320), ("sdxl", 70, 545_670_400)]
)
def test_cross_attention_is_as_large_as_published(kind: str, layers: int, parameters: int) -> None:
    """AttnDreamBooth's second stage: 80 tensors and 50 million numbers of SD 2.1."""
    model = real_sdxl() if kind == "sdxl" else real_size(kind)
    with fulltune(model, "cross-attention") as tuned:
        assert len(tuned.names()) == 5 * layers
        assert sum(value.numel() for value in tuned.parameters()) == parameters
    assert sum(site.kind == "cross" for site, _ in find_sites(model.unet)) == layers


def real_sdxl() -> Model:
    """SDXL's UNet without its numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return Model("sdxl", "sdxl", "", (), (), unet, None, {})


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_it_is_what_the_tuned_model_gives_and_leaves_nothing(kind: str) -> None:
    model, other = tiny_model(kind), tiny_model(kind)
    before, objects = output(model), [id(p) for p in model.unet.parameters()]
    with fulltune(model, text_encoder=True) as tuned:
        assert torch.equal(before, output(model))
        tensors = scribble(tuned)
        live = output(model)
        for part, root in (("unet", other.unet), ("text_encoder", other.text_encoders[0])):
            own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
            names = {name.removeprefix("text_model."): name for name in root.state_dict()}
            missing = root.load_state_dict({names[key]: value for key, value in own.items()}, strict=False)
            assert not missing.unexpected_keys
        if kind == "sdxl":
            key = "text_encoder_2."
            names = {name.removeprefix("text_model."): name for name in other.text_encoders[1].state_dict()}
            own = {names[k.removeprefix(key)]: v for k, v in tensors.items() if k.startswith(key)}
            other.text_encoders[1].load_state_dict(own, strict=False)
        torch.testing.assert_close(live, output(other), atol=1e-4, rtol=1e-3)
        assert not torch.allclose(before, live, atol=1e-2)
        tuned.bake()
        torch.testing.assert_close(live, output(model), atol=1e-5, rtol=1e-4)
        tuned.strength = 0.0
        assert torch.equal(before, output(model))
        tuned.strength = 0.5
        assert not torch.equal(before, output(model))
    assert torch.equal(before, output(model)) and objects == [id(p) for p in model.unet.parameters()]
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_it_waits_until_it_is_switched_on_or_loaded() -> None:
    model = tiny_model("sd1")
    with fulltune(model) as tuned:
        tensors, expected = scribble(tuned), output(model)
    before = output(model)
    with fulltune(model, on=False) as tuned:
        tuned.load({})
        assert "forward" not in model.unet.conv_in.__dict__
        tuned.load(tensors)
        assert torch.equal(expected, output(model))
        kept = tuned.tensors()
        assert kept.keys() == tensors.keys() and all(torch.equal(kept[key], tensors[key]) for key in kept)
        tuned.load({"unet.conv_in.bias": tensors["unet.conv_in.bias"]})  # what is left out is the base's
        assert torch.equal(tuned.tensors()["unet.conv_in.weight"], model.unet.conv_in.weight)
        for wrong, reason in (
            ({"unet.elsewhere.weight": torch.zeros(2)}, "elsewhere"),
            ({"unet.conv_in.bias": torch.zeros(2)}, "brings 2 numbers, 32 are needed"),
            ({"unet.conv_in.bias": torch.full((32,), float("nan"))}, "broken"),
        ):
            with pytest.raises(StudioError, match=reason):
                tuned.load(wrong)
    assert torch.equal(before, output(model))


def test_several_changes_come_and_go_in_any_order() -> None:
    model = tiny_model("sd1")
    before = output(model)
    for off in permutations(("full", "cross", "lora")):
        contexts = {
            "full": fulltune(model),
            "cross": fulltune(model, "cross-attention"),
            "lora": lora(model, rank=2, alpha=2.0),
        }
        full, cross, _ = (context.__enter__() for context in contexts.values())
        assert isinstance(full, FullTune) and isinstance(cross, FullTune)
        scribble(full), scribble(cross)
        full.bake()
        for name in off:
            output(model)
            contexts[name].__exit__(None, None, None)
        assert torch.equal(before, output(model))


def test_another_concept_s_folded_weight_is_not_taken_for_the_base() -> None:
    model = tiny_model("sd1")
    own = model.unet.conv_in.weight.clone()
    with fulltune(model) as first:
        scribble(first)
        first.bake()
        with fulltune(model, on=False) as second:
            assert not second.moved()
            assert torch.equal(second.parameters()[0], own)


def test_gradients_reach_weights_and_biases_in_fp32() -> None:
    model = tiny_model("sd1")
    model.unet.to(torch.bfloat16)
    with fulltune(model) as tuned, torch.autocast("cpu", torch.bfloat16):
        text = model.encode(["a cat"]).states.to(torch.bfloat16)
        model.unet(
            torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([3]), text
        ).sample.float().square().mean().backward()
    grads = [value.grad for value in tuned.parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    assert sum(bool(grad.any()) for grad in grads if grad is not None) > 0.9 * len(grads)
    assert all(p.grad is None for p in model.unet.parameters())
