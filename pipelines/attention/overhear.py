"""A layer's own fused attention, with the normaliser that its CPU kernel computes anyway and then throws away.

The public `scaled_dot_product_attention` calls a kernel that returns (output, log-sum-exp of each query's scores) and
hands on the output alone. Asking that very kernel gives the same bits, and with the normaliser a column costs only
P[:, t] = exp(s q k_t - lse): the other keys needn't be multiplied a second time. The kernel's name is private to
torch, so wherever it isn't there or wouldn't be chosen, the public function runs and columns are computed in full.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend

from pipelines.attention.eager import Eager, split_heads

_kernel: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_choice: Any = getattr(torch, "_fused_sdp_choice", None)


class Overhearing:
    """Stands in for an AttnProcessor2_0, and keeps `lse` (rows, heads, queries) of the last call if it could be had.

    The steps around the kernel are those of `Eager`, which are AttnProcessor2_0's, module by module.
    """

    def __init__(self, own: AttnProcessor2_0) -> None:
        self.own = own
        self.lse: Tensor | None = None
        self._written_out = Eager(self._attend, fused=False)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        self.lse = None
        known = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32 and attn.scale_qk
        other = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or attention_mask is not None
        if not known or other or _kernel is None or _choice is None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        self._heads = attn.heads
        return self._written_out(attn, hidden_states, encoder_hidden_states, None, temb)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (split_heads(tensor, self._heads) for tensor in (query, key, value))
        if _choice(query, key, value, None, 0.0, False) == SDPBackend.FLASH_ATTENTION.value:
            output, self.lse = _kernel(query, key, value, 0.0, False)
        else:
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return output.transpose(1, 2).flatten(2)
