"""What happens at one attention layer while probes are on it. The rest of the code needs only `probe_attention`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipelines.attention.protocol import Columns, Edit, Probe, Site, Tap
from pipelines.errors import StudioError

# All of these compute softmax(s Q K^T) V and nothing else, so an eager layer can stand in for them.
_PLAIN = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


@dataclass(eq=False)
class Guest:
    """One probe at one layer."""

    tap: Tap
    site: Site
    probe: Probe
    want: Columns | Edit

    def here(self, queries: int) -> Site:
        """The site with its grid for the present latents. StudioError when it doesn't hold that many queries."""
        size = self.tap.step.size
        site = _on(self.site, size)
        if site.height * site.width != queries:
            raise StudioError(
                f"Layer '{site.name}' has {queries} queries, which latents of {size[0]}x{size[1]} don't explain. "
                "Call the whole UNet, or leave this layer out of the probe."
            )
        return site

    def show(self, weights: Tensor) -> None:
        """Hand the chosen columns of (prompt rows, heads, queries, keys) to the probe."""
        assert isinstance(self.want, Columns)
        self.probe.look(self.here(weights.shape[2]), self.want.choose(weights), self.tap.step)

    def change(self, logits: Tensor) -> Tensor:
        """The probe's edit of (rows, heads, queries, keys)."""
        edited = self.probe.edit(self.here(logits.shape[2]), logits, self.tap.step)
        if edited.shape != logits.shape:
            raise ValueError(f"edit() turned {tuple(logits.shape)} into {tuple(edited.shape)} at '{self.site.name}'")
        return edited


@lru_cache(maxsize=4096)
def _on(site: Site, size: tuple[int, int]) -> Site:
    return site.on(size)


