"""Arguments of `generate` that say what pictures begin as: MuDI's start noise, a faint collage of the subjects."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.arguments import Parser
from pipelines.commands.layouts import read_regions
from pipelines.errors import StudioError
from pipelines.files import printable

if TYPE_CHECKING:
    from pipelines.collage import Piece
    from pipelines.concept import Concept
    from pipelines.cutouts import StartNoise
    from pipelines.photos import Photo

AUTO = "auto"


def add_start(parser: Parser) -> None:
    group = parser.add_argument_group(
        "what pictures begin as (MuDI's start noise; for concepts that were learned with collages)"
    )
    group.add_argument(
        "--start-noise",
        nargs="?",
        const=AUTO,
        metavar="GAMMA",
        help="begin as a faint collage of the subjects; how strongly: 0 = not at all, more than 4 turns gaudy "
        '(default: 2, with more than three subjects 3); MuDI paints with --negative "sticker, collage"',
    )
    group.add_argument(
        "--start-photos",
        action="append",
        default=[],
        metavar="[WORD=]DIR",
        help="photos with masks that the subjects are cut out of: x-masklabel-NAME.png is of <NAME>; or a folder of "
        "MuDI's; WORD says whose all of them are; repeatable",
    )
    group.add_argument(
        "--start-place",
        action="append",
        default=[],
        metavar="WORD=WHERE",
        help="where it begins, as for --region (default: where --region has all of them, else by chance)",
    )
    group.add_argument(
        "--counted",
        nargs="?",
        const="objects",
        metavar="WORD",
        help='begin the prompt with "3 objects:" where it names three concepts or more (or "3 animals:"), as MuDI does',
    )
    group.add_argument(
        "--start-size", action="append", default=[], metavar="WORD=SHARE", help="how large, of the size that fits: 0.5"
    )


def check_start(options: argparse.Namespace) -> None:
    """StudioError for what can be told before a model is loaded."""
    if options.start_noise is None:
        if options.start_photos or options.start_place or options.start_size:
            raise StudioError("--start-photos, -place and -size are for --start-noise. Add it, or leave them out.")
        return
    if not options.start_photos:
        raise StudioError("A start noise needs photos with masks of the subjects: --start-photos DIR.")
    for text in options.start_photos:
        _folder(text)
    _gamma(options.start_noise, 2)
    _sizes(options.start_size)


def read_start(
    options: argparse.Namespace, prompts: Sequence[str], concepts: Sequence[Concept], side: int
) -> Callable[[str], StartNoise | None]:
    """What a prompt's pictures begin as. Photos are cut out with their short side at `side` pixels.

    StudioError for photos without masks, a subject that no prompt names, and what can't be meant.
    """
    if options.start_noise is None:
        return lambda prompt: None
    from pipelines.cutouts import StartNoise, chosen, cutouts_of

    for text in options.start_photos:
        word, _ = _folder(text)
        if word and not any(word.casefold() in prompt.casefold() for prompt in prompts):
            raise StudioError(f"No prompt names '{printable(word)}', whose photos are given. Write it into the prompt.")
    pieces = [piece for text in options.start_photos for piece in _pieces(text, concepts, side)]
    places = read_regions(options.start_place, options.layout)
    every = StartNoise(cutouts_of(pieces), 0.0, places, sizes=_sizes(options.start_size))
    drawn = {text.rpartition("=")[0].strip() for text in options.region}

    def start(prompt: str) -> StartNoise:
        one = chosen(every, prompt)
        follow = not one.places and set(one.words) <= drawn
        return replace(one, gamma=_gamma(options.start_noise, 2 if len(one.words) <= 3 else 3), in_layout=follow)

    return start


def _pieces(text: str, concepts: Sequence[Concept], side: int) -> Iterator[Piece]:
    """Every subject that masks mark in a folder's photos."""
    from pipelines.collage import cut_out

    word, folder = _folder(text)
    found = 0
    for photo in _photos(word, folder, concepts, side):
        for name, mask in photo.masks.items():
            whose = word or (f"<{name}>" if name else _only(folder, concepts))
            if word and name and len(photo.masks) > 1 and f"<{name}>" != word:
                continue  # somebody else in the same photo
            found += 1
            yield cut_out(whose, photo.image, mask)
    if not found:
        raise StudioError(
            f"No photo in {printable(folder)} has a mask{f' of {printable(word)}' if word else ''}. Make masks first: "
            "python -m pipelines masks DIR --noun NOUN."
        )


def _photos(word: str, folder: Path, concepts: Sequence[Concept], side: int) -> Sequence[Photo]:
    """The photos; of one of MuDI's folders with the subjects' names."""
    from pipelines.formats import mudi
    from pipelines.photos import load_photos

    if not mudi.is_dataset(folder):
        return load_photos(folder, short_side=side)
    dataset = mudi.read_dataset(folder)
    if word and len(dataset.phrases) > 1:
        raise StudioError(
            f"{printable(folder)} has photos of several subjects, so '{printable(word)}' can't be all of them. Leave "
            "the word out."
        )
    names = [subject.token.strip("<>") for concept in concepts for subject in concept.subjects]
    return mudi.photos_of(dataset, short_side=side, names=_named(list(dataset.phrases), names))


def _named(ids: Sequence[str], names: Sequence[str]) -> dict[str, str] | None:
    """What each id was learned as: itself where it is one of `names`, the others in order where as many are left."""
    known = {id: id for id in ids if id in names}
    left = [id for id in ids if id not in known], [name for name in names if name not in known]
    if len(left[0]) != len(left[1]):
        return known or None
    return known | dict(zip(*left, strict=True))


def _only(folder: Path, concepts: Sequence[Concept]) -> str:
    """Whose a mask without a name is: the only subject's."""
    tokens = [subject.token for concept in concepts for subject in concept.subjects]
    if len(tokens) != 1:
        raise StudioError(
            f"The masks in {printable(folder)} don't say whose they are. Write --start-photos WORD=DIR, with a word of "
            "the prompt."
        )
    return tokens[0]


def _folder(text: str) -> tuple[str, Path]:
    """The word ("" = as the masks say) and the folder."""
    if Path(text).is_dir():
        return "", Path(text)
    word, equals, folder = text.partition("=")
    if not equals or not word.strip() or not Path(folder).is_dir():
        raise StudioError(f"There is no folder '{printable(folder if equals else text)}' with photos. Check the path.")
    return word.strip(), Path(folder)


def _gamma(text: str, usual: float) -> float:
    try:
        return float(usual if text == AUTO else text)
    except ValueError:
        raise StudioError(f"'{printable(text)}' is no strength of a start noise. Choose 0 to 4; 2 is usual.") from None


def _sizes(given: Sequence[str]) -> tuple[tuple[str, float], ...]:
    sizes = []
    for text in given:
        word, _, share = text.rpartition("=")
        try:
            sizes.append((word.strip(), float(share)))
        except ValueError:
            word = ""
        if not word.strip():
            raise StudioError(f"'{printable(text)}' is no size. Write --start-size WORD=SHARE, as in <my-cat>=0.5.")
    return tuple(sizes)
