"""Generate: a prompt with its words, concepts with strengths, and the pictures that come of it."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

import gradio as gr

from pipelines import SCHEDULERS, Request, StudioError, read_picture
from studio.page import Page, Watch
from studio.parts.cards import picked
from studio.parts.chips import chips, chips_markup, split
from studio.parts.live import generate_markup
from studio.parts.message import answering, done
from studio.session import Studio
from studio.tabs import history
from studio.work import start_pictures, waiting

TITLE = "Generate"
ID = "generate"
MOST_CONCEPTS = 6
MOST_PICTURES = 16
NO_PICTURE = '<p class="empty">Pictures form here while they are painted.</p>'
_TOKEN = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Controls:
    """Everything a picture is asked for with, in the order `values` of a recipe are shown."""

    prompt: gr.Textbox
    negative: gr.Textbox
    concepts: gr.Dropdown
    strengths: list[gr.Slider]
    seed: gr.Textbox
    count: gr.Slider
    steps: gr.Slider
    guidance: gr.Slider
    scheduler: gr.Dropdown
    width: gr.Number
    height: gr.Number
    words: gr.State  # those whose attention is kept

    def all(self) -> list[Any]:
        """As inputs or outputs of an event."""
        return [
            self.prompt, self.negative, self.concepts, self.seed, self.count, self.steps, self.guidance,
            self.scheduler, self.width, self.height, self.words, *self.strengths,
        ]  # fmt: skip


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
            history.build(studio, page, controls.all(), lambda recipe: _filled(studio, recipe))
    page.watch(Watch([live], lambda: _live_sign(studio), lambda: [_live(studio)]))

    @answering(1)
    def generate(*given: Any) -> tuple[Any, str]:
        request, concepts, words = _read(studio, given)
        ahead = len(studio.jobs.active())
        start_pictures(studio, request, concepts, words)
        seeds = (
            f"Seed {request.seeds[0]}"
            if len(request.seeds) == 1
            else f"Seeds {request.seeds[0]} to {request.seeds[-1]}"
        )
        return gr.skip(), done(f"{seeds}.{waiting(ahead)}")

    button.click(generate, controls.all(), [button, message], api_visibility="private")


def _controls(studio: Studio, page: Page) -> Controls:
    prompt = gr.Textbox(
        label="Prompt", lines=3, placeholder="a photo of <my-cat> in the snow", elem_id="prompt", max_length=5000
    )
    shown = chips("prompt-chips")
    words = gr.State([])
    concepts = gr.Dropdown(
        _concept_choices(studio), value=[], multiselect=True, max_choices=MOST_CONCEPTS, label="Concepts",
        info="Or simply write <name> in the prompt", elem_id="generate-concepts",
    )  # fmt: skip
    strengths = [
        gr.Slider(0, 1.5, value=1, step=0.05, label="Strength", visible=False, elem_id=f"strength-{number}")
        for number in range(MOST_CONCEPTS)
    ]
    with gr.Row():
        seed = gr.Textbox(label="Seed", placeholder="random", info="Empty: a new one each time", elem_id="seed")
        count = gr.Slider(1, MOST_PICTURES, value=1, step=1, label="Pictures", elem_id="count")
    with gr.Accordion("More settings", open=False, elem_id="generate-more"):
        negative = gr.Textbox(label="Negative prompt", placeholder="what to keep out", lines=1, elem_id="negative")
        with gr.Row():
            steps = gr.Slider(1, 150, value=25, step=1, label="Steps", elem_id="steps")
            guidance = gr.Slider(
                0, 20, value=7.5, step=0.1, label="Guidance (CFG)", info="1 or less: off", elem_id="guidance"
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
    controls = Controls(
        prompt, negative, concepts, strengths, seed, count, steps, guidance, scheduler, width, height, words
    )
    _wire_chips(studio, page, controls, shown)
    _wire_concepts(studio, page, controls)
    return controls


def _drop(studio: Studio, controls: Controls) -> None:
    """A PNG that Attune or another tool made gives its settings back."""
    with gr.Accordion("Read the settings of a picture", open=False, elem_id="drop"):
        file = gr.File(file_types=[".png"], label="Drop a PNG here", height=120, elem_id="drop-file")
        message = gr.HTML("", elem_id="drop-message")

    @answering(len(controls.all()))
    def take(path: str | None) -> list[Any]:
        if path is None:
            return [*(gr.skip() for _ in controls.all()), ""]
        found = read_picture(path)
        if not found["request"].get("prompt"):
            raise StudioError(
                "This picture doesn't say how it was made. Choose a PNG straight from a painting program."
            )
        recipe = found["attune"] or {"request": found["request"]}
        return [*_filled(studio, recipe), done("The settings of the picture are filled in.")]

    file.upload(take, file, [*controls.all(), message], api_visibility="private")


def _filled(studio: Studio, recipe: dict[str, Any]) -> list[Any]:
    """The controls' updates for a recipe; what it doesn't say stays as it is."""
    request = recipe["request"]
    seeds = [recipe["seed"]] if "seed" in recipe else list(request.get("seeds", ()))
    known = {concept.name for concept in studio.library.concepts()}
    concepts = [(each["name"], float(each["strength"])) for each in recipe.get("concepts", []) if each["name"] in known]
    plain = {
        "negative": request.get("negative") or "",
        "seed": str(seeds[0]) if seeds else "",
        "count": max(1, min(len(seeds), MOST_PICTURES)),
    } | {key: request[key] for key in ("prompt", "steps", "guidance", "scheduler", "width", "height") if key in request}
    names = ("prompt", "negative", "", "seed", "count", "steps", "guidance", "scheduler", "width", "height")
    updates = [gr.update(value=plain[name]) if name in plain else gr.skip() for name in names]
    updates[2] = gr.update(value=[name for name, _ in concepts[:MOST_CONCEPTS]])
    strengths = [gr.update(value=concepts[at][1]) if at < len(concepts) else gr.skip() for at in range(MOST_CONCEPTS)]
    return [*updates, list(recipe.get("attention", [])), *strengths]


def _wire_chips(studio: Studio, page: Page, controls: Controls, shown: gr.HTML) -> None:
    def redraw(prompt: str, watched: list[str]) -> str:
        return chips_markup(split(prompt or "", studio.base.tokenizer), watched)

    def toggle(prompt: str, watched: list[str], event: gr.EventData) -> tuple[list[str], str]:
        word = picked(event)
        if word in {chip.word for chip in split(prompt or "", studio.base.tokenizer)}:
            watched = [each for each in watched if each != word] if word in watched else [*watched, word]
        return watched, redraw(prompt, watched)

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    inputs = [controls.prompt, controls.words]
    page.watch(Watch([shown], lambda *_: studio.base.fingerprint, lambda *given: [redraw(*given)], inputs))
    controls.prompt.change(redraw, inputs, shown, trigger_mode="always_last", **quiet)
    controls.words.change(redraw, inputs, shown, **quiet)
    shown.pick(toggle, inputs, [controls.words, shown], **quiet)


def _wire_concepts(studio: Studio, page: Page, controls: Controls) -> None:
    def strengths_for(names: list[str], prompt: str) -> list[Any]:
        sliders = [
            gr.update(visible=True, label=f"Strength of {names[number]}")
            if number < len(names)
            else gr.update(visible=False)
            for number in range(MOST_CONCEPTS)
        ]
        return [_with_tokens(studio, prompt or "", names), *sliders]

    controls.concepts.change(
        strengths_for, [controls.concepts, controls.prompt], [controls.prompt, *controls.strengths],
        queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    page.watch(
        Watch(
            [controls.concepts],
            lambda: (studio.library_sign(), studio.base.fingerprint),
            lambda: [gr.update(choices=_concept_choices(studio))],
        )
    )


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


def _read(studio: Studio, given: tuple[Any, ...]) -> tuple[Request, list[tuple[str, float]], tuple[str, ...]]:
    """What the controls ask for; StudioError in words where it can't be."""
    prompt, negative, names, seed, count, steps, guidance, scheduler, width, height, words, *strengths = given
    prompt = (prompt or "").strip()  # an untouched field holds None
    if not prompt:
        raise StudioError("The prompt is empty. Write what the picture should show.")
    request = Request(
        prompt=prompt,
        negative=(negative or "").strip() or None,
        seeds=_seeds(seed, int(count)),
        steps=int(steps),
        guidance=float(guidance),
        scheduler=scheduler,
        width=int(width or 0),
        height=int(height or 0),
    )
    request.check()
    concepts = _concepts(studio, prompt, dict(zip(names or [], strengths, strict=False)))
    present = {chip.word for chip in split(prompt, studio.base.tokenizer) if chip.kept}
    chosen = [word for word in words or [] if word in present] or _TOKEN.findall(prompt)
    return request, concepts, tuple(dict.fromkeys(chosen))


