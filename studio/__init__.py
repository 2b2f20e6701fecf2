"""What a person sees. Gradio lives only here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

    from studio.session import Studio


def build_ui(studio: Studio) -> gr.Blocks:
    """The page: what runs, and the list of tabs. Pass `launch_options()` when launching it."""
    import gradio as gr

    from studio.page import Page, keep_watching
    from studio.tabs import attention, generate, library, top, train

    with gr.Blocks(title="Attune", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        page = Page(gr.State(""))
        top.build(studio, page)
        with gr.Tabs(elem_id="tabs") as tabs:
            page.tabs.append(tabs)
            for tab in (train, generate, attention, library):
                with gr.Tab(tab.TITLE, id=tab.ID, elem_id=f"tab-{tab.ID}"):
                    tab.build(studio, page)
        keep_watching(blocks, page)
    return blocks
