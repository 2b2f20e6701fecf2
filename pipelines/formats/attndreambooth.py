"""AttnDreamBooth's output folders: the learned words and a whole `unet/` of diffusers.

    learned_embeds/learned_embeds_steps_60.bin
    learned_models/attn_models/checkpoint-100/unet/   learned_models/unet_models/checkpoint-500/unet/
    unet/config.json, unet/diffusion_pytorch_model.safetensors

Read: the whole output folder, a checkpoint, or a `unet` folder; the newest of each is taken. A `unet/` without learned
words is a DreamBooth concept tuned in full, and a `text_encoder/` beside it is its text (diffusers' train_dreambooth
writes both). Learned words without a `unet/` are read by `inversion`. Written: the learned words as .bin (which the
released code reads) and as safetensors, and one complete `unet/`, for which the base is loaded, since a concept may
change but a part of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import make_folder, printable, save_tensors, write_json
from pipelines.formats import inversion
from pipelines.formats.jail import read_tensors
from pipelines.formats.notes import concept_note, concept_noted, params_noted
from pipelines.intake import WEIGHTS_LIMIT, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.model import Model

method = "attndreambooth"
title = "AttnDreamBooth's folders, or a unet/ checkpoint"

UNET, EMBEDS = "unet", "learned_embeds"
WEIGHTS = "diffusion_pytorch_model"
TEXTS, TEXT_WEIGHTS = ("text_encoder", "text_encoder_2"), ("model.safetensors", "pytorch_model.bin")
_WRAPPER, _OUTSIDE = "text_model.", "text_projection."  # around a text encoder's paths, and what stands outside it
_PIPELINE = "model_index.json"  # a whole base, not a concept
_MESSAGE = "Choose AttnDreamBooth's output folder, or one of its checkpoints."


def detect(path: Path) -> bool:
    """A folder with a UNet's weights below it in one of the places above, and no whole pipeline."""
    return path.is_dir() and not (path / _PIPELINE).exists() and _unet_file(path) is not None


def read(path: Path) -> dict[str, Any]:
    """The weights under our names and the learned words where there are any. StudioError when either is broken."""
    file = _unet_file(path)
    if file is None:
        raise StudioError(f"'{printable(path.name)}' has no {UNET}/{WEIGHTS}.safetensors. {_MESSAGE}")
    content, metadata = _loaded(file)
    weights = {f"{UNET}.{name}": values.float() for name, values in content.items()}
    embeds = _embeds_file(path)
    if embeds is None:
        text = _text_weights(file.parent.parent)
        params = {"tune": "full", "prior_weight": 0.0, "train_text_encoder": bool(text)} | params_noted(metadata)
        return {"method": "dreambooth", "tensors": weights | text, "params": params} | concept_noted(metadata)
    words = inversion.read(embeds)
    return {
        "tensors": words["tensors"] | weights,
        "params": {"tokens": words["params"]["tokens"], "identity": "full"},
        "name": words["name"],
    } | concept_noted(metadata)


