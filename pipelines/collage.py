"""Collages: subjects cut out along their masks and set on white (Seg-Mix), or halves of two photos (Cut-Mix).

Seg-Mix: Jang et al., "Identity Decoupling for Multi-Subject Personalization of Text-to-Image Models" (MuDI), NeurIPS
2024, arXiv 2404.04243, section 4.1 and appendix B.2. Cut-Mix: Han et al., "SVDiff", ICCV 2023, arXiv 2303.11305,
section 3.3. Pure: pictures and a generator in, a picture with its masks out.

Every length is a share of the canvas, such that a canvas of 1024 pixels and two subjects are the released code's own
numbers: they fit a box of 480 x 992, stand 1 to 256 pixels from the left and the right edge and at any height, and are
0.75 to 1 times as large as fits. More than three stand in rows. Departures: the last row and column of a subject's box
are kept (there they are cut off), and any number of subjects, on a canvas that need not be square, is composed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipelines.errors import StudioError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from pipelines.events import Picture
    from pipelines.photos import Mask

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive
Size = tuple[int, int]  # height, width in pixels
Cell = tuple[float, float, float, float]  # left, top, right, bottom in pixels

WHITE = 255
SEEN, USED = (
    128,
    122,
)  # a mask's box counts pixels above the first; once resized, pixels above the second are the subject


@dataclass(frozen=True)
class Piece:
    """One subject cut out of a photo: its box, and the mask in it."""

    name: str
    image: Picture  # (height, width, 3)
    mask: Mask  # (height, width), 255 = subject


@dataclass(frozen=True)
class Collage:
    """A picture of several subjects. `masks` are what is visible of each, (height, width) uint8, 255 or 0."""

    image: Picture  # (height, width, 3)
    masks: dict[str, Mask]
    boxes: dict[str, Box]  # of each piece as it was set, also where another covers it

    @property
    def mask(self) -> Mask:
        """All subjects as one."""
        return np.maximum.reduce(list(self.masks.values()))


@dataclass(frozen=True)
class Recipe:
    """How pieces are sized and placed."""

    smallest: float = 0.75  # of the size that fits
    largest: float = 1.0
    margin: float = 0.5  # of a cell: how far the outermost pieces may stand from the edge
    gutter: float = 1 / 32  # of the canvas: how much smaller than its cell a piece is
    sizes: Mapping[str, float] = field(default_factory=dict)  # by name, of the size that fits; then nothing is random
    flip: bool = False  # mirror each piece by chance
    swap: bool = True  # who stands where is random; else they stand in the order given
    level: bool = False  # all at the same height

    def scale(self, name: str, chance: float) -> float:
        """How large a piece is, as a share of what fits."""
        if self.sizes:
            return self.sizes.get(name, 1.0)
        return self.smallest + (self.largest - self.smallest) * chance


@dataclass(frozen=True)
class _Set:
    """A piece at its size and place."""

    piece: Piece
    left: int
    top: int

    @property
    def box(self) -> Box:
        height, width = self.piece.mask.shape
        return self.left, self.top, self.left + width, self.top + height


def cut_out(name: str, image: Picture, mask: Mask) -> Piece:
    """The subject that `mask` (height, width) marks in `image`. StudioError when it marks nothing."""
    rows, columns = np.nonzero(np.any(mask > SEEN, axis=1))[0], np.nonzero(np.any(mask > SEEN, axis=0))[0]
    if not len(rows):
        raise StudioError(f"The mask of {name} is empty, so there is nothing to cut out. Paint the subject white.")
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return Piece(name, np.ascontiguousarray(image[box]), np.ascontiguousarray(mask[box]))


def seg_mix(pieces: Sequence[Piece], size: Size, recipe: Recipe, chance: torch.Generator) -> Collage:
    """The pieces side by side on white, each at a random size and place, overlapping where they happen to.

    The same draws are made whatever the recipe says, so that no setting shifts another's. StudioError for names that
    stand twice, and for more pieces than the canvas has room for.
    """
    import torch

    count = len(pieces)
    names = [piece.name for piece in pieces]
    if len(set(names)) != count or not count:
        raise StudioError(f"A collage shows each subject once, not {', '.join(names) or 'nobody'}. Choose others.")
    draws = torch.rand((count, 4), generator=chance, dtype=torch.float64).tolist()
    places = torch.randperm(count, generator=chance).tolist()
    order = torch.randperm(count, generator=chance).tolist()
    cells = [_cell(place if recipe.swap else number, count, size) for number, place in enumerate(places)]
    scaled = []
    for piece, cell, (scale, mirrored, _, _) in zip(pieces, cells, draws, strict=True):
        fitted = _fitted(piece, _room(cell, size, recipe), recipe.scale(piece.name, scale))
        scaled.append(_mirrored(fitted) if recipe.flip and mirrored < 0.5 else fitted)
    tallest = max(len(piece.mask) for piece in scaled)
    set_down = []
    for piece, cell, (_, _, across, down) in zip(scaled, cells, draws, strict=True):
        left = _left(piece.mask.shape[1], cell, size[1], recipe.margin, across)
        top = _top(tallest, cell, draws[0][3]) if recipe.level else _top(len(piece.mask), cell, down)
        set_down.append(_Set(piece, left, top))
    return _composed(set_down, order, size)


def set_in(pieces: Sequence[Piece], regions: Mapping[str, Mask], size: Size) -> Collage:
    """Each piece as large as fits into its region's box and in its middle, cut off at the region's edge.

    `regions` are masks (height, width), 255 = here, by the pieces' names; a whole rectangle is a painted box. Later
    pieces lie on earlier ones. StudioError for a region that is empty, missing, or of another size than the canvas.
    """
    set_down = []
    for piece in pieces:
        region = regions.get(piece.name)
        if region is None or not (region > SEEN).any():
            raise StudioError(f"No place is marked for {piece.name}. Draw its box or paint its region.")
        if region.shape != size:
            raise StudioError(
                f"The region of {piece.name} has {region.shape[1]} x {region.shape[0]} pixels, the picture "
                f"{size[1]} x {size[0]}. Paint it at the picture's size."
            )
        marked = cut_out(piece.name, region[..., None].repeat(3, 2), region)
        top = int(np.nonzero(np.any(region > SEEN, axis=1))[0][0])
        left = int(np.nonzero(np.any(region > SEEN, axis=0))[0][0])
        height, width = marked.mask.shape
        fitted = _fitted(piece, (height, width), 1.0)
        tall, wide = fitted.mask.shape
        down, across = (height - tall) // 2, (width - wide) // 2
        inside = marked.mask[down : down + tall, across : across + wide]
        cut = Piece(piece.name, fitted.image, np.where(inside > SEEN, fitted.mask, 0).astype(np.uint8))
        set_down.append(_Set(cut, left + across, top + down))
    return _composed(set_down, range(len(set_down)), size)


def box_region(box: tuple[float, float, float, float], size: Size) -> Mask:
    """A box (left, top, right, bottom as shares of the canvas) as a region. StudioError when it has no area."""
    height, width = size
    left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in box)
    columns, rows = (round(left * width), round(right * width)), (round(top * height), round(bottom * height))
    if columns[1] <= columns[0] or rows[1] <= rows[0]:
        raise StudioError(f"The box {', '.join(f'{value:g}' for value in box)} has no area. Draw it larger.")
    region = np.zeros(size, np.uint8)
    region[rows[0] : rows[1], columns[0] : columns[1]] = 255
    return region


def cut_mix(left: tuple[str, Picture, Mask | None], right: tuple[str, Picture, Mask | None], size: Size) -> Collage:
    """The half of one photo beside the half of another: (name, photo, its mask or None) each.

    A half is as tall as the photo and centred on its mask, or on the photo where there is none; its whole half is then
    the subject's region.
    """
    height, width = size
    halves = [
        _half(left[1], left[2], (height, width // 2)),
        _half(right[1], right[2], (height, width - width // 2)),
    ]
    image = np.concatenate([half[0] for half in halves], axis=1)
    masks, boxes = {}, {}
    for (name, _, _), (_, mask), start in zip((left, right), halves, (0, width // 2), strict=True):
        masks[name] = np.zeros(size, np.uint8)
        masks[name][:, start : start + mask.shape[1]] = mask
        boxes[name] = (start, 0, start + mask.shape[1], height)
    return Collage(np.ascontiguousarray(image), masks, boxes)


def _half(image: Picture, mask: Mask | None, size: Size) -> tuple[Picture, Mask]:
    """A window of `size` out of a photo, which is first brought to the window's height."""
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1])
    sides = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    photo = _resized(image, sides)
    marks = np.full(photo.shape[:2], 255, np.uint8) if mask is None else _resized(mask, sides)
    columns, rows = np.nonzero(np.any(marks > USED, axis=0))[0], np.nonzero(np.any(marks > USED, axis=1))[0]
    middle = (columns[0] + columns[-1] + 1) / 2 if len(columns) else sides[0] / 2
    centre = (rows[0] + rows[-1] + 1) / 2 if len(rows) else sides[1] / 2
    x = min(max(round(middle - width / 2), 0), sides[0] - width)
    y = min(max(round(centre - height / 2), 0), sides[1] - height)
    window = slice(y, y + height), slice(x, x + width)
    return photo[window], np.where(marks[window] > USED, 255, 0).astype(np.uint8)


