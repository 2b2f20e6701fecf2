"""What things a picture shows, without being told a word: cells that look at the same places belong together.

Method: ConceptExpress (Hao et al. 2024, arXiv 2407.07077, section 3.2), with another clusterer:

1. Self-attention of all layers, heads averaged, on the finest grid: keys bilinear, queries repeated, weighted by each
   layer's resolution, rows brought to sum 1.
2. Cells are joined by average linkage on the symmetric KL divergence of their rows until `pieces` are left; tau is the
   height of the last join. (The authors take FINCH, whose licence forbids commercial use also of re-implementations.)
3. A piece is kept when the end token of the empty prompt looks at it more than at the picture as a whole: things, not
   background.
4. Kept pieces that touch are joined, closest first, while the divergence of their mean rows is at most `join` x tau.

Departures: on a base whose end token looks at the ground (`ground`) step 3 is turned round; each layer's rows are
brought to sum 1 before they are weighted, too; the end token is the first one (SD 1 pads with it); when no piece passes
the filter, nothing is found rather than an error raised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipelines.attention.gaze import Gaze, Grid, clean_latents, cross_levels, fitted, look_at, resized
from pipelines.attention.probe import find_sites
from pipelines.attention.refine import scaled, symmetric_kl

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.model import Model

Maps = NDArray[np.float32]
FLOOR = 1e-7  # added to attention before logarithms


class DiscoverParams(BaseModel):
    """The defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestep: int = Field(0, ge=0, le=999, description="Level of noise at which the picture is looked at")
    draws: int = Field(0, ge=0, le=64, description="Noise draws averaged over (0 = the clean picture)")
    seed: int = Field(0, ge=0, description="Seed of the noise")
    ground: bool = Field(False, description="The end token looks at the ground, so things are where it looks less")
    pieces: int = Field(10, ge=2, le=64, description="Pieces left by the first clustering")
    keep: float = Field(1.0, ge=0, le=100, description="How much more than the whole picture a thing is looked at")
    join: float = Field(1.0, ge=0, description="Pieces that touch are one up to this times the last distance")
    smallest: float = Field(0.004, ge=0, lt=1, description="Share of the picture below which a thing is noise")


# Chosen on Toybox's tuning scenes (the `masks` claim's, 24 scenes, 1000-1011): its end token looks at the ground.
_BY_KIND: dict[str, dict[str, float]] = {
    "toybox": {"timestep": 100, "draws": 2, "pieces": 6, "keep": 0.9, "ground": True},
}


def discover_params(kind: str) -> DiscoverParams:
    """The settings for a kind of base ("sd1", "toybox" ...)."""
    return DiscoverParams.model_validate(_BY_KIND.get(kind, {}))


