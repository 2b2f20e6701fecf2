"""The panels that move while something runs: training with its loss, sample and heat map; generation with previews."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines import Concept, Snapshot, overlay
from studio.jobs import Job
from studio.parts.message import done, problem
from studio.parts.pictures import data_uri, thumbnail
from studio.parts.plot import loss_plot
from studio.render import INSIDE, View, clock

MOST_SHOWN = 16  # finished pictures; a file of prompts makes hundreds, and all are drawn anew at every step
NO_LOSS = (INSIDE, "gradient")  # curves on other scales than the losses


def train_markup(job: Job, view: View, concept: Concept | None = None) -> str:
    """The training panel for the present or the last run; `concept` is what came of it."""
    losses = {name: curve for name, curve in view.curves.items() if name not in NO_LOSS}
    parts = [
        f'<h3>{escape(job.title)}</h3><p class="now">{_now(job, view)}</p>',
        loss_plot(losses, view.before + view.total),
        _looks(view),
        _film(view.samples),
        _ending(job, view),
        _word(concept),
        _notes(view),
    ]
    return f'<div class="live" data-state="{job.state}" data-step="{view.before + view.step}">{"".join(parts)}</div>'


def generate_markup(job: Job, view: View) -> str:
    """The pictures of the present or last generation: finished ones first, then those still forming."""
    figures = [_picture(snapshot) for snapshot in view.pictures[-MOST_SHOWN:]]
    figures += [
        f'<figure class="rough"><img src="{data_uri(preview.image)}" alt="preview">'
        f"<figcaption>forming, step {preview.step} of {preview.total}</figcaption></figure>"
        for _, preview in sorted(view.previews.items())
    ]
    now = "" if job.over else f'<p class="now">{_now(job, view)}</p>'
    grid = f'<div class="pictures">{"".join(figures)}</div>' if figures else ""
    body = f"{now}{_found(view)}{grid}{_earlier(view)}{_ending(job, view)}{_notes(view)}"
    return f'<div class="live" data-state="{job.state}">{body}</div>'


def _earlier(view: View) -> str:
    """Where the finished pictures are that aren't shown here."""
    if len(view.pictures) <= MOST_SHOWN:
        return ""
    return f'<p class="hint">The newest {MOST_SHOWN} of {len(view.pictures)}. All are in the pictures so far.</p>'


def _found(view: View) -> str:
    """Where each concept will act, over what the first pass shows."""
    figures = [
        f'<figure><img src="{data_uri(overlay(heat.values, heat.image), 256)}" alt="{escape(token, quote=True)}">'
        f"<figcaption>{escape(token)} acts here</figcaption></figure>"
        for token, heat in view.regions.items()
    ]
    return f'<div class="pictures found">{"".join(figures)}</div>' if figures else ""


def ending(job: Job) -> str:
    """One word for a job that is over."""
    return {"done": "Finished", "stopped": "Stopped", "failed": "Failed"}.get(job.state, job.state.capitalize())


def progress_text(job: Job, view: View) -> str:
    """`training · step 40 of 140 · 20 s left`"""
    if job.state == "queued":
        return f"waiting, number {job.place} in the queue"
    if not view.total:
        return view.notes[-1] if view.notes else "starting …"
    left = clock(job.eta)
    unit = "MB" if view.stage == "download" else "step"
    steps = f"{view.step} of {view.total} MB" if unit == "MB" else f"step {view.step} of {view.total}"
    return " · ".join(filter(None, [view.stage, steps, f"{left} left" if left else ""]))


def _now(job: Job, view: View) -> str:
    if not job.over:
        return f"<b>{escape(progress_text(job, view))}</b>"
    saved = f" · saved at step {view.saved_at}" if view.saved_at and job.state != "done" else ""
    return f"<b>{ending(job)}</b><span>{view.before + view.step} steps{saved}</span>"


def _looks(view: View) -> str:
    """Newest sample beside where the concept's word looks."""
    figures = []
    if view.samples:
        newest = view.samples[-1]
        step = newest.info.get("step", view.step)
        figures.append(_figure(_uri(newest, 320), f"Sample at step {step}", "train-sample"))
    for token, heat in view.heatmaps.items():
        figures.append(
            _figure(
                data_uri(overlay(heat.values, heat.image), 320),
                f"Where {token} looks, step {heat.step}",
                "train-heatmap",
            )
        )
    pair = f'<div class="pair">{"".join(figures)}</div>' if figures else ""
    return pair + _inside(view)


def _inside(view: View) -> str:
    if not view.curves.get(INSIDE):
        return ""
    share = view.curves[INSIDE][-1][1]
    return (
        f'<div class="hint">{100 * share:.0f} % of its attention is on the subject'
        f'<div class="meter"><i style="width:{100 * min(max(share, 0), 1):.0f}%"></i></div></div>'
    )


def _film(samples: Sequence[Snapshot]) -> str:
    """The earlier samples, the untrained one first: how it came about."""
    if len(samples) < 2:
        return ""
    frames = "".join(
        f'<figure><img src="{_uri(sample, 96)}" alt=""><figcaption>{sample.info.get("step", "")}</figcaption></figure>'
        for sample in samples
    )
    return f'<div class="film">{frames}</div>'


def _figure(uri: str, caption: str, elem_id: str) -> str:
    text = escape(caption, quote=True)
    return f'<figure id="{elem_id}"><img src="{uri}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _picture(snapshot: Snapshot) -> str:
    seed, prompt = escape(str(snapshot.info.get("seed", ""))), escape(str(snapshot.info.get("prompt", "")))
    of = f" · {prompt}" if prompt else ""  # one of several
    return (
        f'<figure class="ready"><img src="{_uri(snapshot, 512)}" alt="picture, seed {seed}">'
        f"<figcaption>seed {seed}{of}</figcaption></figure>"
    )


def _uri(snapshot: Snapshot, side: int) -> str:
    image: NDArray[np.uint8] | None = snapshot.image
    if image is not None:
        return data_uri(image, side)
    return thumbnail(Path(snapshot.path), side) if snapshot.path else ""


def _ending(job: Job, view: View) -> str:
    if job.state == "failed":
        return problem(f"{job.error} They are in attune.log in the workspace, too." if job.is_bug else job.error)
    if job.state == "stopped":
        return done("Stopped. What was done so far is kept.")
    return ""


def _word(concept: Concept | None) -> str:
    """How it is written, which needn't be the word that was asked for."""
    if concept is None:
        return ""
    tokens = " and ".join(subject.token for subject in concept.subjects)
    return done(f"{concept.name} is in the library. Write {tokens} in a prompt.")


def _notes(view: View) -> str:
    notes = [note for note in view.notes if not note.endswith("…")]
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes[-6:])}</ul>'
