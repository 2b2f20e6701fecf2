"""What training learns from: pictures at the training resolution with their captions and one mask a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pipelines.captions import caption
from pipelines.errors import StudioError

if TYPE_CHECKING:
    import torch

    from pipelines.concept import Subject
    from pipelines.events import Picture
    from pipelines.photos import Mask, Photo

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Source:
    """One picture to learn from, its short side at the training resolution.

    `masks` are the subjects' masks by token ("<my-cat>"); `shows` are the tokens of the subjects in the picture;
    `mixed` tells a collage from a photo. A picture may have `others` beside its caption: each step draws one.
    """

    image: Picture  # (height, width, 3)
    caption: str
    original: Size
    masks: dict[str, Mask] = field(default_factory=dict)
    shows: tuple[str, ...] = ()
    mixed: bool = False
    others: tuple[str, ...] = ()

    def told(self, chance: torch.Generator) -> Source:
        """With one of its captions, drawn from `chance`."""
        if not self.others:
            return self
        import torch

        texts = (self.caption, *self.others)
        return replace(self, caption=texts[int(torch.randint(len(texts), (), generator=chance))])

    @property
    def mask(self) -> Mask | None:
        """All subjects' masks as one, (height, width) uint8; None where there is none."""
        return np.maximum.reduce(list(self.masks.values())) if self.masks else None


class ClassPicture(NamedTuple):
    """A picture of a whole kind, for prior preservation: `words` is its prompt, or several in a line each; `token` the
    subject of that kind."""

    image: Picture  # (height, width, 3)
    words: str
    token: str = ""  # "<my-cat>"; "" = of none, so it is not mixed
    mask: Mask | None = None  # of the thing it shows


class Mixer(Protocol):
    """Makes a new picture of several: collages that teach a model to keep subjects apart."""

    def check(self, sources: Sequence[Source]) -> None:
        """StudioError when these can't be mixed, so that it is told before training."""
        ...

    def mix(self, source: Source, others: Sequence[Source], chance: torch.Generator, side: int) -> Source:
        """A `side` x `side` picture with its own caption and masks, or `source` itself where this row isn't mixed.

        Every random choice is drawn from `chance`.
        """
        ...


def photo_source(photo: Photo, subjects: Sequence[Subject], resolution: int, *, masked: bool) -> Source:
    """A photo as a source. `photo.shows` says which subjects are in it, () = all; every line of its caption is one.

    StudioError when a caption names none of them, and when `masked` asks for a mask that isn't there.
    """
    shown = [subject for subject in subjects if not photo.shows or _name(subject) in photo.shows]
    own = _masks(photo, shown)
    once = {id(mask): scaled(mask, resolution) for mask in own.values()}  # one mask for two stays one: see SegMixer
    masks = {token: once[id(mask)] for token, mask in own.items()}
    if masked and not masks:
        names = ", ".join(_name(subject) for subject in shown)
        others = f" (there is one for {', '.join(photo.masks)})" if photo.masks else ""
        raise StudioError(
            f"{photo.path.name} has no mask of {names}{others}. Draw {photo.path.stem}-masklabel.png, "
            "or train without masks."
        )
    texts = [caption(line, shown, photo.path.name) for line in (photo.caption or "").splitlines() or [""]]
    width, height = photo.size
    original = (height, width) if width else (photo.image.shape[0], photo.image.shape[1])
    tokens = tuple(subject.token for subject in shown)
    return Source(scaled(photo.image, resolution), texts[0], original, masks, tokens, others=tuple(texts[1:]))


def class_source(picture: ClassPicture, resolution: int) -> Source:
    """A class picture with its prompts; whose kind it is of, and the mask, matter only where it is mixed."""
    image, words, token, mask = picture
    masks = {} if mask is None or not token else {token: scaled(mask, resolution)}
    size = (image.shape[0], image.shape[1])
    first, *others = words.splitlines()
    return Source(scaled(image, resolution), first, size, masks, (token,) if token else (), others=tuple(others))


def scaled(picture: Picture, short_side: int) -> Picture:
    """`picture` with its short side at `short_side` pixels."""
    height, width = picture.shape[:2]
    scale = short_side / min(height, width)
    if scale == 1:
        return np.ascontiguousarray(picture)
    sides = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(sides, Image.Resampling.BICUBIC))


def _masks(photo: Photo, shown: Sequence[Subject]) -> dict[str, Mask]:
    """By token. The mask without a name is that of the only subject; with several it stands for them all."""
    found = {subject.token: photo.masks[_name(subject)] for subject in shown if _name(subject) in photo.masks}
    if "" in photo.masks:
        for subject in shown:
            own = found.get(subject.token)
            if own is None:
                found[subject.token] = photo.masks[""]
            elif len(shown) == 1:
                found[subject.token] = np.maximum(own, photo.masks[""])
    return found


def _name(subject: Subject) -> str:
    return subject.token.strip("<>")
