"""An evaluation for people: means with bootstrapped intervals, as a table, CSV files and one page with the pictures."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.page import markdown_row, page, png
from pipelines.evaluate.prompts import with_subject
from pipelines.files import make_folder, new_id, write_atomic

if TYPE_CHECKING:
    from pipelines.evaluate.protocol import Evaluation

DRAWS = 2000
OVERALL = "all prompts"
TITLES = {
    "identity": "Identity (CLIP)",
    "text_bare": "Text, subject left out",
    "text_named": "Text with category",
    "dino": "Identity (DINO)",
    "identity_masked": "Identity, masked",
    "dino_masked": "DINO, masked",
}
_STYLE = "img{width:8rem;height:8rem;object-fit:contain;margin:.15rem}"
_SHOWN = 8  # pictures of a prompt on the page


@dataclass(frozen=True)
class Figure:
    """A mean, its 95 % interval, and how many pictures it is of; NaN when there are none."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:.4f}" if self.count else "-"  # of one picture there is no interval
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Line:
    """One row of the table: a concept and a prompt, or all prompts together."""

    concept: str
    prompt: str
    figures: dict[str, Figure]
    subject: str = ""  # its <token>, where it is known


def figure(groups: Sequence[NDArray[np.float64]], seed: int = 0) -> Figure:
    """The mean of the groups' means, and the percentile interval of its bootstrap (Efron 1979).

    Groups (prompts) are drawn first and then the pictures in each, since pictures of one prompt are alike; of a single
    group only its pictures. NaN values are left out.
    """
    kept = [group[np.isfinite(group)] for group in groups]
    kept = [group for group in kept if len(group)]
    count = sum(map(len, kept))
    if not count:
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    chance = np.random.default_rng(seed)
    means = np.stack([group[chance.integers(0, len(group), (DRAWS, len(group)))].mean(1) for group in kept], 1)
    drawn = means
    if len(kept) > 1:  # which prompts; their pictures were drawn above
        drawn = np.take_along_axis(means, chance.integers(0, len(kept), (DRAWS, len(kept))), 1)
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return Figure(float(np.mean([group.mean() for group in kept])), float(low), float(high), count)


def lines(evaluations: Sequence[Evaluation]) -> list[Line]:
    """The table: for every concept its overall line first, then one for each prompt."""
    found = []
    for one in evaluations:
        groups = {key: [row.values[key] for row in one.rows] for key in one.measures}
        found.append(Line(one.name, OVERALL, {key: figure(values) for key, values in groups.items()}, one.subject))
        for row in one.rows:
            figures = {key: figure([row.values[key]]) for key in one.measures}
            found.append(Line(one.name, row.prompt, figures, one.subject))
    return found


