"""The strip above the tabs: what runs, what waits, how long it takes, and Stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

_REPORT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button.halt');
  if (button) { button.disabled = true; trigger('stop', {id: button.dataset.id}); }
});
const title = document.title;
watch('value', () => {
  const running = element.querySelector('.job.running');
  document.title = running ? running.dataset.short + ' · ' + title : title;
});
"""


@dataclass(frozen=True)
class JobLine:
    """One job as the strip shows it. `share` is 0 to 1, `place` 1 for the next in the queue."""

    id: str
    title: str
    running: bool
    share: float = 0.0
    detail: str = ""  # "step 40 of 140 · 20 s left"
    place: int = 0
    stopping: bool = False
    stop: str = "Stop"  # what the button of a running job says


def jobstrip(elem_id: str) -> gr.HTML:
    """The component; reports `stop` with the job's id (read it with `cards.picked`)."""
    return gr.HTML("", elem_id=elem_id, js_on_load=_REPORT, apply_default_css=False)


def jobs_markup(lines: Sequence[JobLine]) -> str:
    """The strip's rows; "" when nothing runs or waits."""
    return "".join(_line(line) for line in lines)


def _line(line: JobLine) -> str:
    percent = f"{100 * line.share:.0f}%"
    detail = line.detail if line.running else f"waiting, number {line.place} in the queue"
    word = "Stopping…" if line.stopping else (line.stop if line.running else "Remove")
    return (
        f'<div class="job {"running" if line.running else "waiting"}" data-short="{percent}">'
        f"<b>{escape(line.title)}</b><span>{escape(detail)}</span>"
        f'<div class="bar" role="progressbar" aria-valuenow="{percent[:-1]}"><i style="width:{percent}"></i></div>'
        f'<button type="button" class="halt" data-id="{escape(line.id, quote=True)}"'
        f"{' disabled' if line.stopping else ''}>{word}</button></div>"
    )
