"""The part of the Train tab about class pictures: which are learned beside the photos, and painting a set of them."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from pipelines import StudioError
from studio.class_pictures import EACH, KIND, MOST, SURE, Classes, made_by, start_classes
from studio.page import Page, Watch
from studio.parts.live import progress_text
from studio.parts.message import answering, done, problem
from studio.session import Studio
from studio.tabs import things
from studio.work import waiting

ATTENTION, DETECTOR = "By attention", "By a detector"
HOW = (
    '<p class="hint">They keep the word for a thing from coming to mean yours alone (prior preservation). The base '
    "paints the things named above, and a mask is found in every picture, so that collages can be made of them. Choose "
    "the set under Class pictures then; it counts where prior_weight, under Advanced, is above 0.</p>"
)


def build(studio: Studio, page: Page, named: things.Things) -> gr.Dropdown:
    """Gives the dropdown of the sets there are."""
    chosen = gr.Dropdown(
        _choices(studio), value="", label="Class pictures", visible=len(_choices(studio)) > 1, elem_id="train-classes",
        info="Of prior preservation: painted by the base, or a set of one's own", interactive=True,
    )  # fmt: skip  # interactive: only the form that is drawn later reads it, so Gradio takes it for an output
    page.watch(Watch([chosen], lambda: str(_choices(studio)), lambda: [_update(studio)]))
    with gr.Accordion("Paint class pictures", open=False, elem_id="classes"):
        gr.HTML(HOW)
        with gr.Row():
            each = gr.Slider(1, MOST, value=EACH, step=1, label="Pictures of each", elem_id="classes-each")
            how = gr.Radio([ATTENTION, DETECTOR], value=ATTENTION, label="Masks are found", elem_id="classes-how")
        with gr.Row(visible=False) as tools:
            seer = gr.Textbox(
                label="Detector", placeholder="google/owlv2-base-patch16-ensemble",
                info="Hub id or folder, for real photos. Toybox has one of its own", elem_id="classes-detector",
            )  # fmt: skip
            where = gr.Textbox(
                label="Segment Anything checkpoint", placeholder="/path/to/sam_vit_b.pth",
                info="For outlines in real photos. Toybox has one of its own", elem_id="classes-checkpoint",
            )  # fmt: skip
            sure = gr.Slider(
                0, 1, value=SURE, step=0.05, label="Least certainty", info="Toybox's detector has its own",
                elem_id="classes-sure",
            )  # fmt: skip
        button = gr.Button("Paint class pictures", size="sm", elem_id="classes-button")
        message = gr.HTML("", elem_id="classes-message")
        live = gr.HTML("", elem_id="classes-live")
    page.watch(Watch([live], lambda: _sign(studio), lambda: [_live(studio)]))
    how.change(
        lambda how: gr.update(visible=how == DETECTOR), how, tools, queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip

    @answering(0)
    def paint(each: float, how: str, seer: str, where: str, sure: float, *given: Any) -> tuple[str]:
        known = things.read(given)
        things.complete(known)
        wish = Classes({one["name"]: one["noun"] for one in known}, int(each))
        if how == DETECTOR:
            wish = Classes(wish.nouns, wish.each, _detector(studio, seer), (where or "").strip(), float(sure))
        ahead = len(studio.jobs.active())
        return (done(f"{start_classes(studio, wish).title}.{waiting(ahead)}"),)

    button.click(paint, [each, how, seer, where, sure, *named.all], [message], api_visibility="private")
    return chosen


def _detector(studio: Studio, named: str) -> str:
    named = (named or "").strip() or ("toybox" if studio.base.kind == "toybox" else "")
    if not named:
        raise StudioError("Name a detector, such as google/owlv2-base-patch16-ensemble.")
    return named


def _choices(studio: Studio) -> list[tuple[str, str]]:
    return [("Painted by the base", ""), *((each.title, each.id) for each in studio.datasets.classes())]


def _update(studio: Studio) -> Any:
    return gr.update(choices=_choices(studio), visible=len(_choices(studio)) > 1)


def _sign(studio: Studio) -> Any:
    job = studio.latest(KIND)
    return None if job is None else (job.id, job.state, job.since(10**12)[0])


def _live(studio: Studio) -> str:
    """What the newest painting is doing, or what came of it."""
    job = studio.latest(KIND)
    if job is None:
        return ""
    if not job.over:
        return f'<p class="hint" data-state="{job.state}">{escape(progress_text(job, studio.view(job)))}</p>'
    if job.state == "failed":
        return problem(job.error)
    found = made_by(studio, job)
    if found is None:
        return f'<div data-state="stopped">{done("Stopped before there was one of each: none is kept.")}</div>'
    begun = "Stopped; what is done is kept" if job.state == "stopped" else "They are painted"
    left_out = [note for note in studio.view(job).notes if not note.endswith("…")]
    said = " ".join([f"{begun}: choose “{found.title}” under Class pictures, above.", *left_out[:3]])
    return f'<div data-state="{job.state}">{done(said)}</div>'
