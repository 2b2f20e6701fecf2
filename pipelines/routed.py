"""Weights that differ from place to place: each concept changes the picture only where its region is.

Concepts that are folded into a UNet's weights act everywhere, and two of them blend. Here every changed layer gives at
each position what it would give with the concepts of that position alone (the idea of FreeFuse, arXiv:2510.23515):

    h'(p) = h(p) + [p in region] d(p)

where h is the layer with the base's weights and h + d with the concept's. Positions are cells of the picture; for what
projects the prompt, tokens. A region that is the whole picture gives the folded concept, bit for bit, and outside of
all regions a layer gives what the base's gives. The time embedding has no positions: what a concept changes there is
added where its region is, in every block that takes the time in.

Where regions overlap, their concepts are folded together. Each set of concepts that shares a place is a variant with
changed layers of its own; variant 0 holds everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pipelines.variants import NOTHING, Made, Variant, worn

if TYPE_CHECKING:
    from pipelines.model import Model


class Labels(NamedTuple):
    """Variant numbers, and which of them there are (known without asking an accelerator each time)."""

    numbers: Tensor
    present: tuple[int, ...]

    @classmethod
    def of(cls, numbers: Tensor) -> Labels:
        return cls(numbers, tuple(numbers.unique().tolist()))


class Router:
    """Says which variant holds where: the same for all layers of a UNet.

    `cells` (pictures, h, w) and `tokens` (tokens,) are variant numbers; None = variant 0 everywhere. Rows of the
    negative prompt come first and see the same cells, but the words of no concept.
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        self.variants = tuple(variants)
        self.shifts: dict[int, Tensor] = {}  # of the time embedding, (rows, width) by variant
        self._cells: Tensor | None = None
        self._tokens: Tensor | None = None
        self._grids: dict[tuple[int, int], Labels] = {}
        self._size = (0, 0)

    def place(self, cells: Tensor | None, tokens: Tensor | None, size: tuple[int, int]) -> None:
        """From now on these regions hold, on latents of `size` (height, width)."""
        self._cells, self._tokens, self._size = cells, tokens, size
        self._grids = {}

    @property
    def on(self) -> bool:
        """Whether anything but variant 0 holds anywhere."""
        return self._cells is not None

    def grid(self, height: int, width: int, rows: int) -> Labels:
        """(rows, height, width): the variant that holds in most of each cell."""
        assert self._cells is not None
        if (height, width) not in self._grids:
            self._grids[height, width] = Labels.of(shrunk(self._cells, (height, width), len(self.variants)))
        known = self._grids[height, width]
        return Labels(known.numbers.repeat(rows // len(known.numbers), 1, 1), known.present)

    def flat(self, queries: int, rows: int) -> Labels:
        """(rows, queries): the same for a layer that has its cells in one row."""
        height, width = self._size
        while height * width > queries:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != queries:
            raise RuntimeError(f"{queries} cells are no halving of {self._size}")
        labels = self.grid(height, width, rows)
        return Labels(labels.numbers.flatten(1), labels.present)

    def words(self, length: int, rows: int) -> Labels:
        """(rows, tokens); the prompt's rows are the last ones."""
        assert self._cells is not None and self._tokens is not None
        numbers = torch.zeros(rows, length, dtype=torch.long, device=self._cells.device)
        numbers[rows - len(self._cells) :] = self._tokens[:length]
        return Labels.of(numbers)


def shrunk(cells: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """Variant numbers (pictures, h, w) on another grid: the one that covers most of each cell."""
    if tuple(cells.shape[1:]) == size:
        return cells
    each = F.one_hot(cells, count).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(each, size).argmax(1)


@contextmanager
def routed(model: Model, base: Mapping[nn.Module, Made], on: Variant, router: Router) -> Iterator[None]:
    """Every layer of the UNet that some variant changes follows the router while the context is open, instead of `on`,
    which is what the concepts have made of it.
    """
    changed = list(dict.fromkeys(module for one in router.variants for module in one))
    inside = set(model.unet.modules())
    changed = [module for module in changed if module in inside]
    with ExitStack() as stack:
        stack.enter_context(worn(base, on, {}, [module for module in base if module in inside]))
        stack.callback(model.unet.register_forward_pre_hook(partial(_begin, router)).remove)
        timers = [module for module in model.unet.modules() if isinstance(module, TimestepEmbedding)]
        timed = {part: timer for timer in timers for part in timer.modules()}
        moved = {timed[module] for module in changed if module in timed}
        for timer in moved:
            _patch(stack, timer, partial(_embed, router, base, timer))
        text = {to for one in model.unet.modules() if _crossing(one) for to in (one.to_k, one.to_v)}
        blocks = {one.time_emb_proj: one for one in model.unet.modules() if isinstance(one, ResnetBlock2D)}
        for module in changed:
            if module not in timed and module not in blocks:
                layer = _Layer(module, router)
                _patch(stack, module, layer.text if module in text else layer.image)
        for projection, block in blocks.items():
            if projection is not None and (moved or projection in changed):
                _Timed(block, _Layer(projection, router)).enter(stack)
        yield


def _begin(router: Router, *_: Any) -> None:
    router.shifts = {}


def _crossing(module: nn.Module) -> bool:
    return isinstance(module, Attention) and bool(module.is_cross_attention)


def _patch(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """`forward` instead of the module's own, until the stack closes."""
    found = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    stack.callback(partial(_unpatch, module, found))


def _unpatch(module: nn.Module, found: Any) -> None:
    module.__dict__.pop("forward", None)
    if found is not None:
        module.__dict__["forward"] = found


class _Layer:
    """One changed layer."""

    def __init__(self, module: nn.Module, router: Router) -> None:
        self.module, self.router = module, router
        self.made = [one.get(module, NOTHING) for one in router.variants]
        self._own = module.__dict__.get("forward")  # of somebody else, such as an offloading hook

    def plain(self, variant: int, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output as that variant has it everywhere."""
        made, parameters = self.made[variant], self.module._parameters
        before = {name: parameters[name].data for name in made.values}  # type: ignore[union-attr]
        try:
            for name, value in made.values.items():
                parameters[name].data = value  # type: ignore[union-attr]
            forward = self._own or partial(type(self.module).forward, self.module)
            output: Tensor = forward(*args, **kwargs)
        finally:
            for name, value in before.items():
                parameters[name].data = value  # type: ignore[union-attr]
        for hook in made.hooks.values():
            changed = hook(self.module, args, output)
            output = output if changed is None else changed
        return output

    def image(self, *args: Any, **kwargs: Any) -> Tensor:
        """Cells of the picture, as (rows, channels, h, w) or (rows, cells, channels)."""
        output = self.plain(0, *args, **kwargs)
        if not self.router.on or output.ndim < 3:
            return output
        if output.ndim == 4:
            return self._mixed(output, self.router.grid(output.shape[2], output.shape[3], len(output)), 1, args, kwargs)
        return self._mixed(output, self.router.flat(output.shape[1], len(output)), -1, args, kwargs)

    def text(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens of the prompt: (rows, tokens, channels)."""
        output = self.plain(0, *args, **kwargs)
        if not self.router.on:
            return output
        return self._mixed(output, self.router.words(output.shape[1], len(output)), -1, args, kwargs)

    def _mixed(self, output: Tensor, labels: Labels, channels: int, args: Any, kwargs: Any) -> Tensor:
        """`output` of variant 0, and each other variant's where it holds; `channels` is the axis they stand on."""
        for variant in labels.present:
            if self.made[variant].key != self.made[0].key:
                here = (labels.numbers == variant).unsqueeze(channels)
                output = torch.where(here, self.plain(variant, *args, **kwargs), output)
        return output


def _embed(router: Router, base: Mapping[nn.Module, Made], timer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A time embedding as variant 0 has it; how far the others are from it is noted for the blocks that take it in."""
    parts = list(timer.modules())

    def embedding(variant: int) -> Tensor:
        with worn(base, {}, router.variants[variant], parts):
            output: Tensor = type(timer).forward(timer, *args, **kwargs)
        return output

    output = embedding(0)
    if router.on:
        for variant in range(1, len(router.variants)):
            router.shifts[variant] = router.shifts.get(variant, 0) + embedding(variant) - output
    return output


class _Timed:
    """A block that adds the time to its cells."""

    def __init__(self, block: ResnetBlock2D, layer: _Layer) -> None:
        self.block, self.layer, self.router = block, layer, layer.router
        self._time: Tensor | None = None
        self._moved: dict[int, Tensor] = {}

    def enter(self, stack: ExitStack) -> None:
        _patch(stack, self.layer.module, self._project)
        stack.callback(self.block.register_forward_pre_hook(self._hear, with_kwargs=True).remove)
        stack.callback(self.block.norm2.register_forward_pre_hook(self._add).remove)

    def _hear(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._time = args[1] if len(args) > 1 else kwargs.get("temb")

    def _project(self, x: Tensor) -> Tensor:
        output, self._moved = self.layer.plain(0, x), {}
        if self.router.on and self._time is not None:
            for variant in range(1, len(self.router.variants)):
                shift = self.router.shifts.get(variant)
                if shift is None and self.layer.made[variant].key == self.layer.made[0].key:
                    continue
                time = x if shift is None else self._time + shift
                if shift is not None and not self.block.skip_time_act:
                    time = self.block.nonlinearity(time)
                self._moved[variant] = self.layer.plain(variant, time) - output
        return output

    def _add(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        cells = args[0]
        if not self._moved:
            return args
        labels = self.router.grid(cells.shape[2], cells.shape[3], len(cells))
        for variant in set(labels.present) & set(self._moved):
            here = (labels.numbers == variant).unsqueeze(1)
            cells = torch.where(here, cells + self._moved[variant][:, :, None, None], cells)
        return (cells, *args[1:])