@dataclass(frozen=True)
class Thing:
    """One thing in a picture, on the base's grid."""

    mask: NDArray[np.bool_]  # (h, w)
    map: NDArray[np.float64]  # (h, w), sums to 1: where its cells look

    def picture(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """As a photo's mask: (height, width) uint8, 255 = the thing."""
        from pipelines.attention.heatmap import upscale

        return (upscale(self.mask.astype(np.float32), size) > 0.5).astype(np.uint8) * 255


def discover(model: Model, picture: Picture, params: DiscoverParams | None = None) -> list[Thing]:
    """The things in a picture (height, width, 3), the largest first; [] where nothing stands out. Never raises on
    blank pictures."""
    params = params or discover_params(model.kind)
    links, looked_at, grid = _look(model, picture, params)
    groups = group(links, grid, looked_at, params)
    things = [Thing(inside.reshape(grid), _mean(links, inside).reshape(grid)) for inside in groups]
    return sorted(things, key=lambda thing: -int(thing.mask.sum()))


def group(links: NDArray[np.float64], grid: Grid, looked_at: Maps, params: DiscoverParams) -> list[NDArray[np.bool_]]:
    """Steps 2 to 4: cells as (cells,) bool, one array a thing.

    `links` (cells, cells) has rows that sum to 1; `looked_at` (cells,) is the end token's attention, 0 to 1.
    """
    pieces, tau = _pieces(links, params.pieces)
    overall = max(float(looked_at.mean()), 1e-9)
    kept = [inside for inside in pieces if (looked_at[inside].mean() / overall > params.keep) != params.ground]
    while len(kept) > 1:
        means = torch.from_numpy(np.stack([_mean(links, inside) for inside in kept]))
        apart = symmetric_kl(means, means, FLOOR).numpy()
        touching = np.array([[one is not two and _touch(one, two, grid) for two in kept] for one in kept])
        apart = np.where(touching, apart, np.inf)
        first, second = np.unravel_index(int(apart.argmin()), apart.shape)
        if not apart[first, second] <= params.join * tau:
            break
        joined = kept[first] | kept[second]
        kept = [inside for number, inside in enumerate(kept) if number not in (first, second)] + [joined]
    return [inside for inside in kept if inside.mean() >= params.smallest]


def _pieces(links: NDArray[np.float64], count: int) -> tuple[list[NDArray[np.bool_]], float]:
    """The cells in `count` clusters (fewer where rows are equal), and the height at which the last two were joined."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    rows = torch.from_numpy(links)
    apart = symmetric_kl(rows, rows, FLOOR).numpy()
    apart = (apart + apart.T) / 2
    np.fill_diagonal(apart, 0)
    tree = linkage(squareform(apart, checks=False), "average")
    labels = fcluster(tree, count, "maxclust")
    last = len(links) - len(np.unique(labels)) - 1
    return [labels == label for label in np.unique(labels)], float(tree[last, 2]) if last >= 0 else 0.0


def _mean(links: NDArray[np.float64], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = links[inside].mean(0)
    return mean


def _touch(one: NDArray[np.bool_], two: NDArray[np.bool_], grid: Grid) -> bool:
    """Whether some cell of one is beside a cell of the other (not across a corner)."""
    a, b = one.reshape(grid), two.reshape(grid)
    pairs = ((a[1:], b[:-1]), (a[:-1], b[1:]), (a[:, 1:], b[:, :-1]), (a[:, :-1], b[:, 1:]))
    return any(bool((left & right).any()) for left, right in pairs)


def _look(model: Model, picture: Picture, params: DiscoverParams) -> tuple[NDArray[np.float64], Maps, Grid]:
    """Step 1, and where the end token of the empty prompt looks: (cells, cells), (cells,), the grid."""
    text = model.encode([""])
    level, words = next(iter(cross_levels(model).items()))
    gaze = Gaze(words, [site.name for site, _ in find_sites(model.unet) if site.kind == "self"])
    latents = clean_latents(model, fitted(model, picture))
    look_at(model, latents, text, gaze, timestep=params.timestep, draws=params.draws, seed=params.seed)
    grid = max(((site.height, site.width) for site in gaze.sites.values()), key=lambda size: size[0] * size[1])
    total = sum(_spread(gaze.sums[name] / gaze.rows, gaze, name, grid) for name in gaze.selves)
    assert isinstance(total, Tensor)
    links = (total / total.sum(1, keepdim=True)).double().cpu().numpy()
    seen, own = gaze.words(level)
    end = text.prompts[0].ids.index(model.tokenizers[0].eos_token_id, 1)
    return links, scaled(resized(seen[:, [end]], own, grid).T)[0].cpu().numpy(), grid


def _spread(links: Tensor, gaze: Gaze, name: str, grid: Grid) -> Tensor:
    """One layer's (queries, keys) on the finest grid, times its share of the finest resolution."""
    site = gaze.sites[name]
    own = (site.height, site.width)
    keys = resized(links.T, own, grid)  # (finest cells, queries)
    keys = keys / keys.sum(0, keepdim=True).clamp(min=1e-12)
    queries = F.interpolate(keys.reshape(1, -1, *own), grid, mode="nearest")[0].flatten(1).T
    return queries * (site.height / grid[0])
