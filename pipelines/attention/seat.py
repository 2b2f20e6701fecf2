"""What happens at one attention layer while probes are on it. The rest of the code needs only `probe_attention`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipelines.attention.eager import PLAIN, Eager, bias, flat_heads, scores, split_heads
from pipelines.attention.overhear import Overhearing
from pipelines.attention.protocol import Columns, Edit, Probe, Site, Tap
from pipelines.errors import StudioError

# An accelerator wants few calls, so there layers wait and are looked at together, within these bounds. A CPU wants
# small tensors that are soon free again: keeping them was measured to cost more (fresh memory) than calls do.
AT_ONCE = {"cpu"}
HOLD = 64 * 2**20  # bytes of queries and keys that may wait
GATHER = 2**23  # probabilities of layers computed together
BLOCK = {"cpu": 2**20, "": 2**25}  # probabilities of one layer computed together; "" = elsewhere


@dataclass(eq=False)
class Guest:
    """One probe at one layer."""

    tap: Tap
    site: Site
    probe: Probe
    want: Columns | Edit

    def __post_init__(self) -> None:
        self._here, self._size = self.site, (0, 0)

    @property
    def columns(self) -> Columns:
        """What a guest that looks wants."""
        assert isinstance(self.want, Columns)
        return self.want

    def here(self, queries: int) -> Site:
        """The site with its grid for the present latents. StudioError when it doesn't hold that many queries."""
        size = self.tap.step.size
        if self._size != size:
            self._here, self._size = self.site.on(size), size
        if self._here.height * self._here.width != queries:
            raise StudioError(
                f"Layer '{self.site.name}' has {queries} queries, which latents of {size[0]}x{size[1]} don't explain. "
                "Call the whole UNet, or leave this layer out of the probe."
            )
        return self._here

    def show(self, chosen: Tensor) -> None:
        """Hand the columns (prompt rows, heads, queries, chosen) to the probe."""
        self.probe.look(self.here(chosen.shape[2]), chosen, self.tap.step)

    def change(self, logits: Tensor) -> Tensor:
        """The probe's edit of (rows, heads, queries, keys)."""
        edited = self.probe.edit(self.here(logits.shape[2]), logits, self.tap.step)
        if edited.shape != logits.shape:
            raise ValueError(f"edit() turned {tuple(logits.shape)} into {tuple(edited.shape)} at '{self.site.name}'")
        return edited


