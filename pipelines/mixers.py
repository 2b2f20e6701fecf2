"""Who is mixed with whom while training, and what the mixed picture is called: Seg-Mix and Cut-Mix as `Mixer`s.

Seg-Mix (MuDI, arXiv 2404.04243, section 4.1): with some probability a photo gives way to a collage of its subject and
another one on white, called "a photo of a <one> and a <other>, simple background."; the last two words keep the white
out of other pictures. Pairs suffice for any number of subjects (appendix B.9); `count` makes larger groups.
Cut-Mix (SVDiff, arXiv 2303.11305, section 3.3): halves of two photos, called by their sides or without.
Class pictures are mixed in the same way, with the nouns in place of the subjects (`of_classes`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from pipelines.collage import Collage, Piece, Recipe, cut_mix, cut_out, seg_mix
from pipelines.errors import StudioError
from pipelines.sources import Source

if TYPE_CHECKING:
    import torch

    from pipelines.concept import Subject

Sides = Literal["always", "sometimes", "never"]


@dataclass
class SegMixer:
    """Collages of subjects on white. `phrases` say what stands for a subject's token in the caption, by token."""

    tokens: tuple[str, ...]
    chance: float = 0.3
    recipe: Recipe = field(default_factory=Recipe)
    count: int = 2
    phrases: Mapping[str, str] = field(default_factory=dict)
    _pieces: dict[tuple[int, str], tuple[Source, Piece]] = field(default_factory=dict, repr=False)

    def check(self, sources: Sequence[Source]) -> None:
        """StudioError when a subject has no photo with a mask of its own, for nothing could be cut out then."""
        known = _photos(sources, self.tokens, masked=True)
        missing = [token for token in self.tokens if token not in known]
        if missing:
            raise StudioError(
                f"Seg-Mix cuts the subjects out of their photos, but no photo has a mask of {' or '.join(missing)} "
                "alone. Draw one, or set mix to 'none'."
            )

    def mix(self, source: Source, others: Sequence[Source], chance: torch.Generator, side: int) -> Source:
        """A collage of a subject of `source` and `count` - 1 others, or `source` itself."""
        group = _group(source, others, self, chance, masked=True)
        if not group:
            return source
        pieces = [self._cut(photo, token) for token, photo in group]
        collage = seg_mix(pieces, (side, side), self.recipe, chance)
        called = self.caption([token for token, _ in group])
        return _mixed(collage, called, side)

    def caption(self, tokens: Sequence[str]) -> str:
        """What a collage of these subjects is called, in the order given and not in that of their places."""
        return f"a photo of {_listed([self.phrases.get(token, token) for token in tokens])}, simple background."

    def _cut(self, source: Source, token: str) -> Piece:
        """Cut out once; the source is kept beside it, for an id is only its own while it lives."""
        key = id(source), token
        if key not in self._pieces:
            self._pieces[key] = source, cut_out(token, source.image, source.masks[token])
        return self._pieces[key][1]


@dataclass
class CutMixer:
    """Halves of two photos. `sides`: whether the caption says which is on the left and which on the right."""

    tokens: tuple[str, ...]
    chance: float = 0.6
    sides: Sides = "sometimes"
    phrases: Mapping[str, str] = field(default_factory=dict)
    count: int = 2

    def check(self, sources: Sequence[Source]) -> None:
        """StudioError when a subject has no photo of its own."""
        known = _photos(sources, self.tokens, masked=False)
        missing = [token for token in self.tokens if token not in known]
        if missing:
            raise StudioError(f"Cut-Mix needs a photo of {' or '.join(missing)} alone. Add one, or set mix to 'none'.")

    def mix(self, source: Source, others: Sequence[Source], chance: torch.Generator, side: int) -> Source:
        """Half of `source` beside half of a photo of another subject, or `source` itself."""
        import torch

        group = _group(source, others, self, chance, masked=False)
        if not group:
            return source
        swap, order, named = (torch.rand(3, generator=chance) < 0.5).tolist()
        left, right = group[::-1] if swap else group
        collage = cut_mix(
            (left[0], left[1].image, left[1].masks.get(left[0])),
            (right[0], right[1].image, right[1].masks.get(right[0])),
            (side, side),
        )
        if self.sides == "always" or (self.sides == "sometimes" and named):
            called = f"a photo of a {self._word(left[0])} on the left and a {self._word(right[0])} on the right"
        else:
            called = f"a photo of {_listed([self._word(token) for token, _ in (group[::-1] if order else group)])}"
        return _mixed(collage, called, side)

    def _word(self, token: str) -> str:
        return self.phrases.get(token, token)


