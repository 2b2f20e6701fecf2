"""Arguments of `generate` that say where things are to be, and how attention is led there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import Parser
from pipelines.errors import StudioError
from pipelines.files import printable

if TYPE_CHECKING:
    from pipelines.layout import Area, Layout, Region

CANVAS = (512, 512)  # what boxes are drawn on, stretched over the picture
_NUMBER = r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*"


def add_layout(parser: Parser) -> None:
    group = parser.add_argument_group("where things are to be")
    group.add_argument("--layout", type=Path, metavar="IMAGE", help="a drawing whose colours --region speaks of")
    group.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="WORD=WHERE",
        help="repeatable; WORD is of the prompt, or a concept's <token>, 'dog#2' is the second dog; WHERE is a colour "
        "of --layout (#ff0000 or 255,0,0), a box as left,top,right,bottom from 0 to 1, or a mask file",
    )
    group.add_argument("--guide", type=float, metavar="WEIGHT", help="how firmly (0.05 to 0.1; 0 = not at all)")
    group.add_argument("--guided-steps", type=int, metavar="N", help="in the first N steps only (default: all)")
    group.add_argument("--outside", type=float, metavar="WEIGHT", help="weight outside a word's region (default: -1e8)")
    group.add_argument(
        "--figure", action="store_true", help="forbid a word only the regions of others, not everything outside its own"
    )
    group.add_argument(
        "--apart",
        action=argparse.BooleanOptionalAction,
        help="find a region for each concept by a short first pass (default: where two or more change weights)",
    )
    group.add_argument("--recur", type=int, metavar="N", help="take each guided step N times more, with fresh noise")
    group.add_argument("--ramp", action="store_true", help="twice the guidance at first, falling to --guidance")
    group.add_argument("--trim", action="store_true", help="leave out the padding of short prompts")


def read_layout(options: argparse.Namespace) -> Layout | None:
    """The layout that the options describe; StudioError for what can't be meant."""
    if not options.region:
        if options.layout is not None and not options.start_place:
            raise StudioError("--layout needs to know what its colours mean. Add --region WORD=COLOUR for each.")
        return None
    from pipelines.layout import Layout

    return Layout(read_regions(options.region, options.layout), **layout_settings(options))


def read_regions(given: Sequence[str], drawing: Path | None) -> tuple[Region, ...]:
    """Regions written as WORD=WHERE; StudioError for what can't be meant."""
    from pipelines.layout import Region

    regions = []
    for text in given:
        words, occurrence, where = _parted(text)
        regions.append(Region(words, _area(where, drawing, text), occurrence))
    return tuple(regions)


def layout_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Layout that were given."""
    given = {"strength": options.guide, "steps": options.guided_steps, "negative": options.outside}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return settings | ({"mode": "figure"} if options.figure else {})


def _parted(text: str) -> tuple[str, int | None, str]:
    words, equals, where = text.rpartition("=")
    if not equals or not words.strip() or not where.strip():
        raise StudioError(f"'{printable(text)}' is no region. Write --region WORD=WHERE, as in cat=0,0,0.5,1.")
    numbered = re.fullmatch(r"(.+)#([1-9][0-9]{0,3})", words)
    return (numbered[1], int(numbered[2]) - 1, where) if numbered else (words, None, where)


def _area(where: str, drawing: Path | None, text: str) -> Area:
    from pipelines.layout import Area, colour_areas

    colour = _colour(where, text)
    if colour is not None:
        if drawing is None:
            raise StudioError(f"'{printable(text)}' names a colour. Say of which drawing: --layout IMAGE.")
        return colour_areas(_opened(drawing), [colour])[colour]
    if re.fullmatch(",".join([_NUMBER] * 4), where, re.ASCII):
        corners = [float(number) for number in where.split(",")]
        if not 0 <= min(corners) <= max(corners) <= 1:
            raise StudioError(f"The box of '{printable(text)}' is not in the picture. Its sides go from 0 to 1.")
        left, top, right, bottom = corners
        if round(left * CANVAS[1]) >= round(right * CANVAS[1]) or round(top * CANVAS[0]) >= round(bottom * CANVAS[0]):
            raise StudioError(
                f"The box of '{printable(text)}' has no area. Write left,top,right,bottom from 0 to 1, the smaller "
                "number of each pair first."
            )
        return Area.box([left * CANVAS[1], top * CANVAS[0], right * CANVAS[1], bottom * CANVAS[0]], CANVAS)
    import numpy as np

    return Area.of(np.asarray(_opened(Path(where)).convert("L")) > 127)


def _colour(where: str, text: str) -> tuple[int, int, int] | None:
    if re.fullmatch(r"#[0-9a-fA-F]{6}", where):
        return int(where[1:3], 16), int(where[3:5], 16), int(where[5:7], 16)
    numbers = [number.strip() for number in where.split(",")]
    if len(numbers) != 3 or not all(re.fullmatch(_NUMBER, number, re.ASCII) for number in numbers):
        return None
    if not all(number.isdecimal() and len(number) <= 3 and int(number) <= 255 for number in numbers):
        raise StudioError(f"'{printable(text)}' names no colour. Write red, green and blue, 0 to 255, as in 255,192,0.")
    red, green, blue = (int(number) for number in numbers)
    return red, green, blue


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise StudioError(f"There is no file '{printable(path)}'. Check the path.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise StudioError(f"'{printable(path.name)}' is no readable picture. Choose a PNG.") from error
