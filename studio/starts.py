"""What pictures begin as: MuDI's start noise, a faint collage of the subjects, cut out of photo sets with masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pipelines import Layout, StudioError
from studio.session import Studio
from studio.work import photo_folder

if TYPE_CHECKING:
    from pipelines import StartNoise

MANY = 3  # subjects; for more a stronger collage is usual
Cut = Callable[[str, tuple[str, ...]], list[Any]]  # photo set, tokens in use -> pieces


def cutter(studio: Studio) -> Cut:
    """What cuts subjects out of photo sets, each set once."""
    return cache(lambda dataset, tokens: list(_pieces(studio, dataset, tokens)))


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
    pieces = [piece for dataset in sets for piece in cut(dataset, tokens)]
    start = chosen(StartNoise(cutouts_of(pieces)), values["prompt"] or "")
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


def _pieces(studio: Studio, dataset: str, tokens: Sequence[str]) -> Iterator[Any]:
    """Every subject that masks mark in a set's photos."""
    from pipelines import cut_out, load_photos

    photos = load_photos(photo_folder(studio, dataset), short_side=studio.base.native_size)
    if not any(photo.masks for photo in photos):
        raise StudioError("The photos to begin with have no masks. Find or paint them in the Train tab first.")
    for photo in photos:
        for name, mask in photo.masks.items():
            yield cut_out(f"<{name}>" if name else _only(studio, dataset, tokens), photo.image, mask)


def _only(studio: Studio, dataset: str, tokens: Sequence[str]) -> str:
    """Whose a mask without a name is: what the set says it shows, else the only concept in use."""
    name = studio.datasets.about(dataset).get("name") if dataset in {each.id for each in studio.datasets.all()} else ""
    if name:
        return f"<{name}>"
    if len(tokens) != 1:
        raise StudioError(
            "The masks of the photos to begin with don't say whose they are. Use one concept, or name its masks."
        )
    return tokens[0]
