"""What a request's start noise is made of: subjects cut out of photos, and where each is to begin.

A request must paint the same picture again, long after the photos were moved. So it holds the cut-outs themselves; in a
recipe they stand by their SHA-256, and the workspace keeps each once, as cutouts/<sha256>.png. A picture from another
workspace can be made again where those files are, as it needs its concepts there. Everything else that the first noise
follows from is in the request: seeds, size, gamma, places, sizes (see `pipelines.start_noise`).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.collage import Piece
from pipelines.errors import StudioError
from pipelines.files import printable, spare_disk, write_atomic
from pipelines.layout import Region
from pipelines.photos import MAX_PIXELS

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.workspace import Workspace

FOLDER = "cutouts"
LARGEST_GAMMA = 20.0
MOST = 1000  # cut-outs of one request
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Cutout:
    """A subject cut out of one photo. `word` is whose it is, as the prompt has it ("<my-cat>"); `png` holds the box
    around it with its mask as alpha, b"" where only its hash is known."""

    word: str
    sha256: str
    png: bytes = field(default=b"", repr=False, compare=False)

    @classmethod
    def of(cls, piece: Piece) -> Cutout:
        """From what `pipelines.collage.cut_out` gives."""
        buffer = io.BytesIO()
        Image.fromarray(np.dstack([piece.image, piece.mask])).save(buffer, "PNG")
        return cls(piece.name, hashlib.sha256(buffer.getvalue()).hexdigest(), buffer.getvalue())

    @cached_property
    def piece(self) -> Piece:
        """Picture and mask. StudioError when only the hash is known."""
        if not self.png:
            raise StudioError(
                f"The cut-out of '{printable(self.word)}' that the picture begins with is not in this workspace. Open "
                "the workspace it was made in, or leave the start noise out."
            )
        with Image.open(io.BytesIO(self.png), formats=["PNG"]) as image:
            pixels = np.asarray(image)
        return Piece(self.word, np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3]))


@dataclass(frozen=True)
class StartNoise:
    """A first noise that holds a faint collage. Who stands where: `places`, where there are any; else, with
    `in_layout`, the request's own layout; else a random collage for each seed.

    `gamma` is how strongly it shows (0 = not at all: the plain noise, bit for bit). `sizes` are shares of the size that
    fits, by word, for random collages.
    """

    cutouts: tuple[Cutout, ...]
    gamma: float = 2.0
    places: tuple[Region, ...] = ()
    in_layout: bool = False
    sizes: tuple[tuple[str, float], ...] = ()

    @property
    def words(self) -> list[str]:
        """Whose cut-outs there are, in order."""
        return list(dict.fromkeys(one.word for one in self.cutouts))

    def regions(self, layout: Layout | None) -> tuple[Region, ...]:
        """Where things are to begin; () = anywhere."""
        if self.places or not self.in_layout:
            return self.places
        return tuple(one for one in (layout.regions if layout else ()) if one.words.strip() in self.words)

    def check(self, layout: Layout | None) -> None:
        """StudioError for what can't be laid out."""
        if not (math.isfinite(self.gamma) and 0 <= self.gamma <= LARGEST_GAMMA):
            raise StudioError(
                f"A start noise shifted {self.gamma:g} times can't be painted. Choose 0 (off) to 4; 2 is usual."
            )
        if not 0 < len(self.cutouts) <= MOST:
            raise StudioError("A start noise needs photos of the subjects with their masks. Name the folder.")
        placed = {region.words.strip() for region in self.regions(layout)}
        for region in self.places:
            region.check()
            if region.words.strip() not in self.words:
                raise StudioError(
                    f"A place is marked for '{printable(region.words)}', of which no photo with a mask was given. "
                    f"There are photos of: {printable(', '.join(self.words))}."
                )
        missing = [word for word in self.words if word not in placed]
        if (self.places or self.in_layout) and missing:
            raise StudioError(
                f"No place is marked for {printable(', '.join(missing))}. Mark one, or let chance choose."
            )
        for word, size in self.sizes:
            if word not in self.words or not 0 < size <= 1:
                raise StudioError(
                    f"'{printable(word)}' can't begin at {size:g} of the size that fits. Choose more than 0, up to 1, "
                    f"for one of: {printable(', '.join(self.words))}."
                )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, the cut-outs by their hashes."""
        places = [[one.words, one.occurrence, one.weight, one.area.to_json()] for one in self.places]
        return {
            "cutouts": [[one.word, one.sha256] for one in self.cutouts],
            "gamma": self.gamma,
            "places": places,
            "in_layout": self.in_layout,
            "sizes": [list(one) for one in self.sizes],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StartNoise:
        """Without the cut-outs' pixels, see `filled`. ValueError or TypeError for what `to_json` did not make."""
        from pipelines.layout import Area

        cutouts = tuple(Cutout(_text(word), _hashed(sha256)) for word, sha256 in data["cutouts"])
        places = tuple(
            Region(_text(words), Area.from_json(area), occurrence, float(weight))
            for words, occurrence, weight, area in data["places"]
        )
        if type(data["in_layout"]) is not bool:
            raise TypeError("neither yes nor no")
        sizes = tuple((_text(word), float(size)) for word, size in data["sizes"])
        return cls(cutouts, float(data["gamma"]), places, data["in_layout"], sizes)


def chosen(start: StartNoise, prompt: str) -> StartNoise:
    """Of all cut-outs those that a prompt names. StudioError when it names none."""
    named = [word for word in start.words if word.casefold() in prompt.casefold()]
    if not named:
        raise StudioError(
            f"The prompt '{printable(prompt)}' names none of {printable(', '.join(start.words))}, whose photos the "
            "start noise has. Write them into it."
        )
    return replace(
        start,
        cutouts=tuple(one for one in start.cutouts if one.word in named),
        places=tuple(one for one in start.places if one.words.strip() in named),
        sizes=tuple(one for one in start.sizes if one[0] in named),
    )


def filled(workspace: Workspace, start: StartNoise) -> StartNoise:
    """The same with every cut-out's pixels, and all of them kept in the workspace.

    StudioError for one that is known by its hash alone and isn't there, or has changed.
    """
    folder = workspace.root / FOLDER
    with spare_disk(folder, 0):
        folder.mkdir(exist_ok=True)
    return replace(start, cutouts=tuple(_kept(folder, one) for one in start.cutouts))


def _kept(folder: Path, cutout: Cutout) -> Cutout:
    path = folder / f"{_hashed(cutout.sha256)}.png"
    if cutout.png:
        if not path.exists():
            write_atomic(path, cutout.png)
        return cutout
    if not path.is_file():
        return cutout  # told when it is needed
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != cutout.sha256:
        raise StudioError(
            f"The cut-out of '{printable(cutout.word)}' in the workspace has changed, so the picture can't be made "
            "again. Put the old file back, or leave the start noise out."
        )
    _decodable(data)
    return replace(cutout, png=data)


def _decodable(data: bytes) -> None:
    """StudioError for bytes that are no cut-out, however well their hash fits."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode != "RGBA" or image.width * image.height > MAX_PIXELS:
                raise ValueError("no cut-out")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise StudioError("A cut-out in the workspace is damaged. Leave the start noise out.") from error


def cutouts_of(pieces: Sequence[Piece]) -> tuple[Cutout, ...]:
    """Each piece once."""
    return tuple(dict.fromkeys(map(Cutout.of, pieces)))


def _hashed(text: Any) -> str:
    if not isinstance(text, str) or not _HASH.fullmatch(text):
        raise ValueError("not a hash")
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
