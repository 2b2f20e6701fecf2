"""Model: the parts of a latent diffusion base, and the text states its UNet is conditioned on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.errors import StudioError
from pipelines.fingerprint import fingerprint
from pipelines.text import TextStates, Tokenized, covered, run_encoders, text_length, tokenize
from pipelines.tokens import expand

if TYPE_CHECKING:
    from pipelines.events import Event
    from pipelines.tokens import Expansion

__all__ = ["Model", "TextStates", "Tokenized", "from_pipeline", "load_model", "noise_scheduler"]

CACHED_TEXTS = 256


@dataclass(eq=False)
class Model:
    """A base model. `kind` is "sd1", "sd2", "sdxl" or "toybox"; the parts are diffusers' and transformers' own."""

    id: str
    kind: str
    fingerprint: str
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]
    zero_negative: bool = False  # SDXL: no negative prompt means states of zero, not those of ""
    placeholders: dict[str, Expansion] = field(default_factory=dict)  # "<name>" -> its meaning, see tokens.py
    text_version: int = 0  # raised by whoever changes the text side
    cache_text: bool = True
    _texts: OrderedDict[tuple[int, str], tuple[Tensor, Tensor | None]] = field(default_factory=OrderedDict, repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def scale_factor(self) -> int:
        """Pixels on the side of one latent cell."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def native_size(self) -> int:
        """The side in pixels that the base was trained on."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else max(size)) * self.scale_factor

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of latent cells; StudioError with the nearest sizes when pixels don't divide."""
        cell, largest = self.scale_factor, 8 * self.native_size
        nearest = [min(largest, max(2 * cell, round(side / cell) * cell)) for side in (width, height)]
        if nearest != [width, height]:
            raise StudioError(
                f"This base can't make {width} x {height} pictures: sides are multiples of {cell} "
                f"from {2 * cell} to {largest} pixels. The nearest size is {nearest[0]} x {nearest[1]}."
            )
        return height // cell, width // cell

    def tokenize(self, prompt: str) -> Tokenized:
        """The prompt as the first encoder reads it, with active placeholders expanded."""
        length = text_length(self.tokenizers[0], self.text_encoders[0])
        text, spans = expand(prompt, self.placeholders)
        return tokenize(self.tokenizers[0], text, length, spans)

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Text states as diffusers' own pipelines make them: (rows, tokens, width), and SDXL's pooled text.

        Placeholders are expanded first, and the rows they bring are added to their nouns' states at the end. Frozen
        encoders are asked once per text; while one of them learns, all prompts go through it together, but only for
        gradients: without them a text is encoded alone, so that a sample is what generation gives later.
        """
        read = [self.tokenize(prompt) for prompt in prompts]
        frozen = self.cache_text and not self._text_learns()
        if frozen or not torch.is_grad_enabled():
            rows = [(self._cached if frozen else self._alone)(prompt.text) for prompt in read]
            states = [row[0] for row in rows]
            pooled = torch.stack([row[1] for row in rows if row[1] is not None]) if rows[0][1] is not None else None
        else:
            together, pooled = run_encoders(self.tokenizers, self.text_encoders, [prompt.text for prompt in read])
            states = list(together)
        states = [shifted(row, prompt) for row, prompt in zip(states, read, strict=True)]
        return TextStates(torch.stack(states), pooled, tuple(read))

    def conditioning(
        self,
        text: TextStates,
        original_size: Sequence[tuple[int, int]],
        crop: Sequence[tuple[int, int]],
        target_size: Sequence[tuple[int, int]],
    ) -> dict[str, Any]:
        """Keyword arguments for the UNet beside the states: empty for SD 1 and 2.

        SDXL (Podell et al. 2023, section 2.2) also sees the pooled text and six numbers a row: original size, top left
        of the crop and target size, each as (height, width) in pixels; one entry per row, or one for all rows.
        """
        if text.pooled is None:
            return {}
        rows = len(text.states)
        sizes = [list(pairs) * (rows if len(pairs) == 1 else 1) for pairs in (original_size, crop, target_size)]
        numbers = [[*original, *corner, *target] for original, corner, target in zip(*sizes, strict=True)]
        ids = torch.tensor(numbers, dtype=text.states.dtype, device=text.states.device)
        return {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": ids}}

    def _text_learns(self) -> bool:
        return any(weight.requires_grad for encoder in self.text_encoders for weight in encoder.parameters())

    def _cached(self, text: str) -> tuple[Tensor, Tensor | None]:
        """What `_alone` gives, once per text and state of the text side."""
        key = (self.text_version, text)
        if key not in self._texts:
            self._texts[key] = self._alone(text)
            while len(self._texts) > CACHED_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    @torch.no_grad()
    def _alone(self, text: str) -> tuple[Tensor, Tensor | None]:
        """One text's states (tokens, width) and pooled text; encoded alone, so it never depends on its neighbours."""
        states, pooled = run_encoders(self.tokenizers, self.text_encoders, [text])
        return states[0], None if pooled is None else pooled[0]


