"""The kinds of change that one weight can take: spectral shifts, values per element, a low-rank product.

Every kind is *base + change*, and the change is exactly zero at zero shifts and at strength 0. Each has two forms:

- `dense`: the change itself, as big as the weight. Folded in once for generation.
- `live`: what a layer gives with the change, without forming it, where that costs fewer operations (training).

Changes of one kind on one weight are handed over together, because spectral shifts of several concepts combine inside
their ReLU (SVDiff, eq. 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import spectral
from pipelines.spectral import Factors


class Layer(Protocol):
    """What a kind of change sees of the layer it changes."""

    module: nn.Module
    base: Tensor  # the weight without any change

    def factors(self) -> Factors: ...

    def factor(self, name: str, dtype: torch.dtype) -> Tensor:
        """ "near", or "far" even where `Factors` does not keep it; kept as long as the layer trains."""
        ...

    def plain(self, x: Tensor) -> Tensor:
        """The layer's output with the base weight."""
        ...


class Change(Protocol):
    """One concept's change of one weight."""

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        ...

    @staticmethod
    def dense(layer: Layer, parts: Sequence[tuple[float, Any]]) -> Tensor | None:
        """The sum of (strength, change) `parts`, shaped like the weight, fp32 or wider; None when surely zero."""
        ...

    @staticmethod
    def live(layer: Layer, parts: Sequence[tuple[float, Any]], x: Tensor) -> Tensor | None:
        """The layer's output with the change; None when `dense` costs less for an input of this size."""
        ...


@dataclass(eq=False)
class Spectral:
    """W + U diag(ReLU(S + Σ strength·shifts) - S) Vᵀ (SVDiff, eq. 2, with the exact base as its fixed point).

    `shifts`: (rank,). For a vector (the gain of a norm) that is one number, which scales it as a whole.
    """

    shifts: nn.Parameter

    def parameters(self) -> list[nn.Parameter]:
        return [self.shifts]

    @staticmethod
    def dense(layer: Layer, parts: Sequence[tuple[float, Spectral]]) -> Tensor | None:
        if not torch.is_grad_enabled() and not any(strength and part.shifts.any() for strength, part in parts):
            return None
        factors = layer.factors()
        near, moved = layer.factor("near", factors.near.dtype), _moved(factors.values, parts)
        if factors.far is None and not torch.is_grad_enabled():  # once only, without `far`: U diag(c/S) Uᵀ W
            turn, matrix = (near * (moved / factors.values)) @ near.T, spectral.as_matrix(layer.base).to(near)
            return (matrix @ turn if factors.tall else turn @ matrix).reshape(layer.base.shape)
        far = layer.factor("far", factors.near.dtype)
        return (far.T @ (near * moved).T if factors.tall else (near * moved) @ far).reshape(layer.base.shape)

    @staticmethod
    def live(layer: Layer, parts: Sequence[tuple[float, Spectral]], x: Tensor) -> Tensor | None:
        form = _cheapest(layer, x)
        return None if form is None else form(layer, _moved(layer.factors().values, parts), x)


@dataclass(eq=False)
class Elements:
    """W + Σ strength·values, one value per element (SVDiff's paper, for the gains of norms)."""

    values: nn.Parameter  # shaped like the weight

    def parameters(self) -> list[nn.Parameter]:
        return [self.values]

    @staticmethod
    def dense(layer: Layer, parts: Sequence[tuple[float, Elements]]) -> Tensor | None:
        if not torch.is_grad_enabled() and not any(strength and part.values.any() for strength, part in parts):
            return None
        return sum((strength * part.values for strength, part in parts), torch.zeros_like(parts[0][1].values))

    @staticmethod
    def live(layer: Layer, parts: Sequence[tuple[float, Elements]], x: Tensor) -> Tensor | None:
        return None


@dataclass(eq=False)
class LowRank:
    """W + Σ strength·scale·(up · down) (LoRA, Hu et al. 2021, eq. 3; `scale` is their α / r).

    `down`: (rank, columns of the weight's matrix), `up`: (rows, rank). Zeros in `up` are no change.
    """

    down: nn.Parameter
    up: nn.Parameter
    scale: float = 1.0

    def parameters(self) -> list[nn.Parameter]:
        return [self.down, self.up]

    @staticmethod
    def dense(layer: Layer, parts: Sequence[tuple[float, LowRank]]) -> Tensor | None:
        if not torch.is_grad_enabled() and not any(strength and part.up.any() for strength, part in parts):
            return None
        change = sum((strength * part.scale * (part.up @ part.down) for strength, part in parts), torch.zeros(()))
        return change.reshape(layer.base.shape)

    @staticmethod
    def live(layer: Layer, parts: Sequence[tuple[float, LowRank]], x: Tensor) -> Tensor | None:
        if not (isinstance(layer.module, nn.Linear) or _plain_conv(layer.module)):
            return None
        y = layer.plain(x)
        for strength, part in parts:
            inner = _inward(layer.module, x, part.down.to(y.dtype))
            y = y + strength * part.scale * _mix(layer.module, inner, part.up.to(y.dtype))
        return y


def _moved(values: Tensor, parts: Sequence[tuple[float, Spectral]]) -> Tensor:
    """ReLU(S + Σ strength·shifts) - S: exactly zero where the shifts are."""
    shifted = values
    for strength, part in parts:
        shifted = shifted + strength * part.shifts
    return shifted.relu() - values


Form = Callable[[Layer, Tensor, Tensor], Tensor]  # (layer, c = change of S, input) -> output