def of_classes(mixer: SegMixer | CutMixer, subjects: Sequence[Subject]) -> SegMixer | CutMixer:
    """The same for class pictures: called by the nouns, at random sizes, at one height and in the order of the caption,
    as MuDI's released code sets them down."""
    nouns = {subject.token: subject.noun for subject in subjects}
    if isinstance(mixer, CutMixer):
        return replace(mixer, phrases=nouns)
    recipe = replace(mixer.recipe, sizes={}, level=True, swap=False)
    return replace(mixer, phrases=nouns, recipe=recipe, _pieces={})


def counted_prompt(prompt: str, things: Sequence[str], word: str = "objects") -> str:
    """`prompt` as the paper paints more than two subjects (MuDI, appendix B.9): "3 objects: a <a>, a <b> and a <c> on
    the sand". With two or fewer of `things` in it, or where it begins so already, it stays as it is."""
    named = [thing for thing in dict.fromkeys(things) if thing in prompt]
    begun = re.match(r"\s*\d+\s+[^:<]+:", prompt)
    return prompt if len(named) < 3 or begun else f"{len(named)} {word}: {prompt}"


def relative_sizes(written: str, subjects: Sequence[Subject]) -> dict[str, float]:
    """ "1 0.5" -> sizes by token, of what fits (MuDI, appendix C.1); {} for "". StudioError for anything else."""
    try:
        sizes = [float(number) for number in written.replace(",", " ").split()]
    except ValueError:
        sizes = [-1.0]
    if not sizes:
        return {}
    if len(sizes) != len(subjects) or not all(0 < size <= 1 for size in sizes):
        raise StudioError(
            f"The relative sizes '{written}' can't be used: write {len(subjects)} numbers from 0 to 1 with spaces "
            "between, one for each subject, such as '1 0.5'."
        )
    return {subject.token: size for subject, size in zip(subjects, sizes, strict=True)}


def _photos(sources: Sequence[Source], tokens: Sequence[str], masked: bool) -> dict[str, list[Source]]:
    """The photos of each subject that it can be taken from: with a mask of its own, or where it is alone."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        for token in tokens:
            if (masked and _separate(source, token)) or (not masked and source.shows == (token,)):
                found.setdefault(token, []).append(source)
    return found


def _separate(source: Source, token: str) -> bool:
    """Whether the subject has a mask that is not another's as well."""
    mask = source.masks.get(token)
    twin = any(other is mask for name, other in source.masks.items() if name != token)
    return mask is not None and not twin and bool((mask > 128).any())


def _group(
    source: Source, others: Sequence[Source], mixer: SegMixer | CutMixer, chance: torch.Generator, *, masked: bool
) -> list[tuple[str, Source]]:
    """Whom to mix: a subject of `source` first, then others, each from one of its photos; [] = nobody this time."""
    import torch

    if float(torch.rand(1, generator=chance, dtype=torch.float64)) >= mixer.chance:
        return []
    known = _photos(others, mixer.tokens, masked)
    mine = [token for token in mixer.tokens if token in _photos([source], mixer.tokens, masked)]
    if not mine:
        return []
    first = mine[_below(len(mine), chance)]
    rest = [token for token in known if token != first]
    if not rest:
        mixer.check(others)
        return []
    order = torch.randperm(len(rest), generator=chance).tolist()[: max(1, mixer.count - 1)]
    partners = [rest[at] for at in order]
    return [(first, source)] + [(token, known[token][_below(len(known[token]), chance)]) for token in partners]


def _below(count: int, chance: torch.Generator) -> int:
    import torch

    return int(torch.randint(count, (1,), generator=chance))


def _mixed(collage: Collage, called: str, side: int) -> Source:
    return Source(collage.image, called, (side, side), dict(collage.masks), tuple(collage.masks), mixed=True)


def _listed(things: Sequence[str]) -> str:
    """ "a x", "a x and a y", "a x, a y and a z"."""
    words = [f"a {thing}" for thing in things]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