class Glance(NamedTuple):
    """A look that has yet to be computed: queries, keys and mask of the prompt's rows."""

    guest: Guest
    attn: Attention
    query: Tensor
    key: Tensor
    mask: Tensor | None
    lse: Tensor | None  # (rows, heads, queries): log of the sum of exp(scores), where the layer told it

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for glances that can be computed together."""
        mask = None if self.mask is None else self.mask.shape
        wish = repr(self.guest.columns.tokens)
        return self.query.shape, self.key.shape, self.attn.heads, self.attn.scale, mask, wish

    @property
    def size(self) -> int:
        """How many probabilities it takes."""
        return self.query.shape[0] * self.query.shape[-2] * self.key.shape[-2] * self.attn.heads


def look_together(tap: Tap) -> None:
    """Compute the glances that wait, layers of one shape at once: on a fast device calls cost more than arithmetic."""
    waiting, tap.waiting, tap.held = tap.waiting, [], 0
    alike: dict[tuple[Any, ...], list[Glance]] = {}
    for glance in waiting:
        alike.setdefault(glance.kind, []).append(glance)
    with torch.no_grad():
        for glances in alike.values():
            count = max(1, GATHER // glances[0].size)
            for first in range(0, len(glances), count):
                _look_at(glances[first : first + count])


def _look_at(glances: list[Glance]) -> None:
    """Glances of one kind: their probabilities and chosen columns at once."""
    query = _joined([glance.query for glance in glances])
    key = _joined([glance.key for glance in glances])
    masks = [glance.mask for glance in glances if glance.mask is not None]
    mask = _joined(masks) if masks else None
    attn, columns = glances[0].attn, glances[0].guest.columns
    size = len(glances) * glances[0].size / BLOCK.get(query.device.type, BLOCK[""])
    parts = 1 if mask is not None and mask.shape[2] > 1 else max(1, round(size))
    chosen = [
        columns.choose(scores(attn, part, key, mask).softmax(-1), len(glances)) for part in query.chunk(parts, -2)
    ]
    for glance, seen in zip(glances, _joined(chosen, 2).chunk(len(glances)), strict=True):
        glance.guest.show(seen)


def _look_with_lse(glance: Glance, lse: Tensor) -> bool:
    """P[:, t] = exp(s q k_t - lse) for the chosen keys alone; False for a wish this can't serve."""
    index = glance.guest.columns.shared_index(glance.key.shape[-2], glance.key.device)
    if index is None:
        return False
    heads, scale = glance.attn.heads, glance.attn.scale
    query, key = flat_heads(glance.query, heads), flat_heads(glance.key.index_select(-2, index), heads)
    logs = torch.baddbmm(lse.flatten(0, 1).unsqueeze(-1), query, key.transpose(1, 2), beta=-1, alpha=scale)
    glance.guest.show(logs.exp_().view(-1, heads, *logs.shape[1:]))
    return True


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


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
        self._own: Any = None  # the layer's own processor, while another stands in for it
        self._hooks: list[RemovableHandle] = []
        self._listens_to: tuple[nn.Module, ...] = ()
        self._query: Tensor | None = None
        self._key: Tensor | None = None

    def join(self, guest: Guest) -> None:
        """StudioError, with nothing changed, when this layer can't give what the guest wants."""
        own = self._own or self.attn.processor
        if self.attn.added_kv_proj_dim is not None or (isinstance(guest.want, Edit) and not isinstance(own, PLAIN)):
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
        """Hooks beside the layer's own code for those who look, an eager processor while somebody edits."""
        while self._hooks:
            self._hooks.pop().remove()
        self._query = self._key = None
        if self._own is not None:
            self.attn.set_processor(self._own)
            self._own = None
        stand_in: Any = None
        if any(isinstance(guest.want, Edit) for guest in self.guests):
            stand_in = Eager(self.attend, self._fused)
        elif self.guests:
            self._listens_to = self._sources()
            query, key = self._listens_to
            self._hooks.append(query.register_forward_hook(self._hear_query))
            self._hooks.append(key.register_forward_hook(self._hear_key))
            self._hooks.append(self.attn.register_forward_hook(self._after, with_kwargs=True))
            stand_in = Overhearing(self.attn.processor) if type(self.attn.processor) is AttnProcessor2_0 else None
        if stand_in is not None:
            self._own = self.attn.processor
            self.attn.set_processor(stand_in)

    @property
    def _fused(self) -> bool:
        return isinstance(self._own or self.attn.processor, FusedAttnProcessor2_0)

    def _sources(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs are the queries and the keys, and what comes with them where they are fused."""
        attn = self.attn
        query, key = attn.to_q, attn.to_k
        if self._fused:
            query, key = (attn.to_q, attn.to_kv) if attn.is_cross_attention else (attn.to_qkv, attn.to_qkv)
        return attn.norm_q or query, attn.norm_k or key

    def _hear_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._query = output

    def _hear_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._key = output

    def _heard(self) -> tuple[Tensor, Tensor]:
        """Queries and keys of the call that just ended."""
        query, key, self._query, self._key = self._query, self._key, None, None
        if query is None or key is None or self._sources() != self._listens_to:
            raise StudioError(
                f"Layer '{self.guests[0].site.name}' was rebuilt while its attention is watched. "
                "Attach concepts and adapters first, then open the probe."
            )
        if self._fused:
            parts = 2 if self.attn.is_cross_attention else 3
            query = query if parts == 2 or self.attn.norm_q is not None else query.chunk(3, -1)[0]
            key = key if self.attn.norm_k is not None else key.chunk(parts, -1)[parts - 2]
        return query, key

    def _after(self, attn: Attention, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        """Hook: the layer has run. Compute what its guests look at from the queries and keys it used, or note it."""
        query, key = self._heard()
        given = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        mask = bias(attn, given, len(query), key.shape[-2])
        lse = attn.processor.lse if isinstance(attn.processor, Overhearing) else None
        for guest in self.guests:
            rows = guest.tap.step.cond
            masked, told = None if mask is None else mask[rows], None if lse is None else lse[rows]
            glance = Glance(guest, attn, query[rows], key[rows], masked, told)
            if len(glance.query):
                self._look(glance)

    def _look(self, glance: Glance) -> None:
        tap, grad = glance.guest.tap, glance.guest.columns.grad
        if tap.running and not grad and glance.query.device.type not in AT_ONCE:
            tap.waiting.append(glance)
            tap.held += glance.query.nbytes + glance.key.nbytes
            if tap.held > HOLD:
                look_together(tap)
        elif glance.lse is None or not _look_with_lse(glance, glance.lse):
            with nullcontext() if grad else torch.no_grad():
                _look_at([glance])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(edit(s Q K^T + mask)) V: (rows, queries, width); edits in the order the probes came, then looks."""
        attn = self.attn
        weights = scores(attn, query, key, bias(attn, mask, len(query), key.shape[-2]))
        for guest in self.guests:
            if isinstance(guest.want, Edit):
                weights = guest.change(weights)
        weights = weights.softmax(-1)
        for guest in self.guests:
            if isinstance(guest.want, Columns):
                seen = weights[guest.tap.step.cond]
                if len(seen):
                    guest.show(guest.want.choose(seen if guest.want.grad else seen.detach()))
        return (weights.to(value.dtype) @ split_heads(value, attn.heads)).transpose(1, 2).flatten(2)
