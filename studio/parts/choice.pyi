"""A dropdown whose list changes while a page is open: photo sets and concepts come and go."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gradio.events import Dependency

class Choice(gr.Dropdown):
    """Hands on what the browser sends. Gradio's own refuses a value that has gone from the list, and with it every
    event of the page that reads it, also the ones that would choose another. Handlers check what they get."""

    is_template = True  # what Gradio calls a component that looks like the one it is made of

    def preprocess(self, payload: Any) -> Any:
        return payload
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component