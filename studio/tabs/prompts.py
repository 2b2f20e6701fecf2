"""The part of the Generate tab that takes a file of prompts; under the prompt box it says that they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from pipelines import StudioError
from studio.parts.message import done, problem
from studio.prompt_files import told

HOW = (
    '<p class="hint">One prompt in every line; blank lines don\'t count. {} stands for the word of the concept that is '
    "chosen under Concepts. Generate then paints every prompt with all that is set here, as many pictures of each as "
    "Pictures says.</p>"
)
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Instead:
    """A row under the prompt box that is there while a file is."""

    row: gr.Row
    told: gr.HTML
    drop: gr.Button


def instead() -> Instead:
    with gr.Row(visible=False, elem_id="prompt-file-row") as row:
        with gr.Column(scale=4, min_width=220):
            told = gr.HTML("", elem_id="prompt-file-told")
        drop = gr.Button("Take the file out", size="sm", min_width=110, elem_id="prompt-file-drop", scale=1)
    return Instead(row, told, drop)


def build(instead: Instead) -> gr.File:
    """Where the file is dropped."""
    with gr.Accordion("A file of prompts", open=False, elem_id="prompt-file"):
        gr.HTML(HOW)
        file = gr.File(file_types=[".txt"], label="Drop a .txt here", height=120, elem_id="prompt-file-drop-zone")
    file.change(_look, file, [instead.row, instead.told], **QUIET)
    instead.drop.click(lambda: None, None, file, **QUIET)
    return file


def _look(path: str | None) -> list[Any]:
    if path is None:
        return [gr.update(visible=False), ""]
    try:
        return [gr.update(visible=True), done(told(path))]
    except StudioError as error:
        return [gr.update(visible=True), problem(str(error))]
