"""Low-rank weights as diffusers and peft write them, in one safetensors file (`pytorch_lora_weights.safetensors`).

Their keys are "unet.<path>.lora_A.weight" (rank, in) and "...lora_B.weight" (out, rank); the text side's paths begin
with "text_encoder.text_model.". Read as well: peft's own `adapter_model.safetensors` with its adapter_config.json, and
the older spellings "...processor.to_q_lora.down.weight" and "...to_q.lora.down.weight". The scale alpha / rank stands
in ".alpha" tensors, in the metadata or in the config; it is multiplied into `lora_B`, so that what we hold and write
has the scale 1 that every reader assumes without being told.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import make_folder, printable, save_tensors, write_json
from pipelines.formats.notes import concept_note, concept_noted, params_noted
from pipelines.intake import load_tensors, read_header, read_json

if TYPE_CHECKING:
    from torch import Tensor

method = "dreambooth"
title = "LoRA weights of diffusers and peft"

FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_TEXT = re.compile(r"^(text_encoder(?:_2)?)\.(?:text_model\.)?")
_OLD = (
    (re.compile(r"\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight$"), r".\1.lora.\2.weight"),
    (re.compile(r"\.(?:lora\.down|lora_linear_layer\.down)\.weight$"), DOWN),
    (re.compile(r"\.(?:lora\.up|lora_linear_layer\.up)\.weight$"), UP),
    (re.compile(r"\.to_out(?=\.lora)"), ".to_out.0"),
)
_LIMIT = 2_000_000_000  # bytes
_MESSAGE = "Choose a LoRA for Stable Diffusion that diffusers or peft wrote."


def detect(path: Path) -> bool:
    """A folder with such a file, or a safetensors file all of whose keys are low-rank factors."""
    if path.is_dir():
        from pipelines.formats import mudi_lora  # which stands on this module

        known = any((path / name).is_file() for name in (FILE, _PEFT_FILE))
        return known and not mudi_lora.detect(path)
    try:
        keys = [key for key in read_header(path) if key != "__metadata__"]
    except (StudioError, OSError):
        return False
    return bool(keys) and all(_ours(key).endswith((DOWN, UP, ALPHA)) for key in keys) and any(map(_factor, keys))


def read(path: Path) -> dict[str, Any]:
    """The factors under our names, and the settings that they imply; "name", "noun", "base" where we wrote the file.

    Ranks that differ between layers are filled up with zeros to the greatest. StudioError for anything else.
    """
    file = next((path / name for name in (FILE, _PEFT_FILE) if (path / name).is_file()), path)
    what = f"'{printable(file.name)}'"
    content, metadata = load_tensors(file, _LIMIT)
    scales = _alphas(content, metadata, file)
    content = {_ours(key): values for key, values in content.items() if not key.endswith(ALPHA)}
    layers = sorted({key.removesuffix(DOWN) for key in content if key.endswith(DOWN)})
    if not layers or {name + end for name in layers for end in (DOWN, UP)} != set(content):
        odd = next((key for key in content if key.removesuffix(DOWN).removesuffix(UP) not in layers), "nothing")
        raise StudioError(f"{what} holds '{printable(odd)}', which is no pair of low-rank factors. {_MESSAGE}")
    rank = max(len(content[name + DOWN]) for name in layers)
    tensors: dict[str, Tensor] = {}
    for name in layers:
        down, up = content[name + DOWN].float(), content[name + UP].float()
        if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != len(down):
            raise StudioError(f"The factors of '{printable(name)}' in {what} don't fit each other. {_MESSAGE}")
        alpha = scales.get(name, scales.get("", float(len(down))))
        tensors[name + DOWN] = _filled(down, rank, 0)
        tensors[name + UP] = _filled(up if alpha == len(down) else up * (alpha / len(down)), rank, 1)
    params: dict[str, Any] = {
        "tune": "lora",
        "rank": rank,
        "alpha": float(rank),
        "targets": _targets(tensors),
        "train_text_encoder": any(not name.startswith("unet.") for name in layers),
    }
    params |= params_noted(metadata)
    ours = {"method": "segmix"} if metadata.get("attune_method") == "segmix" else {}
    if ours:
        del params["tune"]
    return {"tensors": tensors, "params": params} | ours | concept_noted(metadata)


def write(path: Path, trained: Trained) -> list[Path]:
    """The file in the folder `path`; a concept tuned in full becomes a `unet/` checkpoint instead, with
    `text_encoder/` where the text learned."""
    if not any(key.endswith(DOWN) for key in trained.tensors):
        from pipelines.formats.attndreambooth import write_unet

        return write_unet(path, trained)
    make_folder(path)
    target = path / FILE
    if target.exists():
        raise StudioError(f"{target} is already there. Choose another folder.")
    save_tensors(target, lora_file(trained), concept_note(trained.concept))
    return [target]


def write_peft(path: Path, trained: Trained) -> list[Path]:
    """The UNet's change as an adapter of peft itself, `PeftModel.from_pretrained(unet, path)`, in the folder `path`.

    StudioError for a concept without low-rank weights, and for one whose text learned: an adapter is of one model.
    """
    factors = lora_file(trained)
    if not factors or len(factors) < len(trained.tensors) or not all(key.startswith("unet.") for key in factors):
        raise StudioError(
            f"peft's own form holds low-rank changes of the UNet alone, and '{trained.concept.name}' isn't that. "
            "Export it as a zip."
        )
    files = [path / _PEFT_FILE, path / _PEFT_CONFIG]
    for file in files:
        if file.exists():
            raise StudioError(f"{file} is already there. Choose another folder.")
    make_folder(path)
    plain = {key.removeprefix("unet."): values for key, values in factors.items()}
    rank = next(len(values) for key, values in plain.items() if key.endswith(DOWN))
    content = {f"base_model.model.{key}": values for key, values in plain.items()}
    save_tensors(files[0], content, concept_note(trained.concept))
    layers = sorted(key.removesuffix(DOWN) for key in plain if key.endswith(DOWN))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers, "inference_mode": True}
    write_json(files[1], config | {"base_model_name_or_path": trained.concept.base_model.get("id") or None})
    return files


forms = {"peft": write_peft}


def lora_file(trained: Trained) -> dict[str, Tensor]:
    """The low-rank tensors of a concept as diffusers names them, with the scale alpha / rank multiplied in."""
    scale = _scale(trained.concept.params)
    found: dict[str, Tensor] = {}
    for key, values in trained.tensors.items():
        if key.endswith((DOWN, UP)):
            theirs = _TEXT.sub(r"\1.text_model.", key)
            found[theirs] = values.float() * scale if key.endswith(UP) and scale != 1 else values.float()
    return found


def _scale(params: dict[str, Any]) -> float:
    rank = float(params.get("rank", 0)) or 1.0
    return float(params.get("alpha") or rank) / rank


def _ours(key: str) -> str:
    """A key in our spelling: "unet." or "text_encoder." before the path, the wrapper's name left out, A and B."""
    for pattern, spelling in _OLD:
        key = pattern.sub(spelling, key)
    key = key.removeprefix("base_model.model.")
    if not key.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
        key = ("text_encoder." if key.startswith(("text_model.", "encoder.layers.")) else "unet.") + key
    return _TEXT.sub(r"\1.", key)


