"""Where a base looks in a given picture: cross-attention of words and self-attention, at one level of noise.

Layers are found from the model. `words` of a level and `links` between cells are means over heads, noise draws and
layers. On SD 1 and 2 the two levels that `cross_levels` finds are the 16x16 and 32x32 layers and `middle_site` is
up_blocks.3.attentions.1: those that iSeg's released code names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.attention.probe import Columns, Site, Step, find_sites, probe_attention
from pipelines.errors import StudioError
from pipelines.latents import Latents
from pipelines.noise import alphas, diffused, generator
from pipelines.text import TextStates

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.model import Model

Grid = tuple[int, int]  # height, width in cells
AT_ONCE = 2**26  # self-attention probabilities held together: noise draws are run one after the other beyond


@dataclass
class Gaze:
    """A probe that sums up what a base looked at."""

    cross: Collection[str] = ()  # layers to follow all the prompt's positions in
    selves: Collection[str] = ()  # layers whose self-attention is wanted
    sums: dict[str, Tensor] = field(default_factory=dict)  # by layer: (queries, tokens or cells), over heads and rows
    sites: dict[str, Site] = field(default_factory=dict)  # with their grids
    rows: int = 0

    def wants(self, site: Site) -> Columns | None:
        return Columns(None, grad=False) if site.name in self.selves or site.name in self.cross else None

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        return logits

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        seen = columns.mean(1).sum(0)  # (rows, heads, queries, keys) -> (queries, keys)
        self.sums[site.name] = self.sums[site.name] + seen if site.name in self.sums else seen
        self.sites[site.name] = site

    def words(self, level: int) -> tuple[Tensor, Grid]:
        """(cells, tokens) of a level's cross-attention, and the level's grid."""
        names = [name for name, site in self.sites.items() if name in self.cross and site.level == level]
        site = self.sites[names[0]]
        total = torch.stack([self.sums[name] for name in names]).mean(0) / self.rows
        return total, (site.height, site.width)

    def links(self) -> tuple[Tensor, Grid]:
        """(cells, cells) of the self-attention that was asked for, which is all of one grid; rows sum to 1."""
        names = [name for name in self.sites if name in self.selves]
        site = self.sites[names[0]]
        return torch.stack([self.sums[name] for name in names]).mean(0) / self.rows, (site.height, site.width)


def cross_levels(model: Model) -> dict[int, list[str]]:
    """Cross-attention layers on the way down and up by level, the coarsest level first; the middle alone if need be."""
    sites = [site for site, _ in find_sites(model.unet) if site.kind == "cross"]
    sites = [site for site in sites if site.place != "mid"] or sites
    if not sites:
        raise StudioError("This base reads no text in its UNet, so no word has a place in a picture. Load another one.")
    levels = sorted({site.level for site in sites}, reverse=True)
    return {level: [site.name for site in sites if site.level == level] for level in levels}


def self_sites(model: Model, which: str = "middle") -> list[str]:
    """Self-attention layers of the finest level: on the way up ("up"), or of those the middle one ("middle")."""
    sites = [site for site, _ in find_sites(model.unet) if site.kind == "self"]
    if not sites:
        raise StudioError("This base has no self-attention, which masks are refined with. Load another one.")
    finest = [site for site in sites if site.level == min(site.level for site in sites)]
    names = [site.name for site in finest if site.place == "up"] or [site.name for site in finest]
    return [names[len(names) // 2]] if which == "middle" else names


def fitted(model: Model, picture: Picture) -> Picture:
    """`picture` with about as many pixels as the base's own pictures, in whole latent cells; its shape is kept.

    So a panorama takes no more memory than a square.
    """
    height, width = picture.shape[:2]
    cell, scale = model.scale_factor, model.native_size / (height * width) ** 0.5
    sides = [max(2 * cell, cell * round(side * scale / cell)) for side in (width, height)]
    sides = [min(side, 8 * model.native_size) for side in sides]
    return np.asarray(Image.fromarray(picture).resize((sides[0], sides[1]), Image.Resampling.BILINEAR))


def clean_latents(model: Model, picture: Picture) -> Tensor:
    """The mean of the VAE's posterior, scaled: (1, c, h, w) fp32."""
    mean = Latents(model, budget=0).moments((), picture)[:1]
    return (mean * model.vae.config.scaling_factor).to(model.device)


@torch.no_grad()
def look_at(
    model: Model, latents: Tensor, text: TextStates, gaze: Gaze, *, timestep: int, draws: int, seed: int = 0
) -> None:
    """Run the base on `latents` (1, c, h, w) with `draws` private noises at `timestep`; 0 = once, without noise."""
    schedule = len(alphas(model))
    when = min(timestep, schedule - 1)
    size = (latents.shape[2] * model.scale_factor, latents.shape[3] * model.scale_factor)
    noises = [torch.randn(latents.shape[1:], generator=generator("gaze", seed, draw)) for draw in range(draws)]
    rows = _rows(model, latents, gaze)
    with probe_attention(model.unet, gaze) as tap:
        for index, first in enumerate(range(0, max(1, draws), rows)):
            part = noises[first : first + rows]
            count = max(1, len(part))
            t = torch.full((count,), when, device=latents.device)
            noisy = latents
            if part:
                noisy, _ = diffused(model, latents.expand(count, -1, -1, -1), torch.stack(part).to(latents), t)
            pooled = None if text.pooled is None else text.pooled.expand(count, -1)
            states = TextStates(text.states.expand(count, -1, -1), pooled, text.prompts)
            tap.at(Step(index, -(-max(1, draws) // rows), float(when)))
            sizes = model.conditioning(states, [size], [(0, 0)], [size])
            model.unet(noisy.to(model.dtype), t, encoder_hidden_states=states.states.to(model.dtype), **sizes)
            gaze.rows += count


def _rows(model: Model, latents: Tensor, gaze: Gaze) -> int:
    """How many noise draws go through together."""
    size = (latents.shape[2], latents.shape[3])
    watched = [site.on(size) for site, _ in find_sites(model.unet) if site.name in gaze.selves]
    largest = max((site.heads * (site.height * site.width) ** 2 for site in watched), default=1)
    return max(1, AT_ONCE // largest)


def resized(columns: Tensor, grid: Grid, to: Grid) -> Tensor:
    """(cells, n) on `grid` -> (cells, n) on `to`, bilinear."""
    if grid == to:
        return columns
    maps = columns.T.reshape(1, -1, *grid)
    return F.interpolate(maps, to, mode="bilinear", align_corners=False)[0].flatten(1).T
