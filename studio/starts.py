"""What pictures begin as: MuDI's start noise, a faint collage of the subjects, cut out of photo sets with masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pipelines import Layout, StudioError
from studio.session import Studio
from studio.work import about, photo_folder

if TYPE_CHECKING:
    from pipelines import Photo, StartNoise

MANY = 3  # subjects; for more a stronger collage is usual
Cut = Callable[[tuple[str, ...], tuple[str, ...]], list[Any]]  # photo sets, tokens in use -> pieces


def cutter(studio: Studio) -> Cut:
    """What cuts subjects out of photo sets, once for the same tokens."""
    return cache(lambda sets, tokens: list(_pieces(studio, sets, tokens)))


def start_of(
    studio: Studio, values: Mapping[str, Any], names: Sequence[str], layout: Layout | None, cut: Cut
) -> StartNoise | None:
    """The start noise of the chosen photo sets for the subjects that the prompt names; None where none is chosen.

    `names` are the concepts in use. Things begin where the layout has them, when it has them all. StudioError for sets
    without masks, and for masks that don't say whose they are.
    """
    sets = values["start_photos"] or []
    if not sets:
        return None
    from pipelines import StartNoise, chosen, cutouts_of  # late: they bring torch

    tokens = tuple(
        subject.token for concept in studio.library.concepts() if concept.name in names for subject in concept.subjects
    )
    start = chosen(StartNoise(cutouts_of(cut(tuple(sets), tokens))), values["prompt"] or "")
    written = str(values["start_strength"] or "").strip()
    usual = 2.0 if len(start.words) <= MANY else 3.0
    try:
        strength = float(written) if written else usual
    except ValueError:
        raise StudioError(f"'{written[:20]}' is no strength of a collage. Choose 0 to 4; 2 is usual.") from None
    placed = {region.words.strip() for region in layout.regions} if layout else set()
    sizes = _sizes(str(values["start_sizes"] or ""), start.words, values["prompt"])
    start = replace(start, gamma=strength, in_layout=set(start.words) <= placed, sizes=sizes)
    start.check(layout)
    return start


def _sizes(written: str, words: Sequence[str], prompt: str) -> tuple[tuple[str, float], ...]:
    """ "1 0.5" -> how large each thing begins, in the prompt's order."""
    from pipelines import Subject, relative_sizes

    ordered = sorted(words, key=prompt.find)
    return tuple(relative_sizes(written, [Subject(word, word) for word in ordered]).items())


def _pieces(studio: Studio, sets: Sequence[str], tokens: Sequence[str]) -> Iterator[Any]:
    """Every subject that masks mark in the sets' photos."""
    from pipelines import cut_out, load_photos

    photos = {each: load_photos(photo_folder(studio, each), short_side=studio.base.native_size) for each in sets}
    for each, own in photos.items():
        if not any(photo.masks for photo in own):
            title = next((f"'{one.title}'" for one in studio.datasets.all() if one.id == each), "the example")
            raise StudioError(
                f"The photos of {title} to begin with have no masks. Find or paint them in the Train tab."
            )
    given = _in_order(studio, photos, tokens)
    for each, own in photos.items():
        for photo in own:
            for name, mask in photo.masks.items():
                whose = given.get(each) or (f"<{name}>" if name else _only(studio, each, tokens))
                yield cut_out(whose, photo.image, mask)


def _in_order(studio: Studio, photos: Mapping[str, Sequence[Photo]], tokens: Sequence[str]) -> dict[str, str]:
    """Whose the sets are that name nobody in use: with as many of them as other tokens, they take these in order.

    A set whose photos show several things isn't anybody's alone.
    """
    said = {each: {about(studio, each).get("name", "")} for each in photos}
    for each, own in photos.items():
        said[each].update(name for photo in own for name in photo.masks)
    named = {name for names in said.values() for name in names}
    silent = [each for each in photos if not {f"<{name}>" for name in said[each]} & set(tokens)]
    free = [token for token in tokens if token.strip("<>") not in named]
    several = [each for each in silent if any(len(photo.masks) > 1 for photo in photos[each])]
    return dict(zip(silent, free, strict=True)) if len(silent) == len(free) and not several else {}


def _only(studio: Studio, dataset: str, tokens: Sequence[str]) -> str:
    """Whose a mask without a name is: what the set says it shows, if that is learned, else the only concept in use."""
    name = f"<{about(studio, dataset).get('name', '')}>"
    learned = [subject.token for concept in studio.library.concepts() for subject in concept.subjects]
    if name in (*tokens, *learned):
        return name
    if len(tokens) != 1:
        order = " and ".join(tokens) or "the concepts that the prompt names"
        raise StudioError(
            "The masks of the photos to begin with don't say whose they are. Choose a photo set for each of "
            f"{order}, in that order, or name the masks."
        )
    return tokens[0]