def _cell(place: int, count: int, size: Size) -> Cell:
    """The cell of one place: up to three stand in a row, the first rows are full.

    Equal columns: of two, each has half of the canvas.
    """
    lines = -(-count // 3)
    full, long_lines = divmod(count, lines)
    lengths = [full + (line < long_lines) for line in range(lines)]
    line = 0
    while place >= lengths[line]:
        place, line = place - lengths[line], line + 1
    width, height = size[1] / lengths[line], size[0] / lines
    return place * width, line * height, (place + 1) * width, (line + 1) * height


def _room(cell: Cell, size: Size, recipe: Recipe) -> tuple[float, float]:
    """Height and width that a piece may have."""
    height, width = size
    return cell[3] - cell[1] - height * recipe.gutter, cell[2] - cell[0] - width * recipe.gutter


def _fitted(piece: Piece, room: tuple[float, float], scale: float) -> Piece:
    """The piece at `scale` times the size that fits `room` (height, width); small ones are enlarged."""
    height, width = piece.mask.shape
    factor = min(room[0] / height, room[1] / width) * scale
    if factor <= 0:
        raise StudioError("There are more subjects than the canvas has room for. Show fewer, or a larger picture.")
    sides = max(1, int(width * factor)), max(1, int(height * factor))
    return Piece(piece.name, _resized(piece.image, sides), _resized(piece.mask, sides))


def _left(width: int, cell: Cell, canvas: int, margin: float, draw: float) -> int:
    """The outermost of a row by their distance from the edge, those between by that from the middle of their cell."""
    left, _, right, _ = cell
    away = margin * (right - left)
    if left <= 0 < canvas - right:
        x = 1 + int(draw * max(1, int(away)))
    elif right >= canvas and left > 0:
        x = canvas - width - 1 - int(draw * max(1, int(away)))
    else:
        x = round((left + right - width) / 2 + (draw - 0.5) * away)
    return min(max(x, 0), canvas - width)


def _top(height: int, cell: Cell, draw: float) -> int:
    """Anywhere in the row."""
    return round(cell[1]) + int(draw * (max(0, int(cell[3]) - round(cell[1]) - height) + 1))


def _composed(pieces: Sequence[_Set], order: Sequence[int], size: Size) -> Collage:
    """Set down in `order`, each on top of those before it. Masks are hard: nothing is blended."""
    image = np.full((*size, 3), WHITE, np.uint8)
    owner: NDArray[np.int16] = np.full(size, -1, np.int16)
    for number in order:
        left, top, right, bottom = pieces[number].box
        window = slice(top, bottom), slice(left, right)
        mine = pieces[number].piece.mask > USED
        image[window][mine] = pieces[number].piece.image[mine]
        owner[window][mine] = number
    masks = {one.piece.name: np.where(owner == number, 255, 0).astype(np.uint8) for number, one in enumerate(pieces)}
    return Collage(image, masks, {one.piece.name: one.box for one in pieces})


def _mirrored(piece: Piece) -> Piece:
    return Piece(piece.name, piece.image[:, ::-1], piece.mask[:, ::-1])


def _resized(picture: NDArray[np.uint8], sides: tuple[int, int]) -> NDArray[np.uint8]:
    """To (width, height), bicubic as Pillow does it, with all source pixels counted where it shrinks."""
    if picture.shape[1::-1] == sides:
        return picture
    return np.asarray(Image.fromarray(picture).resize(sides, Image.Resampling.BICUBIC))