def shifted(states: Tensor, prompt: Tokenized) -> Tensor:
    """One prompt's states (tokens, width) with each placeholder's rows added at its noun's tokens (Cones 2, section 3).

    The very same tensor where nothing is to be added, else a new one whose other rows are bit-identical. Rows whose
    token was cut from a long prompt fall away. StudioError when rows were made for another width or another number of
    tokens than the noun has in this base.
    """
    changed = states
    for span in prompt.spans:
        rows = span.expansion.rows
        if rows is None or callable(rows):  # `Expansion.now` has called it; none at strength 0
            continue
        where = covered(prompt, *span.noun)
        if rows.shape[-1] != states.shape[-1]:
            raise StudioError(
                f"{span.token} was made for text states {rows.shape[-1]} wide, those of this base have "
                f"{states.shape[-1]}. Choose the base it was trained on."
            )
        if len(where) > len(rows) or (len(where) < len(rows) and not prompt.truncated):
            noun = prompt.text[slice(*span.noun)]
            raise StudioError(
                f"{span.token} changes {len(rows)} token(s), but '{noun}' has {len(where)} in this base. "
                "Give the concept the noun it was trained with."
            )
        changed = changed.clone() if changed is states else changed
        changed[where] += (span.expansion.strength() * rows[: len(where)]).to(changed)
    return changed


def from_pipeline(pipeline: Any, id: str) -> Model:
    """A Model that shares the parts of a loaded diffusers pipeline (SD 1.x, SD 2.x or SDXL)."""
    names = ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",)
    parts = {
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "text_encoders": tuple(getattr(pipeline, f"text_encoder{name}") for name in names),
        "tokenizers": tuple(getattr(pipeline, f"tokenizer{name}") for name in names),
        "scheduler": dict(pipeline.scheduler.config),
    }
    return from_parts(id, parts, bool(pipeline.config.get("force_zeros_for_empty_prompt", False)))


def from_parts(id: str, parts: dict[str, Any], zero_negative: bool = False) -> Model:
    """A frozen Model of "unet", "vae", "text_encoders", "tokenizers" and the configuration of its "scheduler"."""
    encoders = parts["text_encoders"]
    for module in (parts["unet"], parts["vae"], *encoders):
        module.requires_grad_(False).eval()
    return Model(
        id=id,
        kind=kind_of(parts["unet"], len(encoders)),
        fingerprint=fingerprint((parts["unet"], *encoders)),
        tokenizers=parts["tokenizers"],
        text_encoders=encoders,
        unet=parts["unet"],
        vae=parts["vae"],
        scheduler_config=parts["scheduler"],
        zero_negative=zero_negative,
    )


def kind_of(unet: Any, encoders: int) -> str:
    """Which family a UNet belongs to: SD 2 projects by Linear where SD 1 has a 1x1 Conv."""
    if encoders == 2:
        return "sdxl"
    return "sd2" if unet.config.use_linear_projection else "sd1"


def noise_scheduler(model: Model) -> Any:
    """The training schedule of the base as a DDPMScheduler, alphas_cumprod in fp32 on the model's device."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler.from_config(model.scheduler_config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(model.device, torch.float32)
    return scheduler


def load_model(
    where: str | Path = "toybox",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Model:
    """A base model, frozen and ready: the embedded Toybox, SD 1.x, SD 2.x or SDXL.

    `where` is "toybox", a Hub id ("owner/name"), a diffusers folder, or a single .safetensors file; a file also needs
    the small configuration files of its family: `config` names a diffusers folder or Hub id, else they are fetched.
    Without `device` and `dtype` sensible ones are chosen, see `loading.choose`. `progress` is called with Progress
    (megabytes) during a download, and with a Note when something else than asked was taken. Only safetensors are read
    and no code from a model is ever run. StudioError for anything that is not such a base.
    """
    from pipelines.loading import load  # brings diffusers and transformers in

    return load(str(where), Wish(device, dtype, None if config is None else str(config)), progress or _silent)


@dataclass(frozen=True)
class Wish:
    """What the caller of `load_model` decided; None leaves the choice to us."""

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    config: str | None = None


def _silent(event: Event) -> None:
    """Nobody watches."""
