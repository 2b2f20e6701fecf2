"""The evidence for people: a table, and a page with the comparisons, their intervals as a plot, and the pictures."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.evaluate.claim import claim_names
from pipelines.evaluate.page import markdown_row, page
from pipelines.evaluate.study import case_pictures
from pipelines.files import make_folder, write_atomic, write_json

Result = Mapping[str, Any]
CASES_SHOWN = 3
_WIDE, _TALL = 420, 22  # of the plot, pixels
_TITLE = "The papers' claims, measured on Toybox"
_STYLE = "img{height:7rem}figure{margin:.4rem 0;display:inline-block}.yes{color:#176f2c}.no{color:#a3231f}"


def write_evidence(folder: Path, results: Mapping[str, Result], command: str, source: Path) -> list[Path]:
    """claims.json, claims.md, claims.html, cases.csv and pictures/ in `folder`, of results whose cases lie in `source`.

    The files that were written, without the pictures.
    """
    pictures = make_folder(folder / "pictures")
    for name in claim_names():
        for old in pictures.glob(f"{name}-[0-9]*.png"):  # ours; a person's pictures stay
            old.unlink()
    shown = {name: list(_pictures(folder, result, source)) for name, result in results.items()}
    for name, result in results.items():
        write_atomic(pictures / f"{name}-plot.svg", _plot_file(result["checks"]).encode())
    write_json(folder / "claims.json", {"command": command, "claims": dict(results)})
    texts = {
        "claims.md": _markdown(results, command, shown),
        "claims.html": _page(results, command, shown),
        "cases.csv": _csv(results),
    }
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in ("claims.json", *texts)]


def table(results: Mapping[str, Result]) -> list[str]:
    """The comparisons that decide, in Markdown, one string a line."""
    rows = ["| claim | compared | n | difference [95 % interval] | replicates |", "|---|---|---|---|---|"]
    for result in results.values():
        for check in result["checks"]:
            if check["decides"]:
                said = f"{check['measure']}: {check['arm']} {_number(check['result']['arm'])}, "
                said += f"{check['over']} {_number(check['result']['over'])}"
                rows.append(
                    f"| {result['title']} | {said} | {check['result']['n']} | {interval(check)} | {verdict(check)} |"
                )
    return rows


def interval(check: Result) -> str:
    """`+0.12 [+0.05, +0.20]`."""
    one = check["result"]
    if one["difference"] is None:
        return "-"
    return f"{one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def verdict(check: Result) -> str:
    """Whether the claim's whole interval is on its side; nothing is said of a quick run."""
    return {None: "not decided", True: "yes", False: "no"}[check["holds"]]


def _pictures(folder: Path, result: Result, source: Path) -> Iterator[tuple[str, str]]:
    """(caption, file) of the first cases' pictures, each arm beside the others."""
    first, last = result["seeds"]
    for seed in range(first, min(last, first + CASES_SHOWN - 1) + 1):
        for arm in result["arms"]:
            for caption, path in case_pictures(source, result["name"], seed, arm):
                target = folder / "pictures" / f"{result['name']}-{path.name}"
                with Image.open(path) as image:
                    _enlarged(image).save(target)
                yield f"{seed}, {arm}: {caption}", f"pictures/{target.name}"


def _enlarged(image: Image.Image) -> Image.Image:
    """Toybox's pictures are 64 pixels high; twice that is kind to the eye and small on disk."""
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST) if image.height <= 64 else image


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _arms(result: Result) -> list[list[str]]:
    measures = list(dict.fromkeys(key for values in result["arms"].values() for key in values))
    head = ["arm", *measures]
    return [head, *([name, *(_number(values.get(key)) for key in measures)] for name, values in result["arms"].items())]


def _settings(result: Result) -> list[str]:
    tries = result["search"].get("tries", [])
    chosen = result["search"]["chosen"]
    lines = [
        f"{name}: {', '.join(f'{key} {value}' for key, value in one.items())}" for name, one in chosen.items() if one
    ]
    count = {name: sum(one["arm"] == name for one in tries) for name in chosen}
    tried = ", ".join(f"{name} {number}" for name, number in count.items() if number)
    return [*lines, f"Tries on tuning seeds: {tried or 'none, this was a quick run'}."]


def _seeds(result: Result) -> str:
    first, last = result["seeds"]
    tuned = result["search"].get("seeds", [])
    chosen = f"; settings were chosen on seeds {tuned[0]} to {tuned[-1]}" if tuned else ""
    return f"Reported on seeds {first} to {last}{chosen}."


