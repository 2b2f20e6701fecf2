"""Pictures on a page as data URIs: small derived copies, so that no file of the workspace is ever served."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

GROW_TO = 256  # pictures smaller than this (Toybox's) are enlarged by the browser, smoothly


def data_uri(image: Image.Image | NDArray[np.uint8], side: int = 320) -> str:
    """A PNG (small pictures) or JPEG data URI of at most `side` pixels; `image` is (height, width, 3) uint8 or PIL."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture = picture.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) <= 128:
        picture.save(buffer, "PNG")
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail(path: Path, side: int = 256) -> str:
    """The data URI of a picture file, made once per file and size; "" when there is none or it can't be read."""
    try:
        return _thumbnail(str(path), path.stat().st_mtime_ns, side)
    except OSError:
        return ""


@lru_cache(maxsize=512)
def _thumbnail(path: str, _changed: int, side: int) -> str:
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))
        return data_uri(ImageOps.exif_transpose(image), side)
