"""One picture of all pictures in a folder, as evaluation scripts leave it beside them."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.files import write_atomic

if TYPE_CHECKING:
    from PIL import Image

SHEET = "all_images.png"


def write_sheet(folder: Path) -> Path | None:
    """A grid of the folder's numbered pictures, nearly square, as `all_images.png`; None where there are none."""
    from PIL import Image

    paths = sorted((path for path in folder.glob("*.png") if re.fullmatch(r"[0-9]{1,9}", path.stem)), key=_number)
    pictures = [_opened(path) for path in paths]
    if not pictures:
        return None
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    columns = math.ceil(math.sqrt(len(pictures)))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for place, one in enumerate(pictures):
        sheet.paste(one, (place % columns * width, place // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(folder / SHEET, buffer.getvalue())
    return folder / SHEET


def _number(path: Path) -> int:
    return int(path.stem)


def _opened(path: Path) -> Image.Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
