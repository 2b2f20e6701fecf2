"""The attention formula written out, around a layer's own submodules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
from torch import Tensor

# All of these compute softmax(s Q K^T) V and nothing else, so the eager formula can stand in for them.
PLAIN = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # queries, keys, values, mask -> (rows, n, width)


class Eager:
    """Stands in for a plain processor at an edited layer, around the layer's own submodules."""

    def __init__(self, attend: Attend, fused: bool) -> None:
        self.attend = attend
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
        hidden_states = self.attend(query, key, value, attention_mask)
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
            query = attn.norm_q(split_heads(query, attn.heads))
        if attn.norm_k is not None:
            key = attn.norm_k(split_heads(key, attn.heads))
        return query, key, value


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(rows, n, heads * d) -> (rows, heads, n, d); what has its heads apart already is given back."""
    if tensor.ndim == 4:
        return tensor
    rows, length, width = tensor.shape
    return tensor.view(rows, length, heads, width // heads).transpose(1, 2)


def scores(attn: Attention, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """s Q K^T + bias, (rows, heads, queries, keys), in fp32 also under autocast: fp16 overflows here in SD 2."""
    with _full_precision(query.device.type):
        queries, keys = flat_heads(query, attn.heads), flat_heads(key, attn.heads)
        scores = torch.bmm(queries, (keys * attn.scale).transpose(1, 2))  # the keys are few: scale those
        scores = scores.view(-1, attn.heads, *scores.shape[1:])
        return scores if bias is None else scores + bias


def flat_heads(tensor: Tensor, heads: int) -> Tensor:
    """(rows, n, heads * d) or (rows, heads, n, d) -> (rows * heads, n, d) in fp32; of a single row no copy is made."""
    tensor = split_heads(tensor, heads).flatten(0, 1)
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def bias(attn: Attention, mask: Tensor | None, rows: int, keys: int) -> Tensor | None:
    """The additive mask a layer was called with, spread over its heads."""
    if mask is None:
        return None
    spread = attn.prepare_attention_mask(mask, keys, rows)
    return spread.view(rows, attn.heads, -1, spread.shape[-1])


def _full_precision(device: str) -> AbstractContextManager[Any]:
    autocasts = _knows_autocast(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocasts else nullcontext()


_knows_autocast = lru_cache(torch.amp.is_autocast_available)  # slower to ask than a small layer's scores
