"""A comparison for people: a table of the pictures, and a page that shows each with the boxes that were found."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from pipelines.evaluate.detect_compare import summary
from pipelines.evaluate.page import page, png
from pipelines.evaluate.report import Figure, figure
from pipelines.files import make_folder, write_atomic

if TYPE_CHECKING:
    from pipelines.evaluate.comparison import Compared
    from pipelines.evaluate.detect_compare import Comparison
    from pipelines.events import Picture

FORMULAS = {"spectral": "1 - |S_DC - S_GT|_2", "fro": "1 - |S_DC - S_GT|_F", "fro2": "1 - |S_DC - S_GT|_F^2"}
_COLORS = ("#d7263d", "#1b77d1", "#2a9d3a", "#e08a00", "#8a3fc0", "#00918f")
_PLAIN = "#666666"  # of a box that stands for nobody
_SIDE = 256  # pixels that a smaller picture is enlarged to before its boxes are drawn


def figures(found: Compared) -> dict[str, Figure]:
    """Means over the pictures with their intervals; "score" counts a wrong number as 0, "counted" leaves it out."""
    results = found.results
    groups = {
        "score": [one.score for one in results],
        "counted": [one.score for one in results if one.counted],
        "success": [float(one.each_its_own) for one in results],
        "count errors": [float(not one.counted) for one in results],
    }
    return {name: figure([np.array(values, np.float64)]) for name, values in groups.items()}


def as_text(found: Compared) -> list[str]:
    """The figures in Markdown, one string a line, then what was measured by what."""
    known = summary(found.results)
    known_as = figures(found)
    rows = [
        ("Detect-and-Compare, a wrong number as 0", known_as["score"]),
        ("where the number is right", known_as["counted"]),
        ("each there once and most like itself", known_as["success"]),
        ("wrong number", known_as["count errors"]),
    ]
    lines = ["| | mean [95 % interval] | n |", "|---|---|---|"]
    lines += [f"| {name} | {one} | {one.count} |" for name, one in rows]
    lines.append(f"| too few / too many | {known['too_few']:.0%} / {known['too_many']:.0%} | {known['n']} |")
    return [*lines, "", measured(found)]


def write_report(folder: Path, found: Compared) -> list[Path]:
    """compare.json, compare.csv (a line a picture), compare.md, compare.html and the pictures with boxes in `folder`.

    The files that were written, without the pictures. StudioError when the disk is full.
    """
    make_folder(folder / "pictures")
    names = []
    for number, (picture, result) in enumerate(zip(found.pictures, found.results, strict=True)):
        names.append(f"pictures/{number:04d}.png")
        write_atomic(folder / names[-1], png(drawn(picture.image, result)))
    files = {
        "compare.json": json.dumps(found.to_json(), indent=2) + "\n",
        "compare.csv": _csv(found),
        "compare.md": "\n".join(as_text(found)) + "\n",
        "compare.html": _page(found, names),
    }
    for name, content in files.items():
        write_atomic(folder / name, content.encode())
    return [folder / name for name in files]


def drawn(picture: Picture, result: Comparison) -> Picture:
    """The picture with its boxes, each in the colour of the subject it stands for, grey for nobody."""
    times = max(1, -(-_SIDE // max(picture.shape[:2])))
    image = Image.fromarray(picture).resize(
        (picture.shape[1] * times, picture.shape[0] * times), Image.Resampling.NEAREST
    )
    pen, width = ImageDraw.Draw(image), max(2, max(image.size) // 160)
    for number, box in enumerate(result.boxes):
        color = _color(result.rows.index(number)) if number in result.rows else _PLAIN
        left, top, right, bottom = (value * times for value in box)
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=color, width=width)
    return np.asarray(image)


def _color(subject: int) -> str:
    return _COLORS[subject % len(_COLORS)]


def measured(found: Compared) -> str:
    """By which formula and by whose eyes."""
    norm = found.results[0].norm
    return f"Score {FORMULAS[norm]} ({norm}), rows by {found.match} matching. Measured with {found.eyes}."


def _csv(found: Compared) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    own = [f"own_{name}" for name in found.names]
    writer.writerow(["picture", "score", "found", "wanted", "each_its_own", *own])
    for picture, one in zip(found.pictures, found.results, strict=True):
        likeness = [""] * len(own) if one.similar is None else [f"{value:.4f}" for value in one.similar.diagonal()]
        row = [picture.path.name, f"{one.score:.4f}", one.count, one.wanted, int(one.each_its_own), *likeness]
        writer.writerow(row)
    return text.getvalue()


_STYLE = (
    "figure{display:inline-block;vertical-align:top;width:16rem;margin:.5rem}"
    "img{width:16rem;height:16rem;object-fit:contain}figcaption{font-size:.85rem}b.key{padding:0 .4rem;color:#fff}"
)


def _page(found: Compared, names: Sequence[str]) -> str:
    keys = " ".join(
        f'<b class="key" style="background:{_color(number)}">{html.escape(one.name)}</b> ({html.escape(one.query)}, '
        f"{len(one.photos)} photos)"
        for number, one in enumerate(found.subjects)
    )
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{one}</td><td>{one.count}</td></tr>"
        for name, one in figures(found).items()
    )
    worst_last = sorted(range(len(names)), key=lambda number: -found.results[number].score)
    shown = "".join(_figure(found, number, names[number]) for number in worst_last)
    body = (
        f"<p>{keys}</p><p>{html.escape(measured(found))}</p>"
        f"<table><tr><th></th><th>mean [95 % interval]</th><th>n</th></tr>{rows}</table>"
        f"<h2>S_GT: the photos with each other</h2>{_matrix(found, found.own)}<h2>Pictures, best first</h2>{shown}"
    )
    return page("Detect-and-Compare", body, _STYLE)


def caption(found: Compared, number: int) -> str:
    """What came of one picture, in words."""
    result = found.results[number]
    if result.similar is None:
        return f"{result.count} found, {result.wanted} wanted: 0"
    return f"{result.score:.3f}{'' if result.each_its_own else ', mixed up'}"


def _figure(found: Compared, number: int, name: str) -> str:
    result, file = found.results[number], html.escape(found.pictures[number].path.name)
    said = caption(found, number) + ("" if result.similar is None else _matrix(found, result.similar))
    return f'<figure><img src="{name}" alt="" loading="lazy"><figcaption>{file}<br>{said}</figcaption></figure>'


def _matrix(found: Compared, values: np.ndarray) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in found.names)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{value:.2f}</td>' for value in row)}</tr>"
        for name, row in zip(found.names, values, strict=True)
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"