def _markdown(results: Mapping[str, Result], command: str, shown: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    lines = [f"# {_TITLE}", "", f"`{command}`", "", *table(results), ""]
    for name, result in results.items():
        lines += [f"## {result['title']}", "", result["about"], "", f"Paper: {result['paper']}", ""]
        head, *rows = _arms(result)
        lines += [markdown_row(head), "|" + "---|" * len(head), *map(markdown_row, rows), ""]
        for check in result["checks"]:
            lines.append(f"- {check['claim']}: {interval(check)}, n = {check['result']['n']}: {verdict(check)}")
        lines += ["", f"![The differences with their intervals](pictures/{name}-plot.svg)", "", _seeds(result)]
        lines += ["", "Chosen: " + "; ".join(_settings(result)), ""]
        for caption, file in shown[name]:
            lines += [f"{caption}:", "", f"![{caption}]({file})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _page(results: Mapping[str, Result], command: str, shown: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    parts = [f"<p><code>{html.escape(command)}</code></p>"]
    for name, result in results.items():
        parts += [f'<h2 id="{name}">{html.escape(result["title"])}</h2><p>{html.escape(result["about"])}</p>']
        parts.append(f'<p><a href="{html.escape(result["paper"])}">{html.escape(result["paper"])}</a></p>')
        head, *rows = _arms(result)
        parts.append(_html_table(head, rows))
        parts.append(_plot(result["checks"]))
        parts.append(f"<p>{html.escape(_seeds(result))}</p>")
        parts.append(f"<p><small>{html.escape('; '.join(_settings(result)))}</small></p>")
        parts += [
            f'<figure><img src="{file}" alt="" loading="lazy"><figcaption>{html.escape(caption)}</figcaption></figure> '
            for caption, file in shown[name]
        ]
    return page(_TITLE, "".join(parts), _STYLE)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _bars(checks: Sequence[Result]) -> Iterator[tuple[Result, str]]:
    """Each comparison with its interval as a bar about zero: what goes into an <svg> of _WIDE by _TALL pixels."""
    known = [check for check in checks if check["result"]["difference"] is not None]
    reach = max([abs(one["result"][end]) for one in known for end in ("low", "high")] + [1e-3])
    for check in known:
        low, middle, high = (
            _WIDE * (0.5 + 0.48 * check["result"][key] / reach) for key in ("low", "difference", "high")
        )
        yield (
            check,
            f'<line x1="{_WIDE / 2}" x2="{_WIDE / 2}" y1="0" y2="{_TALL}" stroke="#999"/>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{_TALL / 2}" y2="{_TALL / 2}" stroke="#3566b8"'
            ' stroke-width="6"/>'
            f'<circle cx="{middle:.1f}" cy="{_TALL / 2}" r="5" fill="#12305f"/>',
        )


def _plot_file(checks: Sequence[Result]) -> str:
    """All bars in one picture, with what they compare, for Markdown, which can't hold them."""
    rows = [
        f'<g transform="translate(10,{number * 2 * _TALL + 4})"><text y="12" font-size="12" font-family="sans-serif">'
        f'{html.escape(check["claim"])}: {interval(check)}</text><g transform="translate(0,{_TALL - 4})">{bar}</g></g>'
        for number, (check, bar) in enumerate(_bars(checks))
    ]
    size = f'width="{_WIDE + 260}" height="{2 * _TALL * len(rows) + 8}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{ground}{"".join(rows)}</svg>\n'


def _plot(checks: Sequence[Result]) -> str:
    """A table with a bar for each comparison."""
    rows = []
    for check, inside in _bars(checks):
        bar = f'<svg width="{_WIDE}" height="{_TALL}" role="img" aria-label="{interval(check)}">{inside}</svg>'
        mark = {None: "", True: "yes", False: "no"}[check["holds"]]
        said = f"{html.escape(check['claim'])} <small>n = {check['result']['n']}</small>"
        rows.append(
            f'<tr><td>{said}</td><td>{bar}</td><td>{interval(check)}</td><td class="{mark}">{verdict(check)}</td></tr>'
        )
    return f"<table><tr><th>claim</th><th></th><th>difference</th><th>replicates</th></tr>{''.join(rows)}</table>"


def _csv(results: Mapping[str, Result]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["claim", "seed", "arm", "measure", "value"])
    for name, result in results.items():
        for case in result["cases"]:
            for measure, value in case.items():
                if measure not in ("seed", "arm"):
                    writer.writerow([name, case["seed"], case["arm"], measure, "" if value is None else value])
    return text.getvalue()
