"""What is done to a photo each time it is learned from, beside cropping: mirrored and turned by chance.

AttnDreamBooth's released code turns three photos of four by up to 45 degrees, with black corners, before anything else,
and mirrors one of four. Departures: bicubic rather than nearest; corners may be filled with the mirrored photo, so that
black ones are not learned; masks turn along, and no corner is ever the subject.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from pipelines.sources import scaled

if TYPE_CHECKING:
    import torch

    from pipelines.events import Picture
    from pipelines.sources import Source

Corners = Literal["mirror", "black"]


@dataclass(frozen=True)
class Augment:
    """`degrees` is the most that a photo is turned to either side, 0 = never; `flip_chance` counts where photos are
    mirrored at all."""

    degrees: float = 0.0
    chance: float = 0.75
    corners: Corners = "mirror"
    flip_chance: float = 0.5

    def turned(self, source: Source, chance: torch.Generator, side: int) -> Source:
        """The photo turned by a random angle, its short side at `side` pixels again, or `source` itself."""
        import torch

        if not self.degrees:
            return source
        often, where = torch.rand(2, generator=chance, dtype=torch.float64).tolist()
        if often >= self.chance:
            return source
        angle = (2 * where - 1) * self.degrees
        image = turn(source.image, angle, self.corners)
        masks = {token: scaled(turn(mask, angle, "black"), side) for token, mask in source.masks.items()}
        high, wide = (now / before for now, before in zip(image.shape[:2], source.image.shape[:2], strict=True))
        original = round(source.original[0] * high), round(source.original[1] * wide)
        return replace(source, image=scaled(image, side), masks=masks, original=original)


def turn(picture: Picture, angle: float, corners: Corners) -> Picture:
    """A picture (height, width) or (height, width, 3) turned counter-clockwise by `angle` degrees, all of it to be seen
    on a larger canvas."""
    height, width = picture.shape[:2]
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    tall, broad = math.ceil(height * cosine + width * sine), math.ceil(width * cosine + height * sine)
    reach = math.hypot(tall, broad)
    pads = [(room := max(0, math.ceil((reach - own) / 2)), room) for own in (height, width)]
    rest = [(0, 0)] * (picture.ndim - 2)
    padded = np.pad(picture, [*pads, *rest], mode="constant" if corners == "black" else "symmetric")
    image = np.asarray(Image.fromarray(padded).rotate(angle, Image.Resampling.BICUBIC))
    top, left = (image.shape[0] - tall) // 2, (image.shape[1] - broad) // 2
    return np.ascontiguousarray(image[top : top + tall, left : left + broad])
