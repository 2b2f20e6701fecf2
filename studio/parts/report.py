"""A measurement on a page: its table, its pictures, what it was measured with."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from studio.parts.pictures import thumbnail

if TYPE_CHECKING:
    from pipelines import Report

MOST = 24  # pictures shown; all of them are in the zip


def report_markup(report: Report) -> str:
    """Of a finished measurement."""
    head, *rows = report.table
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    shown = "".join(
        f'<figure><img src="{thumbnail(path)}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, path in report.pictures[:MOST]
    )
    return (
        f'<h3 class="part">{escape(report.title)}</h3><div class="measured"><table><tr>{top}</tr>{body}</table></div>'
        f'<p class="hint">{escape(report.said)}</p><div class="measured-pictures">{shown}</div>'
    )