def as_json(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The table as plain data; figures without any picture are left out."""
    return [
        {
            "concept": line.concept,
            "subject": line.subject,
            "prompt": line.prompt,
            **{
                key: {"mean": one.mean, "low": one.low, "high": one.high, "n": one.count}
                for key, one in line.figures.items()
                if one.count
            },
        }
        for line in lines(evaluations)
    ]


def as_text(evaluations: Sequence[Evaluation], *, overall: bool = False) -> list[str]:
    """The table in Markdown, one string a line; `overall` leaves the single prompts out."""
    keys = _measures(evaluations)
    head = ["concept", "prompt", *(TITLES.get(key, key) for key in keys)]
    rows = [
        [line.concept, line.prompt, *(str(line.figures[key]) if key in line.figures else "-" for key in keys)]
        for line in lines(evaluations)
        if not overall or line.prompt == OVERALL
    ]
    return [markdown_row(head), "|" + "---|" * len(head), *(markdown_row(row) for row in rows)]


def write_report(folder: Path, evaluations: Sequence[Evaluation]) -> list[Path]:
    """report.csv (the table), pictures.csv (every number), report.md, report.html and the pictures in `folder`.

    The files that were written, without the pictures. StudioError when the disk is full.
    """
    make_folder(folder)
    files = {
        "report.csv": _table_csv(evaluations),
        "pictures.csv": _pictures_csv(evaluations),
        "report.md": "\n".join(as_text(evaluations)) + "\n",
        "report.html": _page(evaluations, _saved(folder, evaluations)),
    }
    for name, content in files.items():
        write_atomic(folder / name, content.encode())
    return [folder / name for name in files]


def _measures(evaluations: Sequence[Evaluation]) -> list[str]:
    return list(dict.fromkeys(key for one in evaluations for key in one.measures))


def _table_csv(evaluations: Sequence[Evaluation]) -> str:
    keys, text = _measures(evaluations), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["concept", "prompt", *(f"{key}{end}" for key in keys for end in ("", "_low", "_high", "_n"))])
    for line in lines(evaluations):
        numbers: list[object] = []
        for key in keys:
            one = line.figures.get(key)
            numbers += [one.mean, one.low, one.high, one.count] if one and one.count else ["", "", "", 0]
        writer.writerow([line.concept, line.prompt, *numbers])
    return text.getvalue()


def _pictures_csv(evaluations: Sequence[Evaluation]) -> str:
    keys, text = _measures(evaluations), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["concept", "method", "prompt", "picture", *keys])
    for one in evaluations:
        for row in one.rows:
            for number in range(len(next(iter(row.values.values()), []))):
                given = [float(row.values[key][number]) if key in row.values else float("nan") for key in keys]
                values = ["" if np.isnan(value) else value for value in given]
                writer.writerow([one.name, one.method, row.prompt, number, *values])
    return text.getvalue()


def _saved(folder: Path, evaluations: Sequence[Evaluation]) -> dict[tuple[int, int], list[str]]:
    """Every picture as a PNG; names by (concept, prompt), the photos under prompt -1."""
    found: dict[tuple[int, int], list[str]] = {}
    (folder / "pictures").mkdir(exist_ok=True)
    for index, one in enumerate(evaluations):
        groups = [(-1, one.photos), *((number, row.pictures) for number, row in enumerate(one.rows))]
        for number, pictures in groups:
            stem = f"{index}-{'photo' if number < 0 else number}"
            names = [f"pictures/{stem}-{count}.png" for count in range(len(pictures))]
            for name, picture in zip(names, pictures, strict=True):
                write_atomic(folder / name, png(picture))
            found[index, number] = names
    return found


def _page(evaluations: Sequence[Evaluation], files: dict[tuple[int, int], list[str]]) -> str:
    keys = _measures(evaluations)
    head = "".join(f"<th>{html.escape(TITLES.get(key, key))}</th>" for key in keys)
    body = "".join(_row(line.concept, line, keys) for line in lines(evaluations) if line.prompt == OVERALL)
    parts = [f"<table><tr><th>concept</th>{head}</tr>{body}</table>"]
    for index, one in enumerate(evaluations):
        measured = ", ".join(f"{key}: {name}" for key, name in one.looks.items())
        settings = ", ".join(f"{key} {value}" for key, value in one.settings.items())
        title = html.escape(f"{one.name} ({one.method}), a {one.noun}")
        parts.append(f'<h2 id="{new_id(one.name)}">{title}</h2><p><small>{html.escape(measured)}. ')
        parts.append(f"{html.escape(settings)}</small></p><p>{_images(files[index, -1])}</p>")
        rows = [line for line in lines([one]) if line.prompt != OVERALL]
        for number, line in enumerate(rows):
            parts.append(f"<h3>{html.escape(with_subject(line.prompt, one.subject or f'<{one.name}>'))}</h3>")
            parts.append(f"<table><tr><th></th>{head}</tr>{_row('', line, keys)}</table>")
            parts.append(f"<p>{_images(files[index, number])}</p>")
    return page("Evaluation", f"<p>Means with 95 % bootstrap intervals.</p>{''.join(parts)}", _STYLE)


def _row(name: str, line: Line, keys: Sequence[str]) -> str:
    cells = "".join(f"<td>{line.figures.get(key, '-')}</td>" for key in keys)
    return f"<tr><td>{html.escape(name)}</td>{cells}</tr>"


def _images(names: Sequence[str]) -> str:
    return "".join(f'<img src="{name}" alt="" loading="lazy">' for name in names[:_SHOWN])
