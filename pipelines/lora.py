"""Low-rank changes of a model (LoRA, Hu et al. 2021, arXiv:2106.09685), for every method that wants them.

    W + strength * (alpha / rank) * up . down        (eq. 3; `down` starts random, `up` at zero)

Names and shapes are those of peft: "unet.<path>.lora_A.weight" is `down`, (rank, in) or (rank, in, h, w) for a
convolution, and "unet.<path>.lora_B.weight" is `up`, (out, rank) or (out, rank, 1, 1). The layers themselves are not
replaced as peft does it: they are changed through `pipelines.weights`, so that concepts of other methods stand on the
same layers, come and go in any order, and leave the very same weights behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from pipelines.changes import LowRank
from pipelines.errors import StudioError
from pipelines.noise import generator
from pipelines.switched import SwitchedChanges
from pipelines.weights import weights_of

if TYPE_CHECKING:
    from pipelines.model import Model

Targets = Literal["attention", "all-linear", "all"]

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_UNET = "unet."


@contextmanager
def lora(
    model: Model,
    *,
    rank: int,
    alpha: float,
    targets: Targets = "attention",
    text_encoder: bool = False,
    on: bool = True,
) -> Iterator[Lora]:
    """A low-rank change of zero on the chosen layers, on while the context is open; exactly the base afterwards.

    `targets`: "attention" = the projections of self- and cross-attention, "all-linear" = every linear layer, "all" =
    convolutions too. With `text_encoder` the text encoders' own attention learns as well. With `on` off
    nothing is changed, and nothing costs time, until `switch_on` or `load`. StudioError for a rank below 1.
    """
    if rank < 1:
        raise StudioError(f"A rank of {rank} can't learn anything. Choose 1 or more.")
    layers = lora_layers(model, targets, text_encoder)
    changes = {name: _no_change(name, module, rank, alpha / rank) for name, module in layers.items()}
    with ExitStack() as stack:
        adapter = Lora(model, changes, stack)
        if on:
            adapter.switch_on()
        yield adapter


class Lora:
    """One low-rank change of a model: what trains, and what is saved."""

    def __init__(self, model: Model, changes: dict[str, LowRank], stack: ExitStack) -> None:
        self.changes = changes
        self._model = model
        self._switched = SwitchedChanges(model, changes, stack)

    @property
    def strength(self) -> float:
        """0 is the base, bit for bit."""
        return self._switched.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._switched.strength = value

    def switch_on(self) -> None:
        """Let the change take part from now on. More than once is as good as once."""
        self._switched.switch_on()

    def parameters(self) -> list[nn.Parameter]:
        """What trains in the UNet, fp32, always in the same order."""
        return [p for name, change in self.changes.items() if name.startswith(_UNET) for p in change.parameters()]

    def text_parameters(self) -> list[nn.Parameter]:
        """What trains in the text encoders; [] without `text_encoder`."""
        return [p for name, change in self.changes.items() if not name.startswith(_UNET) for p in change.parameters()]

    def tensors(self) -> dict[str, Tensor]:
        """Detached CPU copies in fp32, by peft's names; {} while it waits and was never trained."""
        if self._switched.group is None and not any(change.up.any() for change in self.changes.values()):
            return {}
        modules = weights_of(self._model)
        found: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            for key, shape, part in zip(_keys(name), _shapes(modules[name], change), change.parameters(), strict=True):
                found[key] = part.detach().to("cpu", torch.float32, copy=True).reshape(shape)
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`. Layers that are left out get no change.

        StudioError, with nothing changed, when a layer is not there, is named by half, or has another shape.
        """
        modules, wanted = weights_of(self._model), dict(tensors)
        for name, change in self.changes.items():
            for key, shape in zip(_keys(name), _shapes(modules[name], change), strict=True):
                values = wanted.pop(key, None)
                if (values is None) != (_keys(name)[0] not in tensors):
                    raise StudioError(f"This concept is broken: '{name}' lacks one of its two factors. Train it again.")
                if values is not None:
                    _check(name, values, shape)
        if wanted:
            layer = next(iter(wanted)).removesuffix(DOWN).removesuffix(UP)
            raise StudioError(
                f"This concept changes the layer '{layer}', which this base lacks or these settings leave out. "
                "Load the base it is for."
            )
        for name, change in self.changes.items():
            down, up = (tensors.get(key) for key in _keys(name))
            if down is None or up is None:
                change.up.zero_()
                continue
            change.down.copy_(down.reshape(change.down.shape))
            change.up.copy_(up.reshape(change.up.shape))
        if tensors:
            self.switch_on()
        self._switched.refresh()

    def bake(self) -> None:
        """Fold the change into the weights, for generation."""
        self._switched.bake()


def lora_layers(model: Model, targets: Targets, text_encoder: bool) -> dict[str, nn.Module]:
    """The layers that learn, by their names in `weights_of`; found by what they are, not by what they are called."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if targets == "all" else (nn.Linear,)
    wanted = {module for module in model.unet.modules() if isinstance(module, kinds)}
    if targets == "attention":
        attentions = [module for module in model.unet.modules() if hasattr(module, "is_cross_attention")]
        wanted = {layer for one in attentions for layer in (one.to_q, one.to_k, one.to_v, one.to_out[0])}
    for encoder in model.text_encoders if text_encoder else ():
        attentions = [module for module in encoder.modules() if hasattr(module, "k_proj")]
        wanted |= {layer for one in attentions for layer in one.modules() if isinstance(layer, nn.Linear)}
    return {name: module for name, module in weights_of(model).items() if module in wanted}


def _no_change(name: str, module: nn.Module, rank: int, scale: float) -> LowRank:
    """`down` normal with deviation 1 / rank, as in the diffusers scripts; `up` zero.

    Drawn from the seed that training has set and the layer's name, without using the global generator up.
    """
    weight = cast(nn.Parameter, module._parameters["weight"])
    rows, columns = len(weight), weight[0].numel()
    down = torch.randn(rank, columns, generator=generator("lora", torch.initial_seed(), name)) / rank
    dtype = torch.promote_types(weight.dtype, torch.float32)
    up = torch.zeros(rows, rank, dtype=dtype, device=weight.device)
    return LowRank(nn.Parameter(down.to(weight.device, dtype)), nn.Parameter(up), scale)


def _keys(name: str) -> tuple[str, str]:
    return name + DOWN, name + UP


def _shapes(module: nn.Module, change: LowRank) -> tuple[list[int], list[int]]:
    """The shapes of `down` and `up` in a file."""
    weight = cast(nn.Parameter, module._parameters["weight"])
    rank = change.down.shape[0]
    return [rank, *weight.shape[1:]], [weight.shape[0], rank, *[1] * (weight.ndim - 2)]


def _check(name: str, values: Tensor, shape: list[int]) -> None:
    if list(values.shape) != shape:
        brought, needed = (" x ".join(map(str, sides)) for sides in (values.shape, shape))
        raise StudioError(
            f"This concept doesn't fit this base: for the layer '{name}' it brings {brought} numbers, {needed} are "
            "needed. Load the base it was trained on."
        )
    if not values.isfinite().all():
        raise StudioError(f"This concept is broken: not all its values for '{name}' are numbers. Train it again.")
