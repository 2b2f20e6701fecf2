"""The pictures so far: look at one, take it away, use its settings again, see its attention, delete it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines import StudioError, delete_result, zip_results
from studio.configs import export
from studio.page import Page, Watch
from studio.parts.cards import cards, cards_markup, picked
from studio.parts.download import download
from studio.parts.message import answering, done
from studio.parts.recipe import recipe_facts
from studio.results import demand, find, picture_cards, pictures, results_sign
from studio.session import Studio

EMPTY = "No pictures yet."
AT_ONCE = 24
PATIENCE = 600  # seconds that a page waits for a configuration
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
Fill = Callable[[dict[str, Any]], list[Any]]  # recipe -> updates of the controls


@dataclass(frozen=True)
class _Details:
    """One picture, beneath the grid."""

    chosen: gr.State  # id of the picture
    box: gr.Column
    image: gr.Image
    facts: gr.HTML
    attention: gr.Button
    settings: gr.Button
    zip: gr.Button
    guidance: gr.Button
    delete: gr.Button
    sure: gr.Row
    really: gr.Button
    keep: gr.Button
    message: gr.HTML


def build(studio: Studio, page: Page, outputs: list[Any], fill: Fill) -> gr.State:
    """`outputs` are the controls of the Generate tab; `fill` turns a recipe into their updates. Gives the id of the
    picture that is looked at."""
    gr.HTML("<h3 class='part'>Pictures so far</h3>")
    details = _details()
    shown = cards("results", "Pictures")
    count = gr.State(AT_ONCE)
    with gr.Row():
        more = gr.Button("Show more", size="sm", visible=False, elem_id="results-more")
    page.watch(
        Watch(
            [shown, more],
            lambda count, chosen: (count, chosen, results_sign(studio.workspace)),
            lambda count, chosen: _grid(studio, count, chosen),
            [count, details.chosen],
        )
    )
    more.click(lambda count: count + AT_ONCE, count, count, queue=False, **QUIET)

    def show(event: gr.EventData) -> list[Any]:
        return _shown(studio, picked(event))

    shown.pick(
        show, None, [details.chosen, details.box, details.image, details.facts, details.attention, details.message],
        queue=False, **QUIET,
    )  # fmt: skip
    _wire_use(studio, page, details, outputs, fill)
    _wire_delete(studio, details)
    return details.chosen


def _details() -> _Details:
    chosen = gr.State("")
    with gr.Column(visible=False, elem_id="result-details") as box:
        with gr.Row():
            image = gr.Image(
                format="png", interactive=False, show_label=False, buttons=["download", "fullscreen"],
                elem_id="result-picture", height=340, scale=1, min_width=220,
            )  # fmt: skip
            with gr.Column(scale=1, min_width=220):
                facts = gr.HTML("", elem_id="result-facts", apply_default_css=False)
        with gr.Row(elem_classes="actions"):
            attention = gr.Button("See its attention", size="sm", elem_id="result-attention", min_width=120)
            settings = gr.Button("Use these settings", size="sm", elem_id="result-settings", min_width=120)
            zip = gr.Button("Download all as zip", size="sm", elem_id="result-zip", min_width=120)
            guidance = gr.Button("As a Cones 2 configuration", size="sm", elem_id="result-guidance", min_width=120)
            delete = gr.Button("Delete", size="sm", variant="stop", elem_id="result-delete", min_width=80)
        with gr.Row(visible=False, elem_classes="actions") as sure:
            really = gr.Button("Delete it for good", size="sm", variant="stop", elem_id="result-really", min_width=120)
            keep = gr.Button("Keep it", size="sm", min_width=80)
    message = gr.HTML("", elem_id="result-message")
    return _Details(chosen, box, image, facts, attention, settings, zip, guidance, delete, sure, really, keep, message)


def _wire_use(studio: Studio, page: Page, details: _Details, outputs: list[Any], fill: Fill) -> None:
    @answering(len(outputs))
    def use(chosen: str) -> list[Any]:
        painted = demand(studio.workspace, chosen)
        recipe = painted.result.recipe | {"seed": painted.about["seed"]}
        return [*fill(recipe), done("The settings of this picture are filled in.")]

    def pack(chosen: str) -> str:
        result = demand(studio.workspace, chosen).result
        return str(zip_results(studio.workspace, [result.id], studio.scratch() / f"{result.id}.zip"))

    details.settings.click(use, details.chosen, [*outputs, details.message], **QUIET)

    def configured(chosen: str) -> str:
        job = export(studio, demand(studio.workspace, chosen).path)
        job.wait(PATIENCE)
        if job.state != "done":
            raise StudioError(job.error or "The configuration was not written. Try again.")
        return studio.shown(Path(studio.view(job).result["zip"]))

    download(details.zip, "result-download", pack, [details.chosen], details.message)
    download(details.guidance, "result-configuration", configured, [details.chosen], details.message)
    details.attention.click(
        lambda chosen: (chosen, gr.update(selected="attention")), details.chosen, [page.result, *page.tabs],
        queue=False, **QUIET,
    )  # fmt: skip


def _wire_delete(studio: Studio, details: _Details) -> None:
    @answering(3)
    def really(chosen: str) -> list[Any]:
        result = demand(studio.workspace, chosen).result
        delete_result(studio.workspace, result.id)
        gone = (
            f"{len(result.pictures)} pictures are deleted." if len(result.pictures) > 1 else "The picture is deleted."
        )
        return ["", gr.update(visible=False), gr.update(visible=False), done(gone)]

    def ask(chosen: str) -> Any:
        painted = find(studio.workspace, chosen)
        number = len(painted.result.pictures) if painted else 1
        label = f"Delete all {number} of this run for good" if number > 1 else "Delete it for good"
        return gr.update(visible=True), gr.update(value=label)

    details.delete.click(ask, details.chosen, [details.sure, details.really], queue=False, **QUIET)
    details.keep.click(lambda: gr.update(visible=False), None, details.sure, queue=False, **QUIET)
    details.really.click(really, details.chosen, [details.chosen, details.box, details.sure, details.message], **QUIET)


def _grid(studio: Studio, count: int, chosen: str) -> list[Any]:
    painted = pictures(studio.workspace)
    markup = cards_markup(picture_cards(painted[:count]), chosen, EMPTY)
    return [markup, gr.update(visible=len(painted) > count)]


def _shown(studio: Studio, chosen: str) -> list[Any]:
    painted = find(studio.workspace, chosen)
    if painted is None:
        return ["", gr.update(visible=False), None, "", gr.skip(), ""]
    button = gr.update(interactive=bool(painted.words))
    return [painted.id, gr.update(visible=True), studio.shown(painted.path), recipe_facts(painted), button, ""]
