"""The attention scrubber: one picture, one grey atlas of maps, and sliders that never ask the server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_HERE = Path(__file__).parent


def scrubber(elem_id: str) -> gr.HTML:
    """The component; its value is what `payload` makes. Reports `pick` with a word (read it with `cards.picked`)."""
    return gr.HTML(
        "",
        html_template=(_HERE / "scrubber.html").read_text(encoding="utf-8"),
        js_on_load=(_HERE / "scrubber.js").read_text(encoding="utf-8"),
        elem_id=elem_id,
        apply_default_css=False,
    )


def payload(
    picture: str, words: Sequence[str], sheet: NDArray[np.uint8], index: dict[str, Any], heads_by_step: bool
) -> str:
    """The value of the component: `picture` is a data URI, `sheet` and `index` come from `atlas`."""
    sites = [track for track in index["tracks"] if track["site"] is not None and track["head"] is None]
    return json.dumps(
        {
            "picture": picture,
            "atlas": _grey(sheet),
            "words": list(words),
            "word": index["label"],
            "cell": index["cell"],
            "steps": index["steps"],
            "tracks": [{key: track[key] for key in ("site", "head", "top")} for track in index["tracks"]],
            "sites": list(zip([site["site"] for site in sites], _titles(sites), strict=True)),
            "heads_by_step": heads_by_step,
        }
    )


def _titles(sites: Sequence[dict[str, Any]]) -> list[str]:
    """`down 16×16`, numbered where a place has several layers of that size."""
    plain = [f"{site['place']} {site['grid'][1]}×{site['grid'][0]}" for site in sites]
    return [
        f"{title}, {plain[:at].count(title) + 1}" if plain.count(title) > 1 else title for at, title in enumerate(plain)
    ]


def _grey(sheet: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", compress_level=6)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