def _factor(key: str) -> bool:
    return _ours(key).endswith(DOWN)


def _alphas(content: dict[str, Tensor], metadata: dict[str, str], file: Path) -> dict[str, float]:
    """alpha by layer; under "" the one for all others, where the file says."""
    found = {_ours(key).removesuffix(ALPHA): float(values) for key, values in content.items() if key.endswith(ALPHA)}
    config: dict[str, Any] = {}
    if file.name == _PEFT_FILE and (file.parent / _PEFT_CONFIG).is_file():
        config = read_json(file.parent / _PEFT_CONFIG)
        if config.get("use_dora") or config.get("use_rslora"):
            raise StudioError(
                f"'{_PEFT_CONFIG}' asks for DoRA or rank-stabilised LoRA, which are not known. {_MESSAGE}"
            )
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}")) | config
        alphas = [said[key] for key in ("unet.lora_alpha", "lora_alpha") if key in said]
        return found | ({"": float(alphas[0])} if alphas else {})
    except (ValueError, TypeError, AttributeError) as error:
        raise StudioError(f"The settings in '{printable(file.name)}' can't be read. {_MESSAGE}") from error


def _filled(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros behind, up to `rank` along `dim`: the product stays the same."""
    import torch

    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _targets(tensors: dict[str, Tensor]) -> str:
    """The narrowest of our choices that has every layer of the file."""
    if any(values.ndim > 2 for values in tensors.values()):
        return "all"
    unet = [key for key in tensors if key.startswith("unet.")]
    attention = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)\.lora_[AB]\.weight$")
    return "attention" if all(attention.search(key) for key in unet) else "all-linear"
