"""The part of the Generate tab that says where things are to be: painted regions, and how words are led there."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines import StudioError
from studio.asked import APART, filled
from studio.configs import ENDINGS, asked_elements, set_aside, start_opening
from studio.layouts import found_layout, shape
from studio.page import Memory, Page, Watch
from studio.parts.message import answering, done
from studio.parts.painter import painter
from studio.prompt_files import start_lines, summary
from studio.session import Studio
from studio.work import waiting

PATIENCE = 1800  # seconds that a page waits for a configuration: its base may have to be downloaded first
COLLAGE = (
    "Photo sets with masks, several in the Library's order: keeps alike subjects apart. MuDI does so with the negative "
    "prompt “sticker, collage”"
)
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
Controls = dict[str, Any]
_TELL_PROMPT = """(prompt) => {
  window.attunePrompt = prompt || '';
  window.dispatchEvent(new Event('attune-prompt'));
}"""


def layout_controls() -> Controls:
    """The painter, and what belongs to it."""
    with gr.Accordion("Layout: where things are to be", open=False, elem_id="layout"):
        gr.HTML(
            '<p class="hint">Give each thing in the prompt its place; a concept then acts there alone. '
            "Leave room around a region: attention is led there, not cut out.</p>"
        )
        board = painter("painter", "layout")
        with gr.Row():
            used = gr.Checkbox(True, label="Use this layout", elem_id="layout-on", min_width=130)
            found = gr.Button("Take the regions found last", size="sm", visible=False, elem_id="layout-found")
            opened = gr.UploadButton(
                "Open a Cones 2 configuration", file_count="multiple", file_types=list(ENDINGS), size="sm",
                elem_id="layout-open", min_width=150,
            )  # fmt: skip
            every = gr.Button("Paint all of it", size="sm", visible=False, elem_id="layout-all", min_width=150)
        with gr.Row(visible=False, elem_id="placed-row") as row:
            told = gr.HTML("", elem_id="placed-told")
            drop = gr.Button("Leave them out", size="sm", min_width=110, elem_id="placed-drop")
        message = gr.HTML("", elem_id="layout-message")
    # what stands beside the controls is found under these names by `wire`, and is no input of a picture
    aside = {"_found": found, "_open": opened, "_row": row, "_told": told, "_drop": drop, "_message": message}
    aside |= {"_all": every, "_elements": gr.State({})}
    return {"layout": board, "layout_on": used, "placed": gr.State([]), "start": gr.State(None)} | aside


def advanced_controls() -> Controls:
    """Everything that a first picture needs no thought of."""
    with gr.Accordion("Advanced", open=False, elem_id="generate-advanced"):
        apart = gr.Radio(
            list(APART), value=next(iter(APART)), label="Keep concepts apart", elem_id="apart",
            info="Without a layout: a short first pass finds a region for each concept and shows it",
        )  # fmt: skip
        with gr.Row(elem_classes="fields"):
            guide = gr.Number(
                0.08, label="Layout: how firmly", info="0.05 to 0.1; 0: only where concepts act", elem_id="guide"
            )
            steps = gr.Textbox(
                label="Layout: guided steps", info="Empty: all", placeholder="all", elem_id="guided-steps"
            )
            outside = gr.Number(-1e8, label="Layout: weight outside", info="-1e8 forbids, 0 allows", elem_id="outside")
        figure = gr.Checkbox(
            label="Forbid a word only the regions of others", elem_id="figure",
            info="Otherwise it is forbidden everywhere outside its own",
        )  # fmt: skip
        with gr.Row(elem_classes="fields"):
            recur = gr.Slider(
                0, 5, value=0, step=1, label="Take each step again",
                info="With fresh noise; the guided ones of a layout", elem_id="recur",
            )  # fmt: skip
            ramp = gr.Checkbox(label="Falling guidance", info="Twice the CFG at first", elem_id="ramp")
            trim = gr.Checkbox(label="Leave out padding", info="Of short prompts", elem_id="trim")
        with gr.Row(elem_classes="fields"):
            begin = gr.Dropdown(
                [], value=[], multiselect=True, label="Begin as a faint collage of",
                info=COLLAGE, elem_id="start-photos",
            )  # fmt: skip
            strength = gr.Textbox(
                label="How strongly", info="0 to 4; empty: 2, from four subjects on 3", placeholder="usual",
                elem_id="start-strength",
            )  # fmt: skip
            sizes = gr.Textbox(
                label="How large", info="One share each, in the prompt's order: 1 0.5", placeholder="as it comes",
                elem_id="start-sizes",
            )  # fmt: skip
            counted = gr.Textbox(
                label="Count them as", info='From three concepts on: "3 objects: ..." (MuDI)', placeholder="not",
                elem_id="counted", max_length=40,
            )  # fmt: skip
    return {
        "apart": apart, "guide": guide, "guided_steps": steps, "outside": outside, "figure": figure, "recur": recur,
        "ramp": ramp, "trim": trim, "start_photos": begin, "start_strength": strength,
        "start_sizes": sizes, "counted": counted,
    }  # fmt: skip


def wire(studio: Studio, page: Page, controls: Controls, aside: Controls) -> None:
    """The painter follows prompt and size; regions can be taken from a picture or a file; the browser remembers."""
    board, sides = controls["layout"], [controls["width"], controls["height"]]

    def reshape(width: Any, height: Any) -> Any:
        return gr.update(shape=shape(studio.base.native_size, width, height))

    page.watch(Watch([board], lambda *_: studio.base.native_size, lambda *given: [reshape(*given)], sides))
    gr.on([side.change for side in sides], reshape, sides, board, trigger_mode="always_last", **QUIET)
    controls["prompt"].change(None, controls["prompt"], None, js=_TELL_PROMPT, show_progress="hidden")
    kept = [controls[name] for name in ("prompt", "layout", "layout_on")]
    page.remember(Memory("layout", kept, [board.paint, controls["prompt"].change, controls["layout_on"].change]))

    brought = [controls["placed"], controls["start"]]
    gr.on([one.change for one in brought], _brought, brought, [aside["_row"], aside["_told"]], **QUIET)
    aside["_drop"].click(lambda: ([], None), None, brought, **QUIET)
    page.watch(
        Watch(
            [controls["start_photos"]],
            lambda: tuple(each.id for each in studio.datasets.all()),
            lambda: [gr.update(choices=[(each.title, each.id) for each in studio.datasets.all()])],
        )
    )
    page.watch(
        Watch([aside["_found"]], lambda: _sign(studio), lambda: [gr.update(visible=bool(_regions(studio)))]),
    )
    _wire_files(studio, controls, aside)


def _wire_files(studio: Studio, controls: Controls, aside: Controls) -> None:
    outputs = [*controls.values(), aside["_elements"], aside["_all"]]

    @answering(len(outputs))
    def open_config(files: list[str] | None, *given: Any) -> list[Any]:
        job = start_opening(studio, [Path(file) for file in files or []])
        job.wait(PATIENCE)
        if job.state != "done":
            raise StudioError(job.error or "The configuration was not read. Open it again.")
        result = studio.view(job).result
        elements = result["requests"]
        several = len(elements) > 1
        which = f"The first of the {len(elements)} pictures in " if several else ""
        counts = ["Settings that you change from now on count for all."] * several
        said = " ".join([f"{which}{result['name']} is filled in.", *counts, *result["notes"]])
        button = gr.update(visible=several, value=f"Paint all {len(elements)} pictures of it")
        first = filled(studio, {"request": elements[0]})
        opened = result | {"shown": dict(zip(controls, given, strict=True)) | first}
        return [*updates(controls, first), opened, button, done(said)]

    @answering(0)
    def paint_all(opened: dict[str, Any], *given: Any) -> tuple[str]:
        values = dict(zip(controls, given, strict=True))
        lines = asked_elements(studio, values, opened)
        ahead = len(studio.jobs.active())
        start_lines(studio, lines)
        return (done(f"{summary(lines)}.{set_aside(values, opened)}{waiting(ahead)}"),)

    @answering(2)
    def take() -> list[Any]:
        return [found_layout(_regions(studio)), True, done("The regions are in the layout. Change them as you like.")]

    aside["_open"].upload(
        open_config, [aside["_open"], *controls.values()], [*outputs, aside["_message"]], api_visibility="private"
    )
    aside["_all"].click(
        paint_all, [aside["_elements"], *controls.values()], [aside["_message"]], api_visibility="private"
    )
    aside["_found"].click(
        take, None, [controls["layout"], controls["layout_on"], aside["_message"]], api_visibility="private"
    )


def updates(controls: Controls, values: dict[str, Any]) -> list[Any]:
    """For each control its new value, or nothing."""
    return [gr.update(value=values[name]) if name in values else gr.skip() for name in controls]


def _brought(placed: list[dict[str, Any]], start: dict[str, Any] | None) -> tuple[Any, str]:
    """What a file or a recipe brought along that has no field of its own."""
    told = []
    if placed:
        told.append("adds the residuals " + ", ".join(f"{one['name']} at token {one['at']}" for one in placed))
    if start:
        words = dict.fromkeys(str(word) for word, _ in start.get("cutouts", []))
        told.append(f"begins as a faint collage of {', '.join(words)}")
    return gr.update(visible=bool(told)), f'<p class="message advice">The picture {escape(" and ".join(told))}.</p>'


def _sign(studio: Studio) -> Any:
    job = studio.latest("generate")
    return None if job is None else (job.id, tuple(_regions(studio)))


def _regions(studio: Studio) -> dict[str, Any]:
    """Of the newest generation: the regions that its first pass found, by token."""
    job = studio.latest("generate")
    return {} if job is None else studio.view(job).regions
