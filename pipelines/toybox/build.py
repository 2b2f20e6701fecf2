"""Builds every Toybox model from nothing, from the scenes to the segmenter. Goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from pipelines.events import Event, Finished, Note, Progress
from pipelines.toybox import base, clip, judge_training, segmenter, vae
from pipelines.toybox.dataset import Scenes
from pipelines.toybox.fitting import Plan
from pipelines.toybox.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

ASSETS = Path(__file__).parents[2] / "assets" / "toybox"
STATE = Path("build")


@dataclass(frozen=True)
class Recipe:
    """How much of everything."""

    scenes: int = 60_000
    vae: Plan = vae.PLAN
    clip_vision: Plan = clip.SHARPEN  # before the field below takes the module's name
    clip: Plan = clip.PLAN
    base: Plan = base.PLAN
    judge: Plan = judge_training.PLAN
    segmenter: Plan = segmenter.PLAN


QUICK = Recipe(
    scenes=300,
    vae=replace(vae.PLAN, steps=30, warmup=5, batch=4),
    clip=replace(clip.PLAN, steps=30, warmup=5, batch=24),
    clip_vision=replace(clip.SHARPEN, steps=30, warmup=5, batch=24),
    base=replace(base.PLAN, steps=30, warmup=5, batch=8),
    judge=replace(judge_training.PLAN, steps=10, warmup=5, batch=8),
    segmenter=replace(segmenter.PLAN, steps=10, warmup=5, batch=4),
)


class Works:
    """The folder in which a build goes on: `state` holds checkpoints, `out` what is shipped."""

    def __init__(self, state: Path, out: Path, recipe: Recipe) -> None:
        self.state, self.out, self.recipe = state, out, recipe
        state.mkdir(parents=True, exist_ok=True)

    def run(self) -> Iterator[Event]:
        """Everything in order; each part starts from the averaged weights of those before it."""
        recipe, models = self.recipe, self.state / "state"
        scenes = Scenes(self.state / "scenes", recipe.scenes)
        for count in scenes.draw():
            yield Progress("scenes", count, recipe.scenes)
        tokenizer = build_tokenizer(self.state / "tokenizer")
        yield from vae.train_vae(scenes, models, recipe.vae)
        yield from clip.train_clip(tokenizer, scenes, models, recipe.clip)
        yield from clip.sharpen_clip(tokenizer, scenes, models, (recipe.clip, recipe.clip_vision))
        latents = self.state / "latents.npy"
        if not latents.exists():
            yield from base.encode_latents(vae.trained_vae(models, recipe.vae), scenes, latents)
        yield from base.train_base(self.painter(scenes, tokenizer), models, recipe.base)
        yield from judge_training.train_judge(scenes, vae.trained_vae(models, recipe.vae), models, recipe.judge)
        yield from segmenter.train_segmenter(models, recipe.segmenter)
        yield Note(f"Writing the models to {self.out}.")
        self.export(tokenizer)

    def painter(self, scenes: Scenes, tokenizer: CLIPTokenizer) -> base.Painter:
        """The base model ready to train."""
        whole = clip.read_clip(tokenizer, self.state / "state", self.recipe.clip)
        return base.Painter(scenes, self.state / "latents.npy", text_encoder(whole), tokenizer)

    def export(self, tokenizer: CLIPTokenizer) -> None:
        """Writes what is trained so far as fp16 safetensors, each folder replaced whole."""
        models, recipe = self.state / "state", self.recipe
        whole = clip.trained_clip(tokenizer, models, (recipe.clip, recipe.clip_vision))
        self._publish("clip", lambda folder: _save_clip(whole, tokenizer, folder))
        if (models / f"{recipe.base.name}.safetensors").exists():
            self._publish("base", lambda folder: self._save_base(whole, tokenizer, folder))
        if (models / f"{recipe.judge.name}.safetensors").exists():
            self._save("judge", judge_training.trained_judge(models, recipe.judge))
        if (models / f"{recipe.segmenter.name}.safetensors").exists():
            self._save("segmenter", segmenter.trained_segmenter(models, recipe.segmenter))

    def _save(self, name: str, model: Any) -> None:
        state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
        save_file(state, self.out / f"{name}.safetensors", metadata={"format": "pt"})

    def _publish(self, name: str, write: Any) -> None:
        fresh, place = self.out / f".{name}", self.out / name
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(fresh, place)

    def _save_base(self, whole: Any, tokenizer: CLIPTokenizer, folder: Path) -> None:
        import numpy as np

        models, recipe = self.state / "state", self.recipe
        autoencoder = vae.trained_vae(models, recipe.vae)
        head = np.load(self.state / "latents.npy", mmap_mode="r")[:2000].astype(np.float32)
        autoencoder.register_to_config(scaling_factor=float(1 / head.std()))
        autoencoder.half().save_pretrained(folder / "vae")
        base.trained_unet(models, recipe.base).half().save_pretrained(folder / "unet")
        text_encoder(whole).half().save_pretrained(folder / "text_encoder")
        _save_tokenizer(tokenizer, folder / "tokenizer")
        base.new_scheduler().save_pretrained(folder / "scheduler")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def text_encoder(whole: Any) -> Any:
    """The text tower of a CLIPModel as the CLIPTextModel that Stable Diffusion uses."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel(whole.config.text_config)
    encoder.load_state_dict(whole.text_model.state_dict())
    return encoder.eval().requires_grad_(False)


def _save_clip(whole: Any, tokenizer: CLIPTokenizer, folder: Path) -> None:
    import copy

    copy.deepcopy(whole).half().save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    # Toybox's pictures go in as they are: scaled to [-1, 1], never cropped.
    shape = {"height": 64, "width": 64}
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": False,
        "do_resize": True,
        "size": shape,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt as well, for readers that know only those."""
    tokenizer.save_pretrained(folder)
    build_tokenizer(folder)


def build(state: Path = STATE, out: Path = ASSETS, recipe: Recipe | None = None) -> Iterator[Event]:
    """Train what is missing and write the models; resumes. Ends with Finished({"folder", "bytes"})."""
    torch.set_grad_enabled(True)
    yield from Works(state, out, recipe or Recipe()).run()
    sizes = {str(file.relative_to(out)): file.stat().st_size for file in sorted(out.rglob("*")) if file.is_file()}
    yield Finished({"folder": out.name, "bytes": sum(sizes.values()), "files": sizes})
