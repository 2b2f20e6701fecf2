"""Weight changes: a layer gives what W + strength·change would give, on and off again, to the bit.

Every changed weight has one `ChangedLayer` with a list of changes, so that stacked concepts come and go in any order.
It is in one of two states:

- *live*, while some change on it trains: the layer's `forward` is replaced on the instance. The base weight stays in
  place, gradients reach the changes alone, and each forward takes the form that costs least (`pipelines.changes`).
  Without gradients (samples while training) it is the folded weight that is used.
- *folded*, when all its adapters are baked: the parameter holds W + change, W is kept aside, and `forward` is the
  class's own. After a change of strength it is folded again at the layer's next use.

The parameter stays the same object throughout; when the last change leaves, it holds W's own memory again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipelines import spectral
from pipelines.changes import Change
from pipelines.errors import StudioError
from pipelines.spectral import Factors
from pipelines.token_table import GrownEmbedding

if TYPE_CHECKING:
    from pipelines.model import Model

_TEXT_WRAPPER = "text_model."  # transformers wraps some text towers in it, depending on class and version


def weights_of(model: Model) -> dict[str, nn.Module]:
    """Every layer of the UNet and the text encoders that has a weight, in order, by "unet.<path>",
    "text_encoder.<path>", "text_encoder_2.<path>". Paths are the same whatever wrapper a library puts around a tower.
    """
    parts = {"unet": model.unet}
    for index, encoder in enumerate(model.text_encoders):
        parts["text_encoder" + (f"_{index + 1}" if index else "")] = encoder
    found: dict[str, nn.Module] = {}
    for part, root in parts.items():
        modules = dict(root.named_modules())
        grown = {f"{path}.base" for path, module in modules.items() if isinstance(module, GrownEmbedding)}
        for path, module in modules.items():
            if isinstance(module._parameters.get("weight"), nn.Parameter):
                plain = path.removesuffix(".base") if path in grown else path
                found[f"{part}.{plain.removeprefix(_TEXT_WRAPPER)}"] = module
    return found


class ChangedLayer:
    """A layer and everything that changes its weight (the `Layer` that kinds of change see)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weight = cast(nn.Parameter, module._parameters["weight"])
        self.base = self.weight.data  # W: never written to
        self.entries: list[tuple[ChangeSet, Change]] = []
        self._found_forward = module.__dict__.get("forward")  # of somebody else, such as an offloading hook
        self._factors: Factors | None = None
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._sample: tuple[Any, Tensor] | None = None

    @property
    def settled(self) -> bool:
        """Whether nothing on it trains."""
        return all(group.baked for group, _ in self.entries)

    def factors(self) -> Factors:
        if self._factors is None:
            with _exact(self.base.device):
                self._factors = spectral.factors_of(self.weight, self.base)
        return self._factors

    def factor(self, name: str, dtype: torch.dtype) -> Tensor:
        factors = self.factors()
        if name == "near" and factors.near.dtype == dtype:
            return factors.near
        if (name, dtype) not in self._kept:
            with _exact(self.base.device):
                side = factors.near if name == "near" else factors.long_side(self.base)
                self._kept[name, dtype] = side.to(dtype)
        return self._kept[name, dtype]

    def plain(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._found_forward is not None:
            return self._found_forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for the module's own while the change is live or has yet to be folded in."""
        if self.settled:
            self.fold()
            return self.plain(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._with(self._sample_weight(), *args, **kwargs)
        self._sample = None
        groups = self._groups()
        if len(groups) == 1 and len(args) == 1 and not kwargs:
            [(kind, parts)] = groups.items()
            output = kind.live(self, parts, args[0])
            if output is not None:
                return output
        return self._with(self._changed(), *args, **kwargs)

    def refresh(self) -> None:
        """Forget what was computed: back to W, and to whatever is on it at the next forward."""
        self._sample = None
        self.weight.data = self.base
        if self.entries:
            self.module.__dict__["forward"] = self.forward
        else:
            self._release()

    def fold(self) -> None:
        """Put W + change into the parameter and the module's own forward back. Nothing is kept but W."""
        with _exact(self.base.device):
            self.weight.data = self._changed()
        self._release()

    def _release(self) -> None:
        self._factors, self._sample = None, None
        self._kept.clear()
        if self._found_forward is not None:
            self.module.__dict__["forward"] = self._found_forward
        else:
            self.module.__dict__.pop("forward", None)

    def _sample_weight(self) -> Tensor:
        """W + change for forwards without gradients, made once until the numbers move."""
        state = [(group.strength, [(id(p), p._version) for p in change.parameters()]) for group, change in self.entries]
        if self._sample is None or self._sample[0] != state:
            with _exact(self.base.device):
                self._sample = (state, self._changed())
        return self._sample[1]

    def _groups(self) -> dict[type[Change], list[tuple[float, Change]]]:
        groups: dict[type[Change], list[tuple[float, Change]]] = {}
        for group, change in self.entries:
            groups.setdefault(type(change), []).append((group.strength, change))
        return groups

    def _changed(self) -> Tensor:
        """W + all changes, summed in fp32 or wider and rounded once; W itself where they are surely zero."""
        changes = [kind.dense(self, parts) for kind, parts in self._groups().items()]
        total = self.base
        for change in changes:
            if change is not None:
                total = total.to(torch.promote_types(total.dtype, torch.float32)) + change
        return total.to(self.base.dtype)

    def _with(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward with another weight. Its place in the dict, and so every order, is kept."""
        self.module._parameters["weight"] = cast(nn.Parameter, weight)
        try:
            return self.plain(*args, **kwargs)
        finally:
            self.module._parameters["weight"] = self.weight


_layers: dict[nn.Module, ChangedLayer] = {}  # every layer that is changed now


def base_weight(module: nn.Module) -> Tensor:
    """A layer's own weight, without any change that is on it now."""
    if module in _layers:
        return _layers[module].base
    return cast(nn.Parameter, module._parameters["weight"]).data


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Full precision and ordinary tensors, whatever the caller is in the middle of."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def usable_strength(value: float) -> float:
    """A concept's strength as a float. StudioError for what is no number."""
    if not math.isfinite(value):
        raise StudioError(f"A strength of {value} has no meaning. Choose a number, 1 for the concept as trained.")
    return float(value)


class ChangeSet:
    """The changes one adapter makes to a model: one strength, on and off together."""

    def __init__(self, model: Model, changes: Mapping[str, Change]) -> None:
        self.model = model
        self.changes = dict(changes)
        self.baked = False
        self._strength = 1.0
        self._layers: list[ChangedLayer] = []

    @property
    def strength(self) -> float:
        """0 is the base model, bit for bit; shifts are multiplied by it inside their ReLU (SVDiff, eq. 2)."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        value = usable_strength(value)
        if value != self._strength:
            self._strength = value
            self.refresh()

    def bake(self) -> None:
        """Fold everything in now, for generation."""
        self.baked = True
        self.refresh()
        for layer in self._layers:
            if layer.settled:
                layer.fold()

    def refresh(self) -> None:
        """To be called after the changes' numbers were replaced."""
        for layer in self._layers:
            layer.refresh()
        self._tell_text()

    def _tell_text(self) -> None:
        if any(not name.startswith("unet.") for name in self.changes):
            _text_changed(self.model)

    def _enter(self) -> None:
        modules = weights_of(self.model)
        for name, change in self.changes.items():
            module = modules[name]
            if module not in _layers:
                _layers[module] = ChangedLayer(module)
            layer = _layers[module]
            layer.entries.append((self, change))
            self._layers.append(layer)
            layer.refresh()
        self._tell_text()

    def _leave(self) -> None:
        for layer in self._layers:
            layer.entries = [entry for entry in layer.entries if entry[0] is not self]
            layer.refresh()
            if not layer.entries:
                del _layers[layer.module]
        self._tell_text()


@contextmanager
def changed(model: Model, changes: Mapping[str, Change]) -> Iterator[ChangeSet]:
    """`changes` (by the names of `weights_of`) on while the context is open; the very same parameters hold the very
    same values afterwards, whatever happened inside and whichever other changes are on.
    """
    group = ChangeSet(model, changes)
    try:
        group._enter()
        yield group
    finally:
        group._leave()


_cached_before: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


def _text_changed(model: Model) -> None:
    """Make cached text states unreachable, and keep the cache off while a change on the text side is live."""
    model.text_version += 1
    modules = (module for encoder in model.text_encoders for module in encoder.modules())
    live = any(module in _layers and not _layers[module].settled for module in modules)
    if live and model not in _cached_before:
        _cached_before[model], model.cache_text = model.cache_text, False
    elif not live and model in _cached_before:
        model.cache_text = _cached_before.pop(model)