def _concepts(studio: Studio, prompt: str, chosen: dict[str, float]) -> list[tuple[str, float]]:
    """The chosen concepts, and those the prompt names without having been chosen, at full strength."""
    known = studio.library.concepts()
    by_token = {subject.token: concept.name for concept in known for subject in concept.subjects}
    missing = [name for name in chosen if name not in {concept.name for concept in known}]
    if missing:
        raise StudioError(f"'{missing[0]}' is not in the library any more. Take it out of Concepts.")
    mine = {subject.token for concept in known if concept.name in chosen for subject in concept.subjects}
    for token in _TOKEN.findall(prompt):
        if token in mine:
            continue
        if token not in by_token:
            raise StudioError(f"There is no concept {token} in the library. Train it, or take it out of the prompt.")
        chosen.setdefault(by_token[token], 1.0)
    return [(name, float(strength)) for name, strength in chosen.items()]


def _seeds(text: str, count: int) -> tuple[int, ...]:
    """`count` seeds: consecutive from the given one, else random."""
    text = str(text or "").strip()
    if text and not text.isdecimal():
        raise StudioError(f"The seed '{text[:40]}' is not a whole number. Leave it empty for a random one.")
    first = int(text) if text else secrets.randbelow(2**32 - MOST_PICTURES)
    return tuple(range(first, first + count))


def _live_sign(studio: Studio) -> Any:
    job = studio.latest("generate")
    return None if job is None else (job.id, job.state, job.since(10**12)[0])


def _live(studio: Studio) -> str:
    job = studio.latest("generate")
    return NO_PICTURE if job is None else generate_markup(job, studio.view(job))
