"""Above the tabs: the name, the base model, the jobs, and a word when one of them ends."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from studio.jobs import Job
from studio.page import Page, Watch
from studio.parts.cards import picked
from studio.parts.jobstrip import JobLine, jobs_markup, jobstrip
from studio.parts.live import ending, progress_text
from studio.parts.message import answering, done, problem
from studio.session import Studio
from studio.work import start_change_of_base, start_warming, waiting

QUIET_KINDS = ("warm", "open", "outline")  # nobody needs to be told that these are over
BRAND = "<h1><i></i>Attune</h1><p>Teach a base model your own things, and watch where it looks.</p>"
ABOUT_BASES = (
    '<p class="hint">Toybox is built in: small, quick, and it knows only its own drawn world of toys. For photos '
    "of your own load a Stable Diffusion 1.x, 2.x or XL base: a Hub id (it is downloaded), a folder, or a .safetensors "
    "file.</p>"
)


def build(studio: Studio, page: Page) -> None:
    with gr.Row(elem_id="top"):
        gr.HTML(BRAND, elem_id="brand", scale=3)
        line = gr.HTML("", elem_id="base-line", scale=2)
    with gr.Accordion("Base model", open=False, elem_id="base-picker"):
        gr.HTML(ABOUT_BASES)
        with gr.Row(equal_height=True):
            where = gr.Textbox(
                "toybox", label="Base", show_label=False, placeholder="toybox, owner/name, a folder or a file",
                elem_id="base-where", scale=5, min_width=220,
            )  # fmt: skip
            load = gr.Button("Load", elem_id="base-load", scale=1, min_width=90)
        message = gr.HTML("", elem_id="base-message")
    trouble = gr.HTML("", elem_id="base-trouble")
    strip = jobstrip("jobs")
    toast = gr.HTML("", elem_id="toast")
    before = gr.State([])

    @answering(0)
    def change(where: str) -> tuple[str]:
        ahead = len(studio.jobs.active())
        return (done(f"{start_change_of_base(studio, where).title} …{waiting(ahead)}"),)

    load.click(change, where, [message], api_visibility="private")
    where.submit(change, where, [message], api_visibility="private")

    def stop(event: gr.EventData) -> None:
        studio.jobs.cancel(picked(event))

    strip.stop(stop, None, None, queue=False, api_visibility="private", show_progress="hidden")
    page.opened.append(lambda: start_warming(studio))
    page.watch(Watch([strip], lambda: _jobs_sign(studio), lambda: [_jobs(studio)]))
    page.watch(Watch([line, trouble], lambda: _base_sign(studio), lambda: _base(studio)))
    page.watch(Watch([toast, before], lambda _: _over(studio), lambda seen: _toast(studio, seen), [before]))


def _jobs_sign(studio: Studio) -> Any:
    active = studio.jobs.active()
    return tuple((job.id, job.state, job.stopping, job.since(10**12)[0], round(job.eta or 0)) for job in active)


def _jobs(studio: Studio) -> str:
    return jobs_markup([_line(studio, job) for job in studio.jobs.active()])


def _line(studio: Studio, job: Job) -> JobLine:
    view = studio.view(job)
    return JobLine(
        id=job.id,
        title=job.title,
        running=job.state == "running",
        share=view.share,
        detail=progress_text(job, view),
        place=job.place,
        stopping=job.stopping,
        stop="Stop and keep" if job.kind in ("train", "generate") else "Stop",
    )


def _base_sign(studio: Studio) -> Any:
    return studio.base.where, studio.base.fingerprint, studio.base.error


def _base(studio: Studio) -> list[str]:
    """Which base is loaded, and what went wrong with the one that was wanted."""
    base = studio.base
    name, trouble = f"Base <b>{escape(base.title)}</b>", problem(base.error) if base.error else ""
    if base.model is not None:
        return [f'<p><i class="dot"></i>{name}</p>', trouble]
    return [f'<p><i class="dot off"></i>{name}, not loaded yet</p>', trouble]


def _over(studio: Studio) -> Any:
    return tuple(job.id for job in studio.jobs.jobs() if job.over)


def _toast(studio: Studio, seen: list[str]) -> list[Any]:
    """A word about a job that ended since this page last looked; nothing about what was over before it opened."""
    over = [job for job in studio.jobs.jobs() if job.over]
    fresh = [job for job in over if job.id not in seen] if seen else []
    ids = [*(job.id for job in over), "opened"]
    fresh = [job for job in fresh if job.kind not in QUIET_KINDS]
    if not fresh:
        return [gr.skip(), ids]
    job = fresh[-1]
    failed = " failed" if job.state == "failed" else ""
    text = f"{ending(job)}: {job.title}"
    return [f'<div class="toast{failed}" role="status" data-job="{escape(job.id)}">{escape(text)}</div>', ids]
