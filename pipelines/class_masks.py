"""Class pictures with masks, painted by the base itself: MuDI's prior set, as a folder with `class_metadata.jsonl`.

Paper: Jang et al. 2024 (MuDI), arXiv 2404.04243, section 4.1. The released code asks for "simple background, full body
view ...", looks for exactly one thing of the class (OWLv2), cuts it out (Segment Anything), and tries ten times.
Departures: what finds and cuts is handed in; the metadata file, which there is written by hand, is written here; and a
picture that never came out right is left out and told, where it is there kept without a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.captions import article
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Note, Progress, Snapshot
from pipelines.formats.mudi import CLASS_FILE, write_dataset
from pipelines.generate import generate
from pipelines.photos import Photo
from pipelines.request import Request

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.model import Model
    from pipelines.photos import Mask

Find = Callable[["Picture", str], "Mask | None"]  # the mask of the one thing of that class; None when not exactly one

STAGE = "class pictures"
SURE = 0.4  # of a detector, as MuDI: surer than for photos, and only photos' boxes are widened
SEEN = 0.02, 0.9  # the share of a picture that a usable mask covers
PROMPT = "A photo of {} {}, simple background, full body shot."
NEGATIVE = "anime, cartoon, graphic, text, painting, crayon, graphite, abstract glitch, blurry"


@dataclass(frozen=True)
class ClassWish:
    """How many pictures of each class, and how they are painted. `prompt` has places for the article and the class."""

    each: int = 50
    tries: int = 10
    prompt: str = PROMPT
    negative: str = NEGATIVE
    steps: int = 50
    guidance: float | None = None  # None: what suits the base
    size: int = 0  # side in pixels, 0 = the base's own
    seed: int = 0

    def check(self, folder: Path) -> None:
        """StudioError for what can't work, before a model is loaded."""
        if (folder / CLASS_FILE).exists():
            raise StudioError(f"{folder / CLASS_FILE} is already there. Choose another folder.")
        if self.each < 1 or self.tries < 1:
            raise StudioError("At least one picture and one try are needed. Give higher numbers.")
        if self.prompt.count("{}") != 2:
            raise StudioError("The prompt needs {} twice, for the article and for the class. Write it so.")

    def words(self, noun: str) -> str:
        """The prompt for a class."""
        before, between, after = self.prompt.split("{}")
        return f"{before}{article(noun)}{between}{noun}{after}"


def by_attention(model: Model, cache: Path | None = None) -> Find:
    """Find a class by the base's own attention (`pipelines.masks`); None where it covers next to nothing or nearly all.

    Attention doesn't count things, so pictures of two of the class are taken too. `cache` as in `refined_masks`.
    """

    def find(picture: Picture, noun: str) -> Mask | None:
        from pipelines.masks import refined_masks

        looked = refined_masks(model, [Photo(Path("a class picture"), picture)], [noun], cache=cache)
        (found,) = [event.value[0] for event in looked if isinstance(event, Finished)]
        mask: Mask = found[noun].picture()
        return mask if SEEN[0] <= float((mask > 128).mean()) <= SEEN[1] else None

    return find


def class_finder(
    model: Model, detector: str = "", segmenter: str = "", sure: float = SURE, cache: Path | None = None
) -> Find:
    """By attention; or by a `detector` ("toybox", or an OWLv2 by Hub id or folder) that is at least so `sure`.

    Its boxes are cut out by Segment Anything from the checkpoint `segmenter`, "" = the embedded. `cache` as in
    `by_attention`. StudioError as `check_segmenter`.
    """
    if not detector:
        return by_attention(model, cache)
    from pipelines.evaluate.eyes import detector as named
    from pipelines.marked_masks import Finder, by_detector
    from pipelines.segmenter import check_segmenter, load_segmenter

    check_segmenter(segmenter, model.kind, detector)
    device = str(model.device)
    finder = Finder(named(detector, threshold=sure, device=device), margin=0.0)
    return by_detector(load_segmenter(segmenter, device), finder)


def masked_class_pictures(
    model: Model, classes: Mapping[str, str], find: Find, folder: Path, wish: ClassWish | None = None
) -> Iterator[Event]:
    """Paint and mask each of `classes` (subject's name -> its noun) into the new `folder`.

    Yields Progress, a Note for a picture that is left out, and ends with Finished(the metadata file). Closed earlier it
    writes what it has, when that is at least one picture of each class. StudioError when no picture of a class shows
    exactly one thing of it; nothing is written then.
    """
    wish = wish or ClassWish()
    wish.check(folder)
    kept: dict[str, list[Photo]] = {name: [] for name in classes}

    def write() -> Path:
        return write_dataset(folder, classes, [photo for photos in kept.values() for photo in photos], CLASS_FILE)

    try:
        yield from _painted(model, classes, find, wish, kept)
    except GeneratorExit:
        if all(kept.values()):
            write()
        raise
    yield Finished(write())


def _painted(
    model: Model, classes: Mapping[str, str], find: Find, wish: ClassWish, kept: dict[str, list[Photo]]
) -> Iterator[Event]:
    """One of each class, then the next of each, so that what is there when it is stopped can be used."""
    step, total = 0, wish.each * len(classes)
    for number in range(wish.each):
        for position, (name, noun) in enumerate(classes.items()):
            first = wish.seed + (position * wish.each + number) * wish.tries
            photo = None
            for photo in _tries(model, name, noun, find, wish, first):
                if photo is None:
                    yield Progress(STAGE, step, total)  # where a stop may come in: a try is a whole picture
            if photo is not None:
                kept[name].append(photo)
            elif not kept[name]:  # the next ones would not do better
                raise StudioError(
                    f"In {wish.tries} pictures the base never painted exactly one {noun} that could be cut out. "
                    "Use a plainer noun, or class pictures without masks."
                )
            else:
                yield Note(f"Picture {number + 1} of '{noun}' never showed exactly one; it was left out.")
            step += 1
            yield Progress(STAGE, step, total)


def _tries(model: Model, name: str, noun: str, find: Find, wish: ClassWish, first: int) -> Iterator[Photo | None]:
    """A picture for each try: None while the class is not found exactly once on it, at most `tries` times."""
    for seed in range(first, first + wish.tries):
        request = Request(
            wish.words(noun),
            wish.negative or None,
            seeds=(seed,),
            steps=wish.steps,
            guidance=wish.guidance,
            width=wish.size,
            height=wish.size,
            preview_every=0,
        )
        (image,) = [event.image for event in generate(model, request) if isinstance(event, Snapshot)]
        mask = None if image is None else find(image, noun)
        if image is not None and mask is not None and (mask > 128).any():
            text = f"A photo of {article(noun)} {noun}"
            yield Photo(Path(f"{name}-{seed}.png"), image, {name: mask}, text, image.shape[1::-1], (name,))
            return
        yield None