def _cheapest(layer: Layer, x: Tensor) -> Form | None:
    """The live form with the fewest multiplications in a training step, beside those of the base; None for `dense`.

    With n positions and a weight of co x k of rank r these are: n·co·k + 4·co·r·k for `dense` (the change is formed,
    and its gradient with it); 2·n·r·(co + k) where both sides of W act on input and output; and where the short side
    acts on what the base computes anyway, 4·n·r² as two factors or 3·n·r² + 4·r³ as their product.
    """
    module, (rows, columns) = layer.module, spectral.as_matrix(layer.base).shape
    if not (isinstance(module, nn.Linear | nn.Embedding) or _plain_conv(module)):
        return None
    r, n = min(rows, columns), _positions(module, x)
    costs: dict[Form | None, int] = {
        None: n * rows * columns + 4 * rows * r * columns,
        _both_sides: 2 * n * r * (rows + columns),  # first among equals, for it never divides by S
    }
    if _short_side_reaches(module, rows > columns) and layer.factors().condition <= _digits(x):
        costs |= {_short_side: 4 * n * r * r, _short_side_at_once: 3 * n * r * r + 4 * r**3}
    return min(costs, key=lambda form: costs[form])


def _positions(module: nn.Module, x: Tensor) -> int:
    """How often the weight is applied."""
    if isinstance(module, nn.Embedding):
        return x.numel()
    if isinstance(module, nn.Conv2d):
        return len(x) * x.shape[-1] * x.shape[-2] // (module.stride[0] * module.stride[1])
    return x.numel() // x.shape[-1]


def _digits(x: Tensor) -> float:
    """The condition number up to which W x still tells Vᵀ x in the precision of this forward."""
    if not x.is_floating_point():  # ids for an embedding, whose rows come as they are
        return spectral.CONDITION_LIMIT
    return min(spectral.CONDITION_LIMIT, 0.25 / torch.finfo(_precision(x)).eps)


def _precision(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _short_side_reaches(module: nn.Module, tall: bool) -> bool:
    """Whether the short side of W is a side that an input or output of this layer shows position by position."""
    if isinstance(module, nn.Embedding):
        return tall  # its rows are the output
    if isinstance(module, nn.Conv2d):
        return not tall or (set(module.kernel_size + module.stride) == {1} and set(module.padding) == {0})
    return True


def _both_sides(layer: Layer, moved: Tensor, x: Tensor) -> Tensor:
    """y + U diag(c) Vᵀ x."""
    y, tall, module = layer.plain(x), layer.factors().tall, layer.module
    near, far = layer.factor("near", y.dtype), layer.factor("far", y.dtype)
    left, right = (far.T, near.T) if tall else (near, far)  # W = left diag(S) right
    if isinstance(module, nn.Embedding):
        return y + _scaled(module, F.embedding(x, left), moved) @ right
    return y + _mix(module, _scaled(module, _inward(module, x, right), moved), left)


def _short_side(layer: Layer, moved: Tensor, x: Tensor) -> Tensor:
    """Wide: y + U diag(c/S) Uᵀ (y - b). Tall: the same with V on the input. An embedding's output are rows of W."""
    gains = moved / layer.factors().values

    def rotated(t: Tensor, bias: Tensor | None) -> Tensor:
        near = layer.factor("near", _precision(t))
        inner = _mix(layer.module, t, near.T, None if bias is None else -(near.T @ bias.to(near)))
        return _mix(layer.module, _scaled(layer.module, inner, gains), near)

    return _turned(layer, rotated, x)


def _short_side_at_once(layer: Layer, moved: Tensor, x: Tensor) -> Tensor:
    """The same with the r x r matrix U diag(c/S) Uᵀ formed first."""
    near = layer.factor("near", moved.dtype)
    matrix = (near * (moved / layer.factors().values)) @ near.T

    def rotated(t: Tensor, bias: Tensor | None) -> Tensor:
        turn = matrix.to(_precision(t))
        return _mix(layer.module, t, turn, None if bias is None else -(turn @ bias.to(turn)))

    return _turned(layer, rotated, x)


def _turned(layer: Layer, rotated: Callable[[Tensor, Tensor | None], Tensor], x: Tensor) -> Tensor:
    """The output with `rotated(of what, bias to leave out)` added on the short side of W."""
    if layer.factors().tall and not isinstance(layer.module, nn.Embedding):
        return layer.plain(x + rotated(x, None))
    y = layer.plain(x)
    return y + rotated(y, getattr(layer.module, "bias", None))


def _plain_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def _inward(module: nn.Module, x: Tensor, right: Tensor) -> Tensor:
    """Vᵀ x at every position: (..., columns) -> (..., r), or channels first for a convolution."""
    if isinstance(module, nn.Conv2d):
        kernels = right.reshape(-1, *module.weight.shape[1:])
        return F.conv2d(x.to(right.dtype), kernels, None, module.stride, module.padding, module.dilation)
    return F.linear(x.to(right.dtype), right)


def _mix(module: nn.Module, t: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`matrix` applied to the channels at every position."""
    if isinstance(module, nn.Conv2d):
        return F.conv2d(t, matrix[:, :, None, None], bias)
    return F.linear(t, matrix, bias)


def _scaled(module: nn.Module, t: Tensor, factor: Tensor) -> Tensor:
    """Each channel times its factor; the product, and so the factor's gradient, is summed in fp32."""
    return (t * (factor[:, None, None] if isinstance(module, nn.Conv2d) else factor)).to(t.dtype)
