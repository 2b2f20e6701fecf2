"""Whole weights as a change: every weight and bias of a UNet, or of its cross-attention, tuned and put back to the bit.

    W + strength * (W' - W)        W' trains and starts as W

W' is what is saved, under the UNet's own names with "unet." before them ("unet.conv_in.weight", "unet.conv_in.bias";
"text_encoder.<path>.weight" where the text learns), so that a checkpoint of diffusers is read and written as it is.
Weights are changed through `pipelines.weights`, so that other concepts stand on the same layers in any order; a bias
adds its difference to the layer's output, because folding it in would need a second table of who changed what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pipelines.changes import Layer
from pipelines.errors import StudioError
from pipelines.switched import SwitchedChanges
from pipelines.weights import base_weight, weights_of

if TYPE_CHECKING:
    from pipelines.model import Model

Part = Literal["all", "cross-attention", "rest"]
_UNET = "unet."


@dataclass(eq=False)
class Replaced:
    """W + Σ strength·(values - W), for any weight."""

    values: nn.Parameter  # W', shaped like the weight

    def parameters(self) -> list[nn.Parameter]:
        return [self.values]

    @staticmethod
    def dense(layer: Layer, parts: Sequence[tuple[float, Replaced]]) -> Tensor | None:
        if not torch.is_grad_enabled() and not any(strength for strength, _ in parts):
            return None
        base = layer.base.to(parts[0][1].values.dtype)
        return sum((strength * (part.values - base) for strength, part in parts), torch.zeros_like(base))

    @staticmethod
    def live(layer: Layer, parts: Sequence[tuple[float, Replaced]], x: Tensor) -> Tensor | None:
        return None


@contextmanager
def fulltune(model: Model, part: Part = "all", *, text_encoder: bool = False, on: bool = True) -> Iterator[FullTune]:
    """The weights and biases of a part of the UNet as they are, ready to train; exactly the base afterwards.

    "cross-attention" is every parameter inside a cross-attention layer (80 tensors in Stable Diffusion), "rest" all
    others. With `on` off nothing is changed, and nothing costs time, until `switch_on` or `load`.
    """
    with ExitStack() as stack:
        tuned = FullTune(model, tuned_layers(model, part, text_encoder), stack)
        if on:
            tuned.switch_on()
        yield tuned


class FullTune:
    """Whole weights of some layers: what trains, and what is saved."""

    def __init__(self, model: Model, layers: Mapping[str, nn.Module], stack: ExitStack) -> None:
        self._layers = dict(layers)
        self._stack = stack
        self._base = _base_of(layers)
        self._values = {name: nn.Parameter(_master(value)) for name, value in self._base.items()}
        weights = {
            name.removesuffix(".weight"): Replaced(values)
            for name, values in self._values.items()
            if name.endswith(".weight")
        }
        self._switched = SwitchedChanges(model, weights, stack)

    @property
    def strength(self) -> float:
        """0 is the base, bit for bit."""
        return self._switched.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._switched.strength = value

    def parameters(self) -> list[nn.Parameter]:
        """What trains in the UNet, fp32, always in the same order."""
        return [value for name, value in self._values.items() if name.startswith(_UNET)]

    def text_parameters(self) -> list[nn.Parameter]:
        """What trains in the text encoders; [] without `text_encoder`."""
        return [value for name, value in self._values.items() if not name.startswith(_UNET)]

    def switch_on(self) -> None:
        """Let the change take part from now on. More than once is as good as once."""
        if not self._switched.switch_on():
            return
        for name, layer in self._layers.items():
            key = f"{name}.bias"
            if key in self._values:
                hook = _bias_hook(layer, self._base[key], self._values[key], self._switched)
                self._stack.callback(layer.register_forward_hook(hook).remove)

    @torch.no_grad()
    def moved(self) -> bool:
        """Whether anything differs from the base."""
        return any(not torch.equal(values, _master(self._base[name])) for name, values in self._values.items())

    def tensors(self) -> dict[str, Tensor]:
        """Detached CPU copies of W' in fp32; {} while nothing has moved."""
        if not self.moved():
            return {}
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self._values.items()}

    def names(self) -> set[str]:
        """What `tensors` may hold."""
        return set(self._values)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; what is left out is the base's. {} leaves the change off.

        StudioError, with nothing changed, for a name this base lacks or another shape.
        """
        for name, values in tensors.items():
            _check(name, values, self._values)
        for name, own in self._values.items():
            own.copy_(tensors.get(name, self._base[name]))
        if tensors:
            self.switch_on()
        self._switched.refresh()

    def bake(self) -> None:
        """Fold the change into the weights, for generation."""
        self._switched.bake()


def tuned_layers(model: Model, part: Part, text_encoder: bool = False) -> dict[str, nn.Module]:
    """The layers of a part, by their names in `weights_of`; found by what they are."""
    crossing = [module for module in model.unet.modules() if getattr(module, "is_cross_attention", False)]
    inside = {layer for attention in crossing for layer in attention.modules()}
    return {
        name: module
        for name, module in weights_of(model).items()
        if (text_encoder if not name.startswith(_UNET) else part == "all" or (module in inside) == (part != "rest"))
    }


def _base_of(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The base's own weights and biases. A weight that another concept has folded its change into is not the base."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        found[f"{name}.weight"] = base_weight(layer)
        bias = layer._parameters.get("bias")
        if bias is not None:
            found[f"{name}.bias"] = bias.data
    return found


def _master(value: Tensor) -> Tensor:
    """A copy in fp32 (float64 for a float64 base): AdamW's small steps vanish in half precision."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _bias_hook(layer: nn.Module, base: Tensor, values: Tensor, switched: SwitchedChanges) -> Callable[..., Any]:
    """A forward hook that adds strength * (values - base) to the layer's channels."""
    channels_last = not isinstance(layer, nn.GroupNorm | nn.modules.conv._ConvNd)

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not switched.strength:
            return None
        change = switched.strength * (values - base.to(values.dtype))
        shape = [-1] if channels_last else [-1, *[1] * (output.ndim - 2)]
        return output + change.view(shape).to(output.dtype)

    return add


def _check(name: str, values: Tensor, known: Mapping[str, Tensor]) -> None:
    if name not in known:
        raise StudioError(
            f"This concept changes '{name}', which this base lacks or these settings leave out. Load the base it is "
            "for."
        )
    if values.shape != known[name].shape:
        brought, needed = (" x ".join(map(str, sides)) for sides in (values.shape, known[name].shape))
        raise StudioError(
            f"This concept doesn't fit this base: for '{name}' it brings {brought} numbers, {needed} are needed. "
            "Load the base it was trained on."
        )
    if not values.isfinite().all():
        raise StudioError(f"This concept is broken: not all its values for '{name}' are numbers. Train it again.")
