"""The unmix regulariser of Cut-Mix-Unmix: no subject's word looks at another subject.

Paper: Han et al., "SVDiff", ICCV 2023, arXiv 2303.11305, section 3.3, which gives it in words. With A_i the attention
of subject i's noun (mean over heads) and M_j the place of subject j in a mixture of both:

    L = sum_i mean over cells of (A_i * max over j != i of M_j)^2       (averaged over layers and photos)

Departures: a photo that is no mixture counts as 0, as each row of a loss does, so that parts of a batch and processes
agree; attention of the noun's last token, not of the identifier's, whose maps are unreliable (MuDI, appendix B.10).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.attention.protocol import Columns, Site, Step
from pipelines.text import covered

if TYPE_CHECKING:
    from pipelines.batch import Batch
    from pipelines.model import Model


class Unmix:
    """A probe for one forward of a training batch.

    `positions`: one token of each subject for every row; `masks` (rows, subjects, h, w): where they are; `who` (rows,
    subjects): which of them count. Rows with fewer than two are no mixtures. `photos`: rows that are averaged over.
    """

    def __init__(self, positions: Sequence[Sequence[int]], masks: Tensor, who: Tensor, photos: int) -> None:
        self._columns = Columns(positions)
        self._masks = masks
        self._who = who
        self._photos = photos
        self._layers: dict[str, Tensor] = {}

    def wants(self, site: Site) -> Columns | None:
        return self._columns if site.kind == "cross" else None

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        return logits

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        maps = columns.mean(1).transpose(1, 2).unflatten(2, (site.height, site.width))  # (rows, subjects, h, w)
        self._layers[site.name] = unmix_loss(maps, self._masks.to(maps), self._who) / self._photos

    def loss(self) -> Tensor:
        """The mean over layers and photos, a scalar; 0 where nothing was mixed."""
        layers = list(self._layers.values())
        return torch.stack(layers).mean() if layers else self._masks.new_zeros(())


def unmix_loss(maps: Tensor, masks: Tensor, who: Tensor) -> Tensor:
    """L of one layer, summed over rows: attention (rows, subjects, h, w), masks on any grid, who is shown (rows,
    subjects)."""
    count = maps.shape[1]
    there = F.interpolate(masks, maps.shape[2:], mode="area") * who[..., None, None]
    others = torch.stack([there[:, [j for j in range(count) if j != i]].amax(1) for i in range(count)], 1)
    each = (((maps * others) ** 2).mean((2, 3)) * who).sum(1)  # (rows,): 0 where nobody else is
    return each.sum()


@contextmanager
def unmixing(model: Model, batch: Batch, tokens: Sequence[str]) -> Iterator[Unmix | None]:
    """Watch the forward inside for mixtures of the subjects `tokens`; None where there are no two.

    `batch.subject_masks` says who is where, so photos of several subjects that have masks count as mixtures too.
    """
    from pipelines.attention.probe import probe_attention

    if len(tokens) < 2:
        yield None
        return
    found = [_nouns(model, caption, tokens) for caption in batch.captions]
    masks = batch.latents.new_zeros(()) if batch.subject_masks is None else batch.subject_masks
    who = torch.tensor(found, device=masks.device).bool()
    who = who & batch.shown if batch.shown is not None and batch.subject_masks is not None else who & False
    unmix = Unmix(found, masks, who, int((~batch.prior).sum()))
    with probe_attention(model.unet, unmix) if bool((who.sum(1) > 1).any()) else nullcontext():
        yield unmix


def _nouns(model: Model, caption: str, tokens: Sequence[str]) -> list[int]:
    """The last token of each subject's noun; 0, the start, for one that isn't named."""
    prompt = model.tokenize(caption)
    places = dict.fromkeys(tokens, 0)
    for span in prompt.spans:
        read = covered(prompt, *span.noun)
        if span.token in places and read:
            places[span.token] = read[-1]
    return list(places.values())
