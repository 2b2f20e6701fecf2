"""The part of the Train tab where masks are found and painted: white is the subject, the rest is not learned from."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from pipelines import StudioError
from studio.page import Page, Watch
from studio.parts.cards import picked
from studio.parts.live import progress_text
from studio.parts.message import answering, done, problem
from studio.parts.painter import painter, wanted
from studio.parts.pictures import data_uri
from studio.photo_masks import (
    EXAMPLE_STAYS,
    has_finder,
    layers,
    mask_drawing,
    photo_of,
    save_masks,
    with_outline,
)
from studio.session import Studio
from studio.tabs import things
from studio.work import EXAMPLE, start_masks, start_outline, waiting

PATIENCE = 300  # seconds that a page waits for an outline
HOW = (
    '<p class="hint">A mask says what of a photo is learned: the subject, and not what is around it. Find them by what '
    "the base sees in your word, then click a photo above and put right what is wrong.</p>"
)
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(studio: Studio, page: Page, chosen: gr.Dropdown, gallery: gr.HTML, named: things.Things) -> None:
    """`gallery` are the photos of the set `chosen`, a click on one of which opens its masks."""
    with gr.Accordion("Masks", open=False, elem_id="masks") as box:
        gr.HTML(HOW)
        with gr.Row(elem_classes="actions"):
            find = gr.Button("Find masks by attention", size="sm", elem_id="masks-find", min_width=150)
            discover = gr.Button("Find things without a word", size="sm", elem_id="masks-discover", min_width=150)
        overwrite = gr.Checkbox(label="Also replace masks that I made", elem_id="masks-overwrite")
        message = gr.HTML("", elem_id="masks-message")
        live = gr.HTML("", elem_id="masks-live")
        with gr.Column(visible=False, elem_id="mask-editor") as editor:
            title = gr.HTML("", elem_id="mask-title")
            board = painter("mask-painter", "masks")
            with gr.Row(elem_classes="actions"):
                save = gr.Button("Save the masks", size="sm", variant="primary", elem_id="mask-save", min_width=120)
                close = gr.Button("Close", size="sm", min_width=80)
        where = gr.Textbox(
            label="Segment Anything checkpoint", placeholder="/path/to/sam_vit_b.pth",
            info="For outlines in real photos. Toybox has one of its own", elem_id="masks-checkpoint",
        )  # fmt: skip
    photo, names = gr.State(""), gr.State([])
    page.watch(Watch([live], lambda: _sign(studio), lambda: [_live(studio)]))
    _wire_finding(studio, chosen, named, find, discover, overwrite, message)

    @answering(6)
    def open_photo(dataset: str, path: str, *given: Any, event: gr.EventData) -> list[Any]:
        if dataset == EXAMPLE:
            raise StudioError(EXAMPLE_STAYS)
        shown = photo_of(studio, dataset, picked(event))
        mine = layers(shown, [one["name"] for one in things.read(given)])
        look = gr.update(value=mask_drawing(shown, mine), picture=data_uri(shown.image, 1024), finder=has_finder(path))
        head = f"<h3 class='part'>Masks of {escape(shown.path.name)}</h3>"
        return [gr.update(open=True), gr.update(visible=True), head, look, shown.path.name, mine, ""]

    @answering(0)
    def write(dataset: str, name: str, mine: list[str], value: str) -> tuple[str]:
        changed = save_masks(studio, dataset, name, mine, value)
        return (done(f"Saved: {', '.join(changed)}." if changed else "Nothing was changed."),)

    @answering(1)
    def outline(dataset: str, name: str, value: str, path: str, event: gr.EventData) -> list[Any]:
        number, at, _ = wanted(event)
        job = start_outline(studio, photo_of(studio, dataset, name).image, at, (path or "").strip())
        job.wait(PATIENCE)
        if job.state != "done":
            raise StudioError(job.error or "No outline was found. Paint the mask.")
        return [with_outline(value, number, studio.view(job).result), ""]

    def shut() -> Any:
        return gr.update(visible=False)

    gallery.pick(
        _with_event(open_photo),
        [chosen, where, *named.all],
        [box, editor, title, board, photo, names, message],
        **QUIET,
    )
    save.click(write, [chosen, photo, names, board], [message], **QUIET)
    board.find(outline, [chosen, photo, board, where], [board, message], **QUIET)
    gr.on([close.click, chosen.input], shut, None, editor, queue=False, **QUIET)


def _with_event(handler: Any) -> Any:
    """Gradio finds out by its annotation which argument is the event; after *args it needs one that comes first."""

    def call(event: gr.EventData, *given: Any) -> Any:
        return handler(*given, event=event)

    return call


def _wire_finding(
    studio: Studio, chosen: gr.Dropdown, named: things.Things, find: gr.Button, discover: gr.Button,
    overwrite: gr.Checkbox, message: gr.HTML,
) -> None:  # fmt: skip
    def start(dataset: str, nouns: list[str], names: list[str], replace: bool) -> tuple[str]:
        if dataset == EXAMPLE or not dataset:
            raise StudioError(EXAMPLE_STAYS if dataset else "There are no photos yet. Add some first.")
        ahead = len(studio.jobs.active())
        job = start_masks(studio, dataset, nouns, names, bool(replace))
        return (done(f"{job.title}.{waiting(ahead)}"),)

    @answering(0)
    def by_word(dataset: str, replace: bool, *given: Any) -> tuple[str]:
        known = things.read(given)
        if not all(one["noun"] for one in known):
            raise StudioError("What do the photos show? Give the ordinary word for it above, such as 'cat'.")
        if len(known) > 1 and not all(one["name"] for one in known):
            raise StudioError("Give each thing a name above: its masks are called by it.")
        return start(dataset, [one["noun"] for one in known], [one["name"] for one in known], replace)

    @answering(0)
    def without(dataset: str, replace: bool) -> tuple[str]:
        return start(dataset, [], [], replace)

    find.click(by_word, [chosen, overwrite, *named.all], [message], api_visibility="private")
    discover.click(without, [chosen, overwrite], [message], api_visibility="private")


def _sign(studio: Studio) -> Any:
    job = studio.latest("masks")
    return None if job is None else (job.id, job.state, job.since(10**12)[0])


def _live(studio: Studio) -> str:
    """What the newest search is doing, or what came of it."""
    job = studio.latest("masks")
    if job is None:
        return ""
    view = studio.view(job)
    if not job.over:
        return f'<p class="hint" data-state="{job.state}">{escape(progress_text(job, view))}</p>'
    if job.state == "failed":
        return problem(job.error)
    found = view.result or {"written": [], "kept": [], "missing": []}
    told = [f"{len(found['written'])} masks are found; they are in the pictures above."]
    if found["kept"]:
        told.append(f"{len(found['kept'])} that a person made are kept.")
    if found["missing"]:
        told.append(f"Nothing was found for {', '.join(found['missing'][:6])}: paint it, or choose another word.")
    return f'<div data-state="{job.state}">{done(" ".join(told))}</div>'
