"""One seam for looking at a UNet's attention and for changing it.

A probe says for every layer whether it wants nothing, some columns of the attention matrix, or to edit the logits.
Looking leaves the layer's own fused code alone: hooks pick up what `to_q` and `to_k` gave it, and the chosen columns
are computed beside it from those (fp32, rows of the prompt only), so a picture is bit-identical with or without.
Only layers that somebody edits run the eager formula softmax(edit(s Q K^T)) V.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from pipelines.attention.protocol import Columns, Edit, Probe, Site, Step, Tap
from pipelines.errors import StudioError

__all__ = ["Columns", "Edit", "Probe", "Site", "Step", "Tap", "find_sites", "probe_attention"]


@contextmanager
def probe_attention(unet: nn.Module, *probes: Probe) -> Iterator[Tap]:
    """Let `probes` look at and edit the attention of a diffusers UNet while the context is open.

    In training the backward pass belongs inside the context too. Contexts may be nested and closed in any order; when
    the last one closes, every processor is the object it was and no hook is left. Raises StudioError for a model
    without UNet blocks, and for a layer that can't give what a probe wants of it.
    """
    from pipelines.attention.seat import Guest, Seat

    tap = Tap()
    with ExitStack() as stack:
        for site, attn in find_sites(unet):
            for probe in probes:
                want = probe.wants(site)
                if want is None:
                    continue
                if not isinstance(want, Columns | Edit):
                    raise TypeError(f"wants() gives None, Columns or Edit, not {type(want).__name__}")
                seat, guest = Seat.at(attn), Guest(tap, site, probe, want)
                stack.callback(seat.leave, guest)  # before joining, so that half a join is undone as well
                seat.join(guest)
                tap.sites += (site,) if site not in tap.sites else ()
        if tap.sites:
            stack.callback(unet.register_forward_pre_hook(tap.before_forward, with_kwargs=True).remove)
            stack.callback(unet.register_forward_hook(partial(_after_forward, tap)).remove)
        yield tap


def _after_forward(tap: Tap, *_: Any) -> None:
    from pipelines.attention.seat import look_together

    tap.running = False
    look_together(tap)


def find_sites(unet: Any) -> list[tuple[Site, Any]]:
    """Every attention layer of a UNet with its module, in the order they run."""
    if not (hasattr(unet, "down_blocks") and hasattr(unet, "up_blocks")):
        raise StudioError("Attention can be probed in the UNet of Stable Diffusion 1, 2 or XL only. Load one of those.")
    found, level = [], 0
    for number, block in enumerate(unet.down_blocks):
        found += _within(f"down_blocks.{number}", "down", block, level)
        level += bool(getattr(block, "downsamplers", None))
    if unet.mid_block is not None:
        found += _within("mid_block", "mid", unet.mid_block, level)
    for number, block in enumerate(unet.up_blocks):
        found += _within(f"up_blocks.{number}", "up", block, level)
        level -= bool(getattr(block, "upsamplers", None))
    return found


def _within(prefix: str, place: str, block: nn.Module, level: int) -> list[tuple[Site, Any]]:
    from diffusers.models.attention_processor import Attention

    return [
        (Site(f"{prefix}.{name}", place, "cross" if attn.is_cross_attention else "self", attn.heads, level), attn)
        for name, attn in block.named_modules()
        if isinstance(attn, Attention)
    ]
