"""Taking a concept from disk into the model and out again ÷ loading the model anew."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.attach import attached
from pipelines.bench import Figures, compare
from pipelines.benches.fused_generate import some_concept
from pipelines.files import save_tensors
from pipelines.intake import load_tensors
from pipelines.model import load_model

if TYPE_CHECKING:
    from pipelines.model import Model


def measure(model: Model, runs: int = 8) -> Figures:
    """A concept that changes every layer, folded in; the first load, which decomposes the weights, is not counted."""
    trained = some_concept(model)
    with tempfile.TemporaryDirectory(prefix="attune-") as name:
        folder = Path(name)
        save_tensors(folder / "concept.safetensors", trained.tensors)
        _pipeline(model).save_pretrained(folder / "base")

        def switch() -> None:
            tensors, _ = load_tensors(folder / "concept.safetensors")
            with attached(model, [(replace(trained, tensors=tensors), 1.0)]):
                pass

        def load() -> None:
            load_model(str(folder / "base"), device=model.device, dtype=model.dtype)

        return compare(switch, load, runs, device=model.device)


def _pipeline(model: Model) -> Any:
    """The diffusers pipeline with this model's parts."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts: dict[str, Any] = {
        "unet": model.unet,
        "vae": model.vae,
        "scheduler": DDIMScheduler.from_config(model.scheduler_config),
    }
    for index, (tokenizer, encoder) in enumerate(zip(model.tokenizers, model.text_encoders, strict=True), start=1):
        end = f"_{index}" if index > 1 else ""
        parts |= {f"tokenizer{end}": tokenizer, f"text_encoder{end}": encoder}
    if model.kind == "sdxl":
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
