"""SVDiff: a concept as shifts of singular values.

Paper: Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning", ICCV 2023, arXiv 2303.11305.

    W = U diag(σ) Vᵀ                                       (eq. 1)
    W_δ = U diag(ReLU(σ + s δ)) Vᵀ                         (eq. 2; s = `strength`, 1 while training)
    σ + δ₁ + δ₂,  σ + α δ₁ + (1 - α) δ₂  inside the ReLU   (eq. 4 and 5: stacked concepts, each with its own strength)

Only δ trains: one vector a layer, 0.9 MB for the UNet of SD 1.5.

Departures from the paper and from the released code:
- W + U diag(ReLU(σ + s δ) - σ) Vᵀ is applied, the same but exactly W at δ = 0 (the authors add the error of the SVD
  back as well; the released code doesn't).
- The gains of norms: `mode_1d = "scalar"` is the released code (each norm scaled as a whole, one number), "element" the
  paper (w + s δ, one number a channel). Biases never change.
- Training never forms U diag(σ + δ) Vᵀ where a cheaper form exists (`pipelines.changes`), and generation folds the
  change in once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines import spectral
from pipelines.changes import Change, Elements, Spectral
from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.methods import Stage
from pipelines.params import TrainParams
from pipelines.tokens import Expansion, placeholder
from pipelines.weights import ChangeSet, changed, weights_of

if TYPE_CHECKING:
    from pipelines.data import Batch
    from pipelines.model import Model

name = "svdiff"
title = "SVDiff"
paper = "https://arxiv.org/abs/2303.11305"

KEY = ".delta"  # after a layer's path, as published
Layers = Literal["all", "ca", "ca-kv", "1d", "2d", "4d", "up", "down", "mid", "up-ca", "down-ca", "mid-ca"]


class Params(TrainParams):
    """The published settings."""

    lr_1d: float = Field(1e-6, gt=0, le=1, description="Learning rate of the norms' gains")
    prior_weight: float = Field(1.0, ge=0, le=10, description="Prior preservation weight (0 = off)")
    mode_1d: Literal["scalar", "element"] = Field(
        "scalar", description="Norms: one number each (released code) or one per channel (paper)"
    )
    layers: Layers = Field("all", description="Layers of the UNet that learn (ca = cross-attention)")
    train_text_encoder: bool = Field(True, description="Let the text encoder learn too")
    rare_word: str = Field(
        "sks", max_length=100, description="Word before the noun that stands for the subject; one each for several"
    )


def stages(params: Params) -> Sequence[Stage]:
    """One stage."""
    return [Stage("shifts", params.steps, params.batch_size, params.weight_decay, params.max_grad_norm)]


class SvdiffAdapter:
    """Spectral shifts on a model."""

    def __init__(self, group: ChangeSet, params: Params) -> None:
        self.group = group
        self.params = params

    @property
    def strength(self) -> float:
        """s of eq. 2."""
        return self.group.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.group.strength = value

    def shifts(self) -> dict[str, nn.Parameter]:
        """δ by layer, as saved: "unet.conv_in.delta": (rank,)."""
        return {name + KEY: change.parameters()[0] for name, change in self.group.changes.items()}

    def param_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """Matrices and kernels at `lr`, the gains of norms at `lr_1d`."""
        modules = weights_of(self.group.model)
        groups: dict[float, list[nn.Parameter]] = {self.params.lr: [], self.params.lr_1d: []}
        for name, change in self.group.changes.items():
            rate = self.params.lr_1d if _dimensions(modules[name]) == 1 else self.params.lr
            groups[rate].extend(change.parameters())
        return [{"params": shifts, "lr": rate} for rate, shifts in groups.items() if shifts]

    def tensors(self) -> dict[str, Tensor]:
        return {name: shift.detach().to("cpu", torch.float32, copy=True) for name, shift in self.shifts().items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Layers that `tensors` leaves out get no change."""
        shifts = self.shifts()
        for name, values in tensors.items():
            _check(name, values, shifts)
        for name, shift in shifts.items():
            if name in tensors:
                shift.copy_(tensors[name])
            else:
                shift.zero_()
        self.group.refresh()

    def bake(self) -> None:
        self.group.bake()


