"""Colours, type, shortcuts. Everything is local: no fonts or scripts from elsewhere."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

LAGOON = gr.themes.Color(
    name="lagoon",
    c50="#effcf9",
    c100="#d0f5ec",
    c200="#a4e9dc",
    c300="#6dd6c6",
    c400="#38baac",
    c500="#1b9e92",
    c600="#117e77",
    c700="#11655f",
    c800="#12514d",
    c900="#134340",
    c950="#052827",
)
SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
HERE = Path(__file__).parent


def theme() -> gr.themes.Base:
    """Gradio's soft shapes with an accent of our own, in light and dark."""
    base = gr.themes.Soft(
        primary_hue=LAGOON, secondary_hue=LAGOON, neutral_hue="stone", radius_size="md", font=SANS, font_mono=MONO
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600",
        block_shadow="none",
        block_border_width="1px",
        button_large_text_weight="600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_shadow="none",
        button_secondary_shadow="none",
        button_border_width="1px",
        button_secondary_border_color="*border_color_primary",
        button_secondary_border_color_dark="*border_color_primary",
        input_shadow="none",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_600",
        checkbox_label_shadow="none",
    )


def css() -> str:
    """The style sheet: layout of our own parts, drawn with Gradio's variables so that dark mode follows."""
    return (HERE / "studio.css").read_text(encoding="utf-8")


def head() -> str:
    """Ctrl+Enter generates or trains, Esc stops: the page's only script of its own."""
    return f"<script>{(HERE / 'shortcuts.js').read_text(encoding='utf-8')}</script>"