class Seat:
    """A probed layer. Nested probes share its seat, so they may come and go in any order."""

    taken: dict[Attention, Seat] = {}

    @classmethod
    def at(cls, attn: Attention) -> Seat:
        """The layer's seat: the one others sit on already, or a new one."""
        return cls.taken.get(attn) or cls(attn)

    def __init__(self, attn: Attention) -> None:
        self.attn = attn
        self.guests: list[Guest] = []
        self._processor: Any = None  # the layer's own, while an eager one stands in for it
        self._hooks: list[RemovableHandle] = []
        self._listens_to: tuple[nn.Module, ...] = ()
        self._query: Tensor | None = None
        self._key: Tensor | None = None

    def join(self, guest: Guest) -> None:
        """StudioError, with nothing changed, when this layer can't give what the guest wants."""
        own = self._processor or self.attn.processor
        if self.attn.added_kv_proj_dim is not None or (isinstance(guest.want, Edit) and not isinstance(own, _PLAIN)):
            raise StudioError(
                f"Layer '{guest.site.name}' computes its attention with {type(own).__name__}, which can't be "
                "followed here. Switch that extension (IP-Adapter or the like) off first."
            )
        self.taken[self.attn] = self
        self.guests.append(guest)
        self._arrange()

    def leave(self, guest: Guest) -> None:
        """Undo `join`; with the last guest gone the layer is as it was."""
        if guest not in self.guests:
            return
        self.guests.remove(guest)
        self._arrange()
        if not self.guests:
            del self.taken[self.attn]

    def _arrange(self) -> None:
        """An edit needs an eager processor; looking alone needs hooks beside the layer's own; nobody needs neither."""
        while self._hooks:
            self._hooks.pop().remove()
        self._query = self._key = None
        editing = any(isinstance(guest.want, Edit) for guest in self.guests)
        if editing and self._processor is None:
            self._processor = self.attn.processor
            eager: Any = _Eager(self, isinstance(self._processor, FusedAttnProcessor2_0))
            self.attn.set_processor(eager)
        if not editing and self._processor is not None:
            self.attn.set_processor(self._processor)
            self._processor = None
        if self.guests and not editing:
            self._listens_to = self._sources()
            query, key = self._listens_to
            self._hooks.append(query.register_forward_hook(self._hear_query))
            self._hooks.append(key.register_forward_hook(self._hear_key))
            self._hooks.append(self.attn.register_forward_hook(self._after, with_kwargs=True))

    def _sources(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs are the queries and the keys."""
        attn = self.attn
        fused = isinstance(attn.processor, FusedAttnProcessor2_0)
        joint = (attn.to_q, attn.to_kv) if attn.is_cross_attention and fused else None
        query, key = joint or ((attn.to_qkv, attn.to_qkv) if fused else (attn.to_q, attn.to_k))
        return attn.norm_q or query, attn.norm_k or key

    def _hear_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._query = output.chunk(3, -1)[0] if module is getattr(self.attn, "to_qkv", None) else output

    def _hear_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if module is getattr(self.attn, "to_qkv", None):
            output = output.chunk(3, -1)[1]
        elif module is getattr(self.attn, "to_kv", None):
            output = output.chunk(2, -1)[0]
        self._key = output

    def _after(self, attn: Attention, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        """Hook: the layer has run; compute what its guests look at from the queries and keys it used."""
        query, key, self._query, self._key = self._query, self._key, None, None
        if query is None or key is None or self._sources() != self._listens_to:
            raise StudioError(
                f"Layer '{self.guests[0].site.name}' was rebuilt while its attention is watched. "
                "Attach concepts and adapters first, then open the probe."
            )
        mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        bias = _bias(attn, mask, len(query), key.shape[-2])
        done: dict[tuple[int, int, int, bool], Tensor] = {}
        for guest in self.guests:
            assert isinstance(guest.want, Columns)
            cond, grad = guest.tap.step.cond, guest.want.grad
            rows = (*cond.indices(len(query)), grad)
            if not len(range(*rows[:3])):
                continue
            if rows not in done:
                parts = query[cond], key[cond], None if bias is None else bias[cond]
                done[rows] = _scores(attn, *(parts if grad else _cut(parts))).softmax(-1)
            guest.show(done[rows])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(edit(s Q K^T + mask)) V: (rows, queries, width); edits in the order the probes came, then looks."""
        attn = self.attn
        weights = _scores(attn, query, key, _bias(attn, mask, len(query), key.shape[-2]))
        for guest in self.guests:
            if isinstance(guest.want, Edit):
                weights = guest.change(weights)
        weights = weights.softmax(-1)
        for guest in self.guests:
            if isinstance(guest.want, Columns):
                seen = weights[guest.tap.step.cond]
                if len(seen):
                    guest.show(seen if guest.want.grad else seen.detach())
        return (weights.to(value.dtype) @ _heads(value, attn.heads)).transpose(1, 2).flatten(2)


class _Eager:
    """Stands in for a plain processor at an edited layer, around the layer's own submodules."""

    def __init__(self, seat: Seat, fused: bool) -> None:
        self.seat = seat
        self.fused = fused

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = self._project(attn, hidden_states, encoder_hidden_states)
        hidden_states = self.seat.attend(query, key, value, attention_mask)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _project(self, attn: Attention, states: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (normed ones with their heads apart), keys and values."""
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if not self.fused:
            context = states if context is None else context
            query, key, value = attn.to_q(states), attn.to_k(context), attn.to_v(context)
        elif context is None:
            query, key, value = attn.to_qkv(states).chunk(3, -1)
        else:
            query, (key, value) = attn.to_q(states), attn.to_kv(context).chunk(2, -1)
        if attn.norm_q is not None:
            query = attn.norm_q(_heads(query, attn.heads))
        if attn.norm_k is not None:
            key = attn.norm_k(_heads(key, attn.heads))
        return query, key, value


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """(rows, n, heads * d) -> (rows, heads, n, d); what has its heads apart already is given back."""
    if tensor.ndim == 4:
        return tensor
    rows, length, width = tensor.shape
    return tensor.view(rows, length, heads, width // heads).transpose(1, 2)


def _scores(attn: Attention, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """s Q K^T + bias, (rows, heads, queries, keys), in fp32 also under autocast: fp16 overflows here in SD 2."""
    with _full_precision(query.device.type):
        key = _heads(key, attn.heads).float() * attn.scale
        scores = _heads(query, attn.heads).float() @ key.transpose(-1, -2)
        return scores if bias is None else scores + bias


def _bias(attn: Attention, mask: Tensor | None, rows: int, keys: int) -> Tensor | None:
    """The additive mask a layer was called with, spread over its heads."""
    if mask is None:
        return None
    spread = attn.prepare_attention_mask(mask, keys, rows)
    return spread.view(rows, attn.heads, -1, spread.shape[-1])


def _full_precision(device: str) -> AbstractContextManager[Any]:
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocasts else nullcontext()


def _cut(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)
