"""What concepts make of a model's layers, noted down so that it can be put on and off without them.

Whatever a method does to attach itself, what is left after `bake` are other values of parameters and forward hooks
(that add to a bias, for example). Both are found by comparing the model before and after: no method is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.attach import attached
from pipelines.text import run_encoders

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.model import Model


@dataclass(frozen=True, eq=False)
class Made:
    """One layer: parameters that differ from the base's, and hooks beside the base's."""

    values: dict[str, Tensor] = field(default_factory=dict)
    hooks: dict[int, Callable[..., Any]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal where two layers surely give the same."""
        return tuple((name, value.data_ptr()) for name, value in self.values.items()), tuple(self.hooks)


Variant = dict[nn.Module, Made]  # only layers that differ
NOTHING = Made()


def layers_of(model: Model) -> dict[nn.Module, Made]:
    """Every layer of the UNet and the text encoders as it is now."""
    with torch.no_grad():
        run_encoders(model.tokenizers, model.text_encoders, [""])  # libraries put hooks of their own on when first used
    modules = (module for part in (model.unet, *model.text_encoders) for module in part.modules())
    return {module: _now(module) for module in modules}


def difference(base: Mapping[nn.Module, Made]) -> Variant:
    """What has been made of the layers in `base` since."""
    return {module: made for module, old in base.items() if (made := _difference(old, _now(module)))}


def variant(model: Model, base: Mapping[nn.Module, Made], concepts: Sequence[tuple[Trained, float]]) -> Variant:
    """What `concepts`, attached together, make of the layers in `base`; they are off again afterwards."""
    if not concepts:
        return {}
    with attached(model, concepts):
        return difference(base)


@contextmanager
def worn(base: Mapping[nn.Module, Made], old: Variant, new: Variant, modules: Iterable[nn.Module]) -> Iterator[None]:
    """`modules` with `new` on instead of `old`; afterwards as they were found. Hooks of others stay throughout."""
    found = {module: _now(module).values for module in modules}
    try:
        for module in found:
            _put(module, base[module].values | new.get(module, NOTHING).values)
            _swap(module, old.get(module, NOTHING), new.get(module, NOTHING))
        yield
    finally:
        for module, values in found.items():
            _put(module, values)
            _swap(module, new.get(module, NOTHING), old.get(module, NOTHING))


def _now(module: nn.Module) -> Made:
    values = {name: value.data for name, value in module._parameters.items() if value is not None}
    return Made(values, dict(module._forward_hooks))


def _difference(old: Made, new: Made) -> Made | None:
    values = {name: value for name, value in new.values.items() if not _same(value, old.values[name])}
    hooks = {number: hook for number, hook in new.hooks.items() if number not in old.hooks}
    return Made(values, hooks) if values or hooks else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype


def _put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameter = module._parameters[name]
        assert parameter is not None
        parameter.data = value


def _swap(module: nn.Module, old: Made, new: Made) -> None:
    for number in old.hooks:
        module._forward_hooks.pop(number, None)
    module._forward_hooks.update(new.hooks)
