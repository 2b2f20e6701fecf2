"""What a base sees of nouns in a picture: the beginning of every mask (iSeg, before its refinement)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.attention.gaze import Gaze, Grid, clean_latents, cross_levels, fitted, look_at, resized, self_sites
from pipelines.attention.refine import boosted, smoothed
from pipelines.errors import StudioError
from pipelines.text import TextStates, covered

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.masks import MaskParams
    from pipelines.model import Model


@dataclass(frozen=True)
class Seen:
    """One picture, looked at with a sentence about its nouns."""

    columns: Tensor  # (cells, nouns) >= 0: cross-attention on the finest grid
    links: Tensor  # (cells, cells): self-attention there, rows sum to 1
    grid: Grid


def look_for(model: Model, image: Picture, nouns: Sequence[str], params: MaskParams) -> Seen:
    """Cross-attention of each noun (mean over its tokens) and self-attention, averaged over heads and noise draws.

    Each layer group's columns are divided by their sums before levels are mixed. StudioError for nouns that can't be
    told apart or read.
    """
    text, spots = read_nouns(model, nouns, params)
    everywhere = sorted({position for spot in spots for position in spot})
    text = replace(text, states=boosted(text.states, everywhere, params.boost))
    levels = cross_levels(model)
    weights = _weights(list(levels), params.coarse)
    gaze = Gaze([name for level in weights for name in levels[level]], self_sites(model, params.layers))
    latents = clean_latents(model, fitted(model, image))
    look_at(model, latents, text, gaze, timestep=params.timestep, draws=params.draws, seed=params.seed)
    links, grid = gaze.links()
    columns = links.new_zeros(len(links), text.states.shape[1])
    for level, weight in weights.items():
        words, own = gaze.words(level)
        columns += weight * resized(words / words.sum(0, keepdim=True).clamp(min=1e-12), own, grid)
    if params.clusters:
        columns = smoothed(columns, grid, params.clusters)
    return Seen(torch.stack([columns[:, spot].mean(1) for spot in spots], 1), links, grid)


def read_nouns(model: Model, nouns: Sequence[str], params: MaskParams) -> tuple[TextStates, list[list[int]]]:
    """A sentence with all the nouns as the base reads it, and each noun's positions in it."""
    _check(nouns)
    sentence, places = _sentence(nouns, params)
    text = model.encode([sentence])
    spots = [covered(text.prompts[0], start, end) for start, end in places]
    for noun, spot, (_, end) in zip(nouns, spots, places, strict=True):
        if not spot or max(last for _, last in text.prompts[0].offsets) < end:
            raise StudioError(
                f"The sentence with all the nouns is too long to read '{noun}'. Name fewer or shorter ones."
            )
    return text, spots


def _sentence(nouns: Sequence[str], params: MaskParams) -> tuple[str, list[tuple[int, int]]]:
    """The prompt with the nouns in it, and the characters of each."""
    before, _, after = params.prompt.partition("{}")
    text, places = before, []
    for number, noun in enumerate(nouns):
        text += " and " if number else ""
        if params.articles:
            text += "an " if noun[0].lower() in "aeiou" else "a "
        places.append((len(text), len(text) + len(noun)))
        text += noun
    return text + after, places


def _check(nouns: Sequence[str]) -> None:
    if not nouns:
        raise StudioError("There is no noun to look for. Name what the photos show, such as 'cat'.")
    for noun in nouns:
        if not re.search(r"\w", noun) or re.search(r"[<>{}\n]", noun):
            raise StudioError(f"'{noun}' is no noun to look for in a photo. Use an ordinary word, such as 'cat'.")
    folded = [" ".join(noun.lower().split()) for noun in nouns]
    twice = [noun for noun in nouns if folded.count(" ".join(noun.lower().split())) > 1]
    if twice:
        raise StudioError(
            f"'{twice[0]}' is named twice, and one word can't have two masks. Tell them apart ('black cat', 'white "
            "cat'), or paint their masks."
        )


def _weights(levels: Sequence[int], coarse: float) -> dict[int, float]:
    """Of the coarsest level and the next finer one; of the only one, if there is just that."""
    weights = {levels[0]: 1.0} if len(levels) == 1 else {levels[0]: coarse, levels[1]: 1 - coarse}
    return {level: weight for level, weight in weights.items() if weight}
