"""A button that makes a file when it is pressed and hands it to the browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from studio.parts.message import answering, done


def download(
    button: gr.Button, elem_id: str, prepare: Callable[..., str], inputs: Sequence[Any], message: gr.HTML
) -> None:
    """On a press `prepare` gets the inputs' values and returns the path of a file outside the workspace.

    Gradio's own download button only knows a file that already exists; so a hidden one is filled and then pressed.
    """
    hidden = gr.DownloadButton(visible="hidden", elem_id=elem_id)

    @answering(1)
    def fill(*values: Any) -> tuple[Any, str]:
        return gr.update(value=prepare(*values)), done("Ready: your browser saves the file.")

    press = f"document.querySelector('#{elem_id}')?.click()"
    when_ready = f"(value, said) => {{ if (said.includes('message done')) setTimeout(() => {press}, 150); }}"
    button.click(fill, list(inputs), [hidden, message], api_visibility="private").then(
        None, [hidden, message], None, js=when_ready
    )
