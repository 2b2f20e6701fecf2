"""AttnDreamBooth's output folders: the learned words and a whole `unet/` of diffusers.

    learned_embeds/learned_embeds_steps_60.bin
    learned_models/attn_models/checkpoint-100/unet/   learned_models/unet_models/checkpoint-500/unet/
    unet/config.json, unet/diffusion_pytorch_model.safetensors

Read: the whole output folder, a checkpoint, or a `unet` folder; the newest of each is taken. A `unet/` without learned
words is a DreamBooth concept tuned in full. Written: the learned words as .bin (which the released code reads) and as
safetensors, and one complete `unet/`, for which the base is loaded, since a concept may change but a part of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import make_folder, printable, save_tensors, write_json
from pipelines.formats import inversion
from pipelines.formats.jail import read_tensors
from pipelines.intake import WEIGHTS_LIMIT, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.model import Model

method = "attndreambooth"
title = "AttnDreamBooth's folders, or a unet/ checkpoint"

UNET, EMBEDS = "unet", "learned_embeds"
WEIGHTS = "diffusion_pytorch_model"
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
    pickled = file.suffix == ".bin"
    content = read_tensors(file, WEIGHTS_LIMIT) if pickled else load_tensors(file)[0]
    if not isinstance(content, dict):
        raise StudioError(f"'{printable(file.name)}' is no UNet. {_MESSAGE}")
    weights = {f"{UNET}.{name}": values.float() for name, values in content.items()}
    embeds = _embeds_file(path)
    if embeds is None:
        params = {"tune": "full", "prior_weight": 0.0}
        return {"method": "dreambooth", "tensors": weights, "params": params}
    words = inversion.read(embeds)
    return {
        "tensors": words["tensors"] | weights,
        "params": {"tokens": words["params"]["tokens"], "identity": "full"},
        "name": words["name"],
    }


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
    """`unet/` of diffusers in the folder `path`: the concept's base with the concept in it.

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
    save_tensors(files[1], weights, {"format": "pt"})
    return files


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
