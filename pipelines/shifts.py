"""SVDiff's numbers on a model: which layers have them, what they are called, and how they are saved and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from pipelines import spectral
from pipelines.changes import Change, Elements, Spectral
from pipelines.errors import StudioError
from pipelines.weights import ChangeSet, weights_of

if TYPE_CHECKING:
    from pipelines.methods import Stage
    from pipelines.model import Model

KEY = ".delta"  # after a layer's path, as published


class Settings(Protocol):
    """What is asked of a method's settings here."""

    @property
    def lr(self) -> float: ...

    @property
    def lr_1d(self) -> float: ...

    @property
    def layers(self) -> str: ...

    @property
    def mode_1d(self) -> str: ...

    @property
    def train_text_encoder(self) -> bool: ...


class Shifts:
    """The shifts of one concept on a model: SVDiff's adapter."""

    def __init__(self, group: ChangeSet, params: Settings, tokens: tuple[str, ...] = ()) -> None:
        self.group = group
        self.params = params
        self.tokens = tokens  # of the subjects, where the loss asks for them

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


def chosen(model: Model, params: Settings) -> dict[str, nn.Module]:
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
    return cast(nn.Parameter, module._parameters["weight"]).ndim


def no_change(module: nn.Module, params: Settings) -> Change:
    """A change of a layer whose numbers are all zero, fp32 (float64 for a float64 base)."""
    weight = cast(nn.Parameter, module._parameters["weight"])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.ndim == 1 and params.mode_1d == "element":
        return Elements(nn.Parameter(torch.zeros_like(weight, dtype=dtype)))
    return Spectral(nn.Parameter(torch.zeros(spectral.rank(weight), dtype=dtype, device=weight.device)))
