"""Trainings that stopped on the way, each to be resumed or thrown away. Reports `pick` with the run's id and which."""

from __future__ import annotations

import time
from collections.abc import Iterable
from html import escape

import gradio as gr

from pipelines import JobRecord

MOST = 6
_REPORT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-id]');
  if (!button) return;
  if (button.dataset.what === 'discard' && !button.dataset.sure) {
    button.dataset.sure = '1'; button.textContent = 'Throw away for good?'; return;
  }
  button.disabled = true; trigger('pick', {id: button.dataset.id, what: button.dataset.what});
});
"""
_WHY = {"stopped": "stopped", "interrupted": "interrupted when Attune ended", "failed": "failed"}


def runs(elem_id: str) -> gr.HTML:
    """The component; its value is what `runs_markup` writes."""
    return gr.HTML("", elem_id=elem_id, js_on_load=_REPORT, apply_default_css=False)


def runs_markup(records: Iterable[JobRecord]) -> str:
    """The newest unfinished trainings; "" when there are none."""
    waiting = [record for record in records if record.kind == "train" and record.unfinished and record.meta][:MOST]
    if not waiting:
        return ""
    return f'<div class="part"><h3>Unfinished trainings</h3>{"".join(map(_row, waiting))}</div>'


def _row(record: JobRecord) -> str:
    when = time.strftime("%d %b, %H:%M", time.localtime(record.ended or record.created))
    known = escape(record.id, quote=True)
    why = f"<p>{escape(record.error)}</p>" if record.state == "failed" and record.error else ""
    return (
        f'<div class="run"><b>{escape(record.title)}</b><span>{_WHY[record.state]}, {when}</span>'
        f'<button type="button" class="small" data-what="resume" data-id="{known}">Resume</button>'
        f'<button type="button" class="small" data-what="discard" data-id="{known}">Throw away</button>{why}</div>'
    )


def wants_discard(event: gr.EventData) -> bool:
    """Whether the person chose to throw the run away."""
    return isinstance(event._data, dict) and event._data.get("what") == "discard"
