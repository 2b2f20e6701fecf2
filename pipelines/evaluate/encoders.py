"""What pictures and texts are compared with: any CLIP, and a DINO where one is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError

if TYPE_CHECKING:
    from pipelines.events import Picture

Features = NDArray[np.float32]  # (pictures or texts, width), rows of unit length

TOYBOX_CLIP = Path(__file__).parents[2] / "assets" / "toybox" / "clip"
_TOGETHER = 32


@dataclass
class Clip:
    """A `CLIPModel` of transformers by Hub id or folder; "toybox" is the embedded one.

    The published figures are OpenAI's ViT-B/32 (openai/clip-vit-base-patch32).
    """

    where: str = "toybox"
    device: str = "cpu"
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.name = "Toybox's CLIP" if self.where == "toybox" else self.where

    def load(self) -> None:
        """Now rather than with the first picture. StudioError when there is no such model."""
        _ = self._parts

    def pictures(self, pictures: Sequence[Picture]) -> Features:
        """Image embeddings, (pictures, width)."""
        import torch

        processor, _, model = self._parts
        rows = []
        for batch in _batches(pictures):
            pixels = processor(images=[np.array(one) for one in batch], return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                seen = model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
                rows.append(model.visual_projection(seen).float().cpu().numpy())
        return unit(np.concatenate(rows))

    def texts(self, texts: Sequence[str]) -> Features:
        """Text embeddings, (texts, width). Texts that are too long are cut, as CLIP does."""
        import torch

        _, tokenizer, model = self._parts
        length = model.config.text_config.max_position_embeddings
        read = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            said = model.text_model(**read.to(self.device)).pooler_output
            return unit(model.text_projection(said).float().cpu().numpy())

    @property
    def blank(self) -> tuple[int, int, int]:
        """The colour that is nothing to it: zero after its normalisation."""
        return _blank(self._parts[0])

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        import torch
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        where = str(TOYBOX_CLIP) if self.where == "toybox" else self.where
        model = loaded(CLIPModel, where, dtype=torch.float32, use_safetensors=True).to(self.device).eval()
        return loaded(CLIPImageProcessor, where), loaded(AutoTokenizer, where), model


@dataclass
class DinoClass:
    """A DINO or DINOv2 by Hub id or folder: its class token, as DreamBooth's DINO score takes it (there ViT-S/16)."""

    where: str
    device: str = "cpu"
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.name = self.where

    def load(self) -> None:
        """Now rather than with the first picture. StudioError when there is no such model."""
        try:
            self.pictures([np.zeros((32, 32, 3), np.uint8)])
        except (ValueError, TypeError, AttributeError) as error:  # a CLIP, say, which wants a text as well
            raise StudioError(
                f"'{self.where}' is no DINO: it can't look at a picture alone. Give facebook/dinov2-base, say."
            ) from error

    def pictures(self, pictures: Sequence[Picture]) -> Features:
        """(pictures, width)."""
        import torch

        processor, model = self._parts
        rows = []
        for batch in _batches(pictures):
            inputs = processor(images=[np.array(one) for one in batch], return_tensors="pt").to(self.device)
            with torch.no_grad():
                rows.append(model(**inputs).last_hidden_state[:, 0].float().cpu().numpy())
        return unit(np.concatenate(rows))

    @property
    def blank(self) -> tuple[int, int, int]:
        return _blank(self._parts[0])

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        model = loaded(AutoModel, self.where, dtype=torch.float32, use_safetensors=True).to(self.device).eval()
        return loaded(AutoImageProcessor, self.where), model


def loaded_looks(kind: str, clip: str, dino: str, device: str) -> tuple[Clip, DinoClass | None]:
    """A CLIP ("" = Toybox's own, on a base of that `kind`) and a DINO ("" = none), loaded before anything is painted.

    StudioError for models that can't be, and where Toybox's CLIP would look at another world.
    """
    if not clip and kind != "toybox":
        raise StudioError(
            "Toybox's CLIP knows only its own world. Name one for photos, such as openai/clip-vit-base-patch32, or a "
            "folder."
        )
    looks = Clip(clip or "toybox", device), DinoClass(dino, device) if dino else None
    for look in looks:
        if look is not None:
            look.load()
    return looks


def unit(rows: NDArray[Any]) -> Features:
    """Rows of length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(length, 1e-12), np.float32)


def loaded(kind: Any, where: str, **options: Any) -> Any:
    """`kind.from_pretrained`; StudioError when there is no such model, or its weights are of another kind."""
    from transformers import PreTrainedModel

    try:
        if not issubclass(kind, PreTrainedModel):
            return kind.from_pretrained(where, **options)
        model, told = kind.from_pretrained(where, output_loading_info=True, **options)
        if told["missing_keys"]:  # transformers would fill them with random numbers
            some = ", ".join(sorted(told["missing_keys"])[:3])
            raise ValueError(f"it has no {some}")
        return model
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise StudioError(
            f"'{where}' can't be loaded: {reason}. Give a Hub id or a folder with a model of that kind."
        ) from error


def _blank(processor: Any) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(value)) for value in processor.image_mean)
    return red, green, blue


def _batches(pictures: Sequence[Picture]) -> list[Sequence[Picture]]:
    return [pictures[first : first + _TOGETHER] for first in range(0, len(pictures), _TOGETHER)]