def _loaded(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content, metadata = (read_tensors(file, WEIGHTS_LIMIT), {}) if file.suffix == ".bin" else load_tensors(file)
    if not isinstance(content, dict):
        raise StudioError(f"'{printable(file.name)}' holds one bare tensor. {_MESSAGE}")
    return content, metadata


def _text_weights(folder: Path) -> dict[str, Tensor]:
    """The text encoders beside a `unet/`, under our names; {} where there are none, or where they are a base's."""
    found: dict[str, Tensor] = {}
    for part in () if (folder / _PIPELINE).exists() else TEXTS:
        files = [folder / part / name for name in TEXT_WEIGHTS if (folder / part / name).is_file()]
        for name, values in _loaded(files[0])[0].items() if files else ():
            if values.is_floating_point():  # older versions of transformers saved the positions' numbers too
                found[f"{part}.{name.removeprefix(_WRAPPER)}"] = values.float()
    return found


def write(path: Path, trained: Trained) -> list[Path]:
    """The learned words and `unet/` in the folder `path`."""
    tokens = trained.tensors.get(inversion.KEYS[0])
    if tokens is None or inversion.KEYS[1] in trained.tensors:
        raise StudioError("AttnDreamBooth's own files know Stable Diffusion 1 and 2 only. Export the concept as a zip.")
    steps = trained.concept.params.get("embedding_steps", 60)
    target = path / EMBEDS / f"{EMBEDS}_steps_{steps}"
    if target.with_suffix(".bin").exists():
        raise StudioError(f"{target}.bin is already there. Choose another folder.")
    written = write_unet(path, trained) if _changes_weights(trained) else []
    make_folder(target.parent)
    for end in (".bin", ".safetensors"):
        inversion.write_numbered(target.with_suffix(end), trained.concept.name, tokens)
    return [target.with_suffix(".bin"), target.with_suffix(".safetensors"), *written]


def write_unet(path: Path, trained: Trained) -> list[Path]:
    """`unet/` of diffusers in the folder `path`: the concept's base with the concept in it; `text_encoder/` as well
    where the text learned.

    StudioError when the base can't be loaded by its name, or isn't the one the concept was trained on.
    """
    from pipelines.model import load_model

    if (path / UNET).exists():
        raise StudioError(f"{path / UNET} is already there. Choose another folder.")
    where = trained.concept.base_model.get("id", "")
    if where != "toybox" and "/" not in where and not Path(where or "?").exists():
        raise StudioError(
            f"A whole {UNET}/ holds the base as well, and '{where or 'an unknown base'}' can't be found by its name. "
            "Say where it lies (--base), or export the concept as a zip."
        )
    model = load_model(where)
    if trained.concept.base_model.get("fingerprint") not in ("", None, model.fingerprint):
        raise StudioError(
            f"'{printable(trained.concept.name)}' was trained on another base than '{printable(where)}'. Say where its "
            "own lies (--base), or export the concept as a zip."
        )
    return write_checkpoint(path, model, trained)


def write_checkpoint(path: Path, model: Model, trained: Trained) -> list[Path]:
    """The same for a base that is loaded."""
    config = {key: value for key, value in model.unet.config.items() if not key.startswith("_")}
    weights = checkpoint(model, trained)
    make_folder(path / UNET)
    files = [path / UNET / "config.json", path / UNET / f"{WEIGHTS}.safetensors"]
    write_json(files[0], {"_class_name": type(model.unet).__name__} | config)
    save_tensors(files[1], weights, concept_note(trained.concept))
    return files + _write_texts(path, model, trained)


def _write_texts(path: Path, model: Model, trained: Trained) -> list[Path]:
    """The text encoders that learned, each a folder as transformers reads it."""
    written: list[Path] = []
    for part, encoder in zip(TEXTS, model.text_encoders, strict=False):
        if not any(name.startswith(f"{part}.") for name in trained.tensors):
            continue
        weights = {}
        for name, base in encoder.state_dict().items():
            plain = name.removeprefix(_WRAPPER)
            theirs = plain if plain.startswith(_OUTSIDE) else _WRAPPER + plain
            weights[theirs] = trained.tensors.get(f"{part}.{plain}", base).detach().to("cpu").float()
        make_folder(path / part)
        files = [path / part / "config.json", path / part / TEXT_WEIGHTS[0]]
        config = json.loads(encoder.config.to_json_string(use_diff=False))
        write_json(files[0], config | {"architectures": [type(encoder).__name__]})
        save_tensors(files[1], weights, {"format": "pt"})
        written += files
    return written


def checkpoint(model: Model, trained: Trained) -> dict[str, Tensor]:
    """Every tensor of the UNet with the concept folded in, on the CPU, in fp32."""
    from pipelines.attach import attached

    with attached(model, [(trained, 1.0)]):
        found = {name: value.detach().to("cpu").float().clone() for name, value in model.unet.state_dict().items()}
    for name, values in trained.tensors.items():  # biases are added beside the layers, not folded in
        own = name.removeprefix(f"{UNET}.")
        if name.startswith(f"{UNET}.") and own in found:
            found[own] = values.float().clone() if name.endswith(".bias") else found[own]
    return found


def _changes_weights(trained: Trained) -> bool:
    return any(name.startswith(f"{UNET}.") for name in trained.tensors)


def _unet_file(path: Path) -> Path | None:
    """The weights to read: of `path` itself, or of its newest checkpoint of the latest stage."""
    models = path / "learned_models"
    checkpoints = [
        folder
        for stage in ("unet_models", "attn_models")
        for folder in sorted((models / stage).glob("checkpoint-*"), key=_number, reverse=True)
    ]
    own = [path] if path.name == UNET else []
    for folder in [*own, path / UNET, *(folder / UNET for folder in checkpoints)]:
        found = [folder / f"{WEIGHTS}{end}" for end in (".safetensors", ".fp16.safetensors", ".bin")]
        for file in filter(Path.is_file, found):
            return file
    return None


def _embeds_file(path: Path) -> Path | None:
    """The learned words beside the weights, or in the output folder that a checkpoint lies in."""
    for folder in [path, *list(path.resolve().parents)[:4]]:
        for place in (folder / EMBEDS, folder):
            if place.is_dir() and any(place.glob(f"{EMBEDS}*.*")) and inversion.detect(place):
                return place
    return None


def _number(folder: Path) -> int:
    numbers = re.findall(r"\d+", folder.name)
    return int(numbers[-1]) if numbers else 0
