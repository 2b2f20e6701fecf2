"""Measure, in the Generate tab: a concept's likeness and obedience, and who is in the pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import gradio as gr

from pipelines import Identities, Likeness, StudioError, prompts_in
from studio.measure import KIND, photo_choices, start_identities, start_likeness
from studio.page import Page, Watch
from studio.parts.download import download
from studio.parts.message import answering, done
from studio.parts.report import report_markup
from studio.session import Studio
from studio.work import waiting

FORMS = {"spectral (released code)": "spectral", "Frobenius": "fro", "squared (paper)": "fro2"}
STRONGEST = 1.5  # of a concept, as when it is painted
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
        given, painted, compared = _settings()
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
        return [*(gr.update(visible=what == LIKENESS) for _ in range(2)), gr.update(visible=what != LIKENESS)]

    shifted = [concept, painted, compared]
    what.change(switch, what, shifted, queue=False, show_progress="hidden", api_visibility="private")

    @answering(1)
    def measure(what: str, concept: str, sets: list[str], picture: str, *rest: Any) -> tuple[Any, str]:
        ahead, values = len(studio.jobs.active()), dict(zip(given, rest, strict=True))
        if what == LIKENESS:
            start_likeness(studio, concept, sets or [], *likeness(values))
        else:
            start_identities(studio, picture or "", sets or [], identities(values))
        return gr.skip(), done(f"It is being measured.{waiting(ahead)}")

    asked = [what, concept, sets, chosen, *given.values()]
    button.click(measure, asked, [button, message], api_visibility="private")
    download(files, "measure-zip", lambda: _zipped(studio), [], message)


def _settings() -> tuple[dict[str, Any], gr.Column, gr.Row]:
    """The settings by name, with what holds those of a concept and those of pictures."""
    with gr.Column() as painted:
        with gr.Row():
            images = gr.Slider(1, 32, value=2, step=1, label="Pictures of each prompt", elem_id="measure-images")
            steps = gr.Slider(1, 100, value=Likeness().steps, step=1, label="Steps", elem_id="measure-steps")
        with gr.Row():
            strength = gr.Slider(0, STRONGEST, value=1, step=0.05, label="Strength", elem_id="measure-strength")
            masked = gr.Checkbox(label="Without the backgrounds, too", elem_id="measure-masked")
        prompts = gr.Textbox(
            label="Own prompts", lines=2, placeholder="a photo of a {} in the snow", elem_id="measure-prompts",
            info="One a line, {} for the subject; empty: the protocol's",
        )  # fmt: skip
    with gr.Row(visible=False) as compared:
        form = gr.Dropdown(
            list(FORMS.items()), value="spectral", label="Form of the score", scale=2, elem_id="measure-form"
        )
        match = gr.Dropdown(
            ["greedy", "best"], value="greedy", label="Who is whom", min_width=110, elem_id="measure-match"
        )
        threshold = gr.Number(
            Identities().threshold, label="Detector is sure from", min_width=110, elem_id="measure-threshold"
        )
    with gr.Row():
        first = gr.Textbox(
            label="CLIP, or detector", info="Hub id or folder; empty: Toybox's own", elem_id="measure-first"
        )
        second = gr.Textbox(label="DINO, or embedder", info="Hub id or folder; may be empty", elem_id="measure-second")
    settings = {"images": images, "steps": steps, "strength": strength, "masked": masked, "prompts": prompts}
    settings |= {"form": form, "match": match, "threshold": threshold, "first": first, "second": second}
    return settings, painted, compared


def likeness(values: Mapping[str, Any]) -> tuple[Likeness, float]:
    """What is painted and by what it is measured, and the concept's strength."""
    own, (first, second) = str(values.get("prompts") or ""), _models(values)
    prompts = prompts_in(own, "Own prompts") if own.strip() else ()
    strength = values["strength"]
    wish = Likeness(int(values["images"]), int(values["steps"]), prompts, bool(values.get("masked")), first, second)
    return wish, 1.0 if strength is None else float(strength)


def identities(values: Mapping[str, Any]) -> Identities:
    """How pictures are looked at."""
    sure = values["threshold"]
    return Identities(
        *_models(values), Identities().threshold if sure is None else float(sure), values["form"], values["match"]
    )


def _models(values: Mapping[str, Any]) -> tuple[str, str]:
    return str(values.get("first") or "").strip(), str(values.get("second") or "").strip()


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
