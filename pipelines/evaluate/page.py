"""What every report's page and files are made of."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from pipelines.events import Picture

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
    "table{border-collapse:collapse;margin:.4rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ccc;"
    "text-align:right}td:first-child,th:first-child{text-align:left}small,figcaption{color:#666}"
)


def page(title: str, body: str, style: str = "") -> str:
    """A whole page of its own: no script, no font, nothing from elsewhere. `body` is HTML."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}{style}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )


def markdown_row(values: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def png(picture: Picture) -> bytes:
    """A picture (height, width, 3) as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
