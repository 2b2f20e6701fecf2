"""Generate: a prompt with its words, concepts with strengths, a layout, and the pictures that come of it."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from pipelines import SCHEDULERS, StudioError, read_picture, usual_guidance
from studio.asked import MOST_CONCEPTS, MOST_PICTURES, asked, filled
from studio.page import Memory, Page, Watch
from studio.parts.cards import picked
from studio.parts.chips import chips, chips_markup, split
from studio.parts.live import generate_markup
from studio.parts.message import answering, done
from studio.prompt_files import asked_lines, start_lines, summary
from studio.session import Studio
from studio.tabs import history, measure, prompts
from studio.tabs import layout as layouts
from studio.tabs.layout import Controls, updates
from studio.work import start_pictures, waiting

TITLE = "Generate"
ID = "generate"
STRONGEST = 1.5  # of a concept
NO_PICTURE = '<p class="empty">Pictures form here while they are painted.</p>'


def build(studio: Studio, page: Page) -> None:
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=6, min_width=330):
            controls = _controls(studio, page)
            button = gr.Button("Generate", variant="primary", elem_id="generate-button")
            gr.HTML('<p class="hint">Ctrl+Enter generates, Esc stops and keeps what is done.</p>')
            message = gr.HTML("", elem_id="generate-message")
            _drop(studio, controls)
        with gr.Column(scale=7, min_width=330):
            live = gr.HTML(NO_PICTURE, elem_id="generate-live", apply_default_css=False)
            looked_at = history.build(
                studio, page, list(controls.values()), lambda recipe: updates(controls, filled(studio, recipe))
            )
            measure.build(studio, page, looked_at)
    page.watch(Watch([live], lambda: _live_sign(studio), lambda: [_live(studio)]))

    @answering(1)
    def generate(*given: Any) -> tuple[Any, str]:
        values = dict(zip(controls, given, strict=True))
        ahead = len(studio.jobs.active())
        if values["prompt_file"]:
            lines = asked_lines(studio, values)
            start_lines(studio, lines)
            said = f"{summary(lines)}. {_seeds(lines[0].request.seeds)}, the same for each."
        else:
            request, concepts, words = asked(studio, values)
            start_pictures(studio, request, concepts, words)
            said = f"{_seeds(request.seeds)}."
        return gr.skip(), done(f"{said}{waiting(ahead)}")

    button.click(generate, list(controls.values()), [button, message], api_visibility="private")


def _seeds(seeds: tuple[int, ...]) -> str:
    return f"Seed {seeds[0]}" if len(seeds) == 1 else f"Seeds {seeds[0]} to {seeds[-1]}"


def _controls(studio: Studio, page: Page) -> Controls:
    """Everything a picture is asked for with, by the names that `asked` knows."""
    prompt = gr.Textbox(
        label="Prompt", lines=3, placeholder="a photo of <my-cat> in the snow", elem_id="prompt", max_length=5000
    )
    shown = chips("prompt-chips")
    instead = prompts.instead()
    controls: Controls = {"prompt": prompt, "words": gr.State([])}
    controls["concepts"] = gr.Dropdown(
        _concept_choices(studio), value=[], multiselect=True, max_choices=MOST_CONCEPTS, label="Concepts",
        info="Or simply write <name> in the prompt", elem_id="generate-concepts",
    )  # fmt: skip
    for number in range(MOST_CONCEPTS):
        controls[f"strength-{number}"] = gr.Slider(
            0, STRONGEST, value=1, step=0.05, label="Strength", visible=False, elem_id=f"strength-{number}"
        )
    with gr.Row():
        controls["seed"] = gr.Textbox(
            label="Seed", placeholder="random", info="Empty: a new one each time", elem_id="seed"
        )
        controls["count"] = gr.Slider(1, MOST_PICTURES, value=1, step=1, label="Pictures", elem_id="count")
    layout = layouts.layout_controls()
    controls |= {name: one for name, one in layout.items() if not name.startswith("_")}
    controls["prompt_file"] = prompts.build(instead)
    controls |= _more(studio, page) | layouts.advanced_controls()
    _wire_chips(studio, page, controls, shown)
    _wire_concepts(studio, page, controls)
    layouts.wire(studio, page, controls, layout)
    return controls


def _more(studio: Studio, page: Page) -> Controls:
    with gr.Accordion("More settings", open=False, elem_id="generate-more"):
        negative = gr.Textbox(label="Negative prompt", placeholder="what to keep out", lines=1, elem_id="negative")
        with gr.Row():
            steps = gr.Slider(1, 150, value=25, step=1, label="Steps", elem_id="steps")
            guidance = gr.Slider(
                0,
                20,
                value=usual_guidance(studio.base.kind),
                step=0.1,
                label="Guidance (CFG)",
                info="1 or less: off",
                elem_id="guidance",
            )
        with gr.Row():
            scheduler = gr.Dropdown(
                [(title, name) for name, (title, _) in SCHEDULERS.items()],
                value="ddim",
                label="Scheduler",
                elem_id="scheduler",
            )
            width = gr.Number(0, precision=0, label="Width", info="0: the base's own", elem_id="width", min_width=90)
            height = gr.Number(0, precision=0, label="Height", info="0: the base's own", elem_id="height", min_width=90)
    page.watch(Watch([guidance], lambda: studio.base.kind, lambda: [usual_guidance(studio.base.kind)]))
    return {
        "negative": negative, "steps": steps, "guidance": guidance, "scheduler": scheduler, "width": width,
        "height": height,
    }  # fmt: skip


def _drop(studio: Studio, controls: Controls) -> None:
    """A PNG that Attune or another tool made gives its settings back."""
    with gr.Accordion("Read the settings of a picture", open=False, elem_id="drop"):
        file = gr.File(file_types=[".png"], label="Drop a PNG here", height=120, elem_id="drop-file")
        message = gr.HTML("", elem_id="drop-message")

    @answering(len(controls))
    def take(path: str | None) -> list[Any]:
        if path is None:
            return [*updates(controls, {}), ""]
        found = read_picture(path)
        if not found["request"].get("prompt"):
            raise StudioError(
                "This picture doesn't say how it was made. Choose a PNG straight from a painting program."
            )
        recipe = found["attune"] or {"request": found["request"]}
        return [*updates(controls, filled(studio, recipe)), done("The settings of the picture are filled in.")]

    file.upload(take, file, [*controls.values(), message], api_visibility="private")


def _wire_chips(studio: Studio, page: Page, controls: Controls, shown: gr.HTML) -> None:
    def redraw(prompt: str, watched: list[str]) -> str:
        return chips_markup(split(prompt or "", studio.base.tokenizer), watched)

    def toggle(prompt: str, watched: list[str], event: gr.EventData) -> tuple[list[str], str]:
        word = picked(event)
        if word in {chip.word for chip in split(prompt or "", studio.base.tokenizer)}:
            watched = [each for each in watched if each != word] if word in watched else [*watched, word]
        return watched, redraw(prompt, watched)

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    inputs = [controls["prompt"], controls["words"]]
    page.watch(Watch([shown], lambda *_: studio.base.fingerprint, lambda *given: [redraw(*given)], inputs))
    controls["prompt"].change(redraw, inputs, shown, trigger_mode="always_last", **quiet)
    controls["words"].change(redraw, inputs, shown, **quiet)
    shown.pick(toggle, inputs, [controls["words"], shown], **quiet)


def _wire_concepts(studio: Studio, page: Page, controls: Controls) -> None:
    def strengths_for(names: list[str]) -> list[Any]:
        return [
            gr.update(visible=True, label=f"Strength of {names[number]}")
            if number < len(names)
            else gr.update(visible=False)
            for number in range(MOST_CONCEPTS)
        ]

    def follow(seen: str) -> list[Any]:
        """A concept that is gone, or of another base, can't stay chosen: the browser would send what isn't there."""
        choices, chosen = _concept_choices(studio), json.loads(seen) or []
        left = [name for name in chosen if name in [value for _, value in choices]]
        return [gr.update(choices=choices) if left == chosen else gr.update(choices=choices, value=left)]

    box, prompt = controls["concepts"], controls["prompt"]
    strengths = [controls[f"strength-{number}"] for number in range(MOST_CONCEPTS)]
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    box.change(strengths_for, box, strengths, **quiet)
    # by hand alone: a recipe brings its own prompt, and so does a reloaded page
    box.input(lambda names, prompt: _with_tokens(studio, prompt or "", names), [box, prompt], prompt, **quiet)
    page.watch(Watch([box], lambda _: (studio.library_sign(), studio.base.fingerprint), follow, [page.seen(box)]))
    kept = [controls["seed"], controls["count"], box, *strengths]
    page.remember(Memory("generate", kept, [each.change for each in kept], lambda then: _recalled(studio, then), kept))


def _recalled(studio: Studio, kept: list[Any]) -> list[Any]:
    """Seed, count, concepts and strengths from before a reload, without the concepts that are gone."""
    seed, count, chosen, *strengths = kept
    choices = _concept_choices(studio)
    fitting = [value for _, value in choices]
    pairs = [(name, float(value)) for name, value in zip(chosen or [], strengths, strict=False) if name in fitting]
    values = [min(max(value, 0.0), STRONGEST) for _, value in pairs] + [1.0] * (MOST_CONCEPTS - len(pairs))
    names = gr.update(choices=choices, value=[name for name, _ in pairs])
    return [str(seed or "")[:40], min(max(int(count), 1), MOST_PICTURES), names, *values]


def _concept_choices(studio: Studio) -> list[tuple[str, str]]:
    """Concepts for the loaded base; while none is loaded, all."""
    base = studio.base.fingerprint
    fitting = [
        concept
        for concept in studio.library.concepts()
        if not base or concept.base_model.get("fingerprint", "") in ("", base)
    ]
    return [(f"{concept.name} ({', '.join(s.noun for s in concept.subjects)})", concept.name) for concept in fitting]


def _with_tokens(studio: Studio, prompt: str, names: list[str]) -> str:
    """The prompt with the words of newly chosen concepts that it doesn't mention yet."""
    chosen = [concept for concept in studio.library.concepts() if concept.name in names]
    missing = [subject.token for concept in chosen for subject in concept.subjects if subject.token not in prompt]
    if not missing:
        return prompt
    return f"a photo of {' and '.join(missing)}" if not prompt.strip() else f"{prompt.rstrip()} {' '.join(missing)}"


def _live_sign(studio: Studio) -> Any:
    job = studio.latest("generate")
    return None if job is None else (job.id, job.state, job.since(10**12)[0])


def _live(studio: Studio) -> str:
    job = studio.latest("generate")
    return NO_PICTURE if job is None else generate_markup(job, studio.view(job))