def _check(name: str, values: Tensor, shifts: dict[str, nn.Parameter]) -> None:
    layer = name.removesuffix(KEY)
    if name not in shifts:
        raise StudioError(f"This concept changes the layer '{layer}', which this base lacks. Load the base it is for.")
    if values.shape != shifts[name].shape:
        raise StudioError(
            f"This concept doesn't fit this base: for the layer '{layer}' it brings {_numbers(values)}, "
            f"the base needs {_numbers(shifts[name])}. Load the base it was trained on."
        )
    if not values.isfinite().all():
        raise StudioError(f"This concept is broken: not all its values for '{layer}' are numbers. Train it again.")


def _numbers(tensor: Tensor) -> str:
    return " x ".join(str(side) for side in tensor.shape) + (" numbers" if tensor.numel() != 1 else " number")


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[SvdiffAdapter]:
    """Shifts of zero on the chosen layers, and each subject's token meaning "<rare word> <noun>"."""
    words = _rare_words(params, subjects)
    changes = {name: _no_change(module, params) for name, module in chosen(model, params).items()}
    with ExitStack() as stack:
        adapter = SvdiffAdapter(stack.enter_context(changed(model, changes)), params)
        for subject, word in zip(subjects, words, strict=True):
            meaning = Expansion(f"{word} {subject.noun}".strip(), subject.noun, strength=lambda: adapter.strength)
            stack.enter_context(placeholder(model, subject.token, meaning))
        yield adapter


def loss(model: Model, adapter: SvdiffAdapter, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """Denoising, with prior preservation and masks as the batch brings them."""
    from pipelines.losses import denoising_loss

    return denoising_loss(model, adapter, batch, adapter.params)


def chosen(model: Model, params: Params) -> dict[str, nn.Module]:
    """The layers that learn, by their names in `weights_of` (the paper's subsets, table in its section 4.4)."""
    wanted = _members(model.unet, params.layers)
    return {
        name: module
        for name, module in weights_of(model).items()
        if (module in wanted if name.startswith("unet.") else params.train_text_encoder)
    }


def _members(unet: nn.Module, layers: str) -> set[nn.Module]:
    """The UNet's modules in a subset; found by what they are, not by what they are called."""
    members = {module for module in unet.modules() if module._parameters.get("weight") is not None}
    place, _, kind = layers.rpartition("-") if layers.endswith("-ca") else (layers, "", "")
    blocks = {"up": "up_blocks", "down": "down_blocks", "mid": "mid_block"}
    if place in blocks:
        members &= set(getattr(unet, blocks[place]).modules())
    if layers in ("1d", "2d", "4d"):
        members = {module for module in members if _dimensions(module) == int(layers[0])}
    if "ca" in (place, kind) or layers == "ca-kv":
        attentions = [module for module in unet.modules() if getattr(module, "is_cross_attention", False)]
        members &= {part for attention in attentions for part in attention.modules()}
        if layers == "ca-kv":
            members &= {part for attention in attentions for part in (attention.to_k, attention.to_v)}
    return members


def _dimensions(module: nn.Module) -> int:
    return module._parameters["weight"].ndim  # type: ignore[union-attr]


def _no_change(module: nn.Module, params: Params) -> Change:
    weight = module._parameters["weight"]
    assert weight is not None  # noqa: S101 - `chosen` takes no other
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.ndim == 1 and params.mode_1d == "element":
        return Elements(nn.Parameter(torch.zeros_like(weight, dtype=dtype)))
    return Spectral(nn.Parameter(torch.zeros(spectral.rank(weight), dtype=dtype, device=weight.device)))


def _rare_words(params: Params, subjects: Sequence[Subject]) -> list[str]:
    words = params.rare_word.split()
    if words and len(words) < len(subjects):
        raise StudioError(
            f"{len(subjects)} subjects need {len(subjects)} rare words to tell them apart, and 'rare_word' has only "
            f"'{params.rare_word}'. Write one for each, with spaces between."
        )
    return words[: len(subjects)] if words else [""] * len(subjects)
