"""Measure, in the Generate tab: a concept's likeness and obedience, and who is in the pictures."""

from __future__ import annotations

import shutil
from typing import Any

import gradio as gr

from pipelines import StudioError
from studio.measure import KIND, photo_choices, start_identities, start_likeness
from studio.page import Page, Watch
from studio.parts.download import download
from studio.parts.message import answering, done
from studio.parts.report import report_markup
from studio.session import Studio
from studio.work import waiting

LIKENESS, IDENTITIES = "A concept: is it like its photos, does it follow the prompt?", "The pictures: who is in them?"


def build(studio: Studio, page: Page, chosen: gr.State) -> None:
    """`chosen` is the id of the picture that is looked at."""
    with gr.Accordion("Measure", open=False, elem_id="measure"):
        what = gr.Radio([LIKENESS, IDENTITIES], value=LIKENESS, label="What", elem_id="measure-what")
        concept = gr.Dropdown([], label="Concept", elem_id="measure-concept")
        sets = gr.Dropdown(
            photo_choices(studio), value=[], multiselect=True, label="Photos of it", elem_id="measure-photos",
            info="For pictures: a set for each concept in them, in their order",
        )  # fmt: skip
        with gr.Row() as painted:
            images = gr.Slider(1, 32, value=2, step=1, label="Pictures of each prompt", elem_id="measure-images")
            masked = gr.Checkbox(label="Without the backgrounds, too", elem_id="measure-masked")
        with gr.Row():
            first = gr.Textbox(
                label="CLIP, or detector", info="Hub id or folder; empty: Toybox's own", elem_id="measure-first"
            )
            second = gr.Textbox(
                label="DINO, or embedder", info="Hub id or folder; may be empty", elem_id="measure-second"
            )
        button = gr.Button("Measure", elem_id="measure-button")
        message = gr.HTML("", elem_id="measure-message")
        shown = gr.HTML("", elem_id="measure-shown", apply_default_css=False)
        files = gr.Button("Download it all as zip", size="sm", visible=False, elem_id="measure-files")
    page.watch(
        Watch(
            [concept, sets],
            lambda: (studio.library_sign(), tuple(each.id for each in studio.datasets.all())),
            lambda: [
                gr.update(choices=[one.name for one in studio.library.concepts()]),
                gr.update(choices=photo_choices(studio)),
            ],
        )
    )
    page.watch(Watch([shown, files], lambda: _sign(studio), lambda: _result(studio)))

    def switch(what: str) -> list[Any]:
        return [gr.update(visible=what == LIKENESS) for _ in range(2)]

    what.change(switch, what, [concept, painted], queue=False, show_progress="hidden", api_visibility="private")

    @answering(1)
    def measure(what: str, concept: str, sets: list[str], images: float, masked: bool, *rest: Any) -> tuple[Any, str]:
        first, second, picture = rest
        ahead, models = len(studio.jobs.active()), (first or "", second or "")
        if what == LIKENESS:
            start_likeness(studio, concept, sets or [], int(images), bool(masked), models)
        else:
            start_identities(studio, picture or "", sets or [], models)
        return gr.skip(), done(f"It is being measured.{waiting(ahead)}")

    given = [what, concept, sets, images, masked, first, second, chosen]
    button.click(measure, given, [button, message], api_visibility="private")
    download(files, "measure-zip", lambda: _zipped(studio), [], message)


def _sign(studio: Studio) -> Any:
    job = studio.latest(KIND)
    return None if job is None else (job.id, job.state)


def _result(studio: Studio) -> list[Any]:
    job = studio.latest(KIND)
    if job is None or not job.over:
        return ["" if job is None else '<p class="empty">It is being measured.</p>', gr.update(visible=False)]
    report = studio.view(job).result
    if report is None:
        return ["", gr.update(visible=False)]
    return [report_markup(report), gr.update(visible=True)]


def _zipped(studio: Studio) -> str:
    job = studio.latest(KIND)
    report = studio.view(job).result if job else None
    if report is None:
        raise StudioError("Nothing has been measured yet.")
    return shutil.make_archive(str(studio.scratch() / report.folder.name), "zip", report.folder)
