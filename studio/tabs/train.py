"""Train: photos, what they show, how to learn it; and beside it, what the learning looks like."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from pipelines import Concept, StudioError, fields, get_method, load_preset, method_names, presets
from studio.forms import basic, component, read
from studio.jobs import Job
from studio.page import Memory, Page, Watch
from studio.parts.cards import picked
from studio.parts.live import train_markup
from studio.parts.message import answering, done
from studio.parts.runs import runs, runs_markup, wants_discard
from studio.photo_masks import unused_masks
from studio.session import Studio
from studio.tabs import classes, masks, photos, things
from studio.work import Training, discard_training, resume_training, start_training, waiting, with_rare_words

TITLE = "Train"
ID = "train"
NO_RUN = '<p class="empty">Start a training: its loss, samples and the attention of the new word appear here.</p>'


@dataclass(frozen=True)
class _Asked:
    """The components that say what to learn and how."""

    photos: gr.Dropdown
    things: things.Things
    method: gr.Radio
    preset: gr.Dropdown
    classes: gr.Dropdown


def build(studio: Studio, page: Page) -> None:
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=6, min_width=330):
            chosen, gallery = photos.build(studio, page)
            named = things.build(studio, page, chosen)
            masks.build(studio, page, chosen, gallery, named)
            asked = _how(studio, page, chosen, named)
            message = gr.HTML("", elem_id="train-message", render=False)
            kind = gr.State(studio.base.kind)
            _form(studio, asked, kind, message)
            message.render()
        with gr.Column(scale=7, min_width=330):
            live = gr.HTML(NO_RUN, elem_id="train-live", apply_default_css=False)
            unfinished = runs("train-unfinished")
    _remember(studio, page, asked)
    page.watch(Watch([kind], lambda: studio.base.kind, lambda: [studio.base.kind]))
    page.watch(Watch([live], lambda: _live_sign(studio), lambda: [_live(studio)]))
    page.watch(Watch([unfinished], lambda: _runs_sign(studio), lambda: [runs_markup(studio.jobs.history())]))

    @answering(0)
    def take_up(event: gr.EventData) -> tuple[str]:
        if wants_discard(event):
            return (done(f"{discard_training(studio, picked(event))} is thrown away."),)
        return (done(f"{resume_training(studio, picked(event)).title} goes on."),)

    unfinished.pick(take_up, None, [message], api_visibility="private")


def _remember(studio: Studio, page: Page, asked: _Asked) -> None:
    """Photos, method and what the photos show survive a reload."""
    kept = [asked.photos, asked.method, *asked.things.all]

    def recall(values: list[Any]) -> list[Any]:
        sets = photos.choices(studio)
        chosen = values[0] if values[0] in [value for _, value in sets] else sets[0][1]
        rows = things.recalled(studio, asked.things, chosen, values[2:])[1]
        method = values[1] if values[1] in method_names() else gr.skip()
        return [gr.update(choices=sets, value=chosen), method, *rows]

    default = [1, *[""] * (len(asked.things.all) - 1)]
    outputs = things.recalled(studio, asked.things, "", default)[0]
    changes = [each.change for each in kept]
    page.remember(Memory("train", kept, changes, recall, [asked.photos, asked.method, *outputs]))


def _how(studio: Studio, page: Page, chosen: gr.Dropdown, named: things.Things) -> _Asked:
    methods = [(get_method(each).title, each) for each in method_names()]
    first = photos.example_about(studio)["method"]
    method = gr.Radio(methods, value=first, label="Method", elem_id="train-method")
    paper = gr.HTML(_paper(first), elem_id="train-paper")
    choices, value = _presets_of(studio, first)
    preset = gr.Dropdown(choices, value=value, label="Preset", elem_id="train-preset")

    def presets_for(method: str) -> tuple[Any, str]:
        choices, value = _presets_of(studio, method)
        return gr.update(choices=choices, value=value), _paper(method)

    method.change(presets_for, method, [preset, paper], queue=False, api_visibility="private")
    return _Asked(chosen, named, method, preset, classes.build(studio, page, named))


def _paper(method: str) -> str:
    found = get_method(method)
    return f'<p class="hint"><a href="{escape(found.paper, quote=True)}" target="_blank">The paper behind it</a></p>'


def _presets_of(studio: Studio, method: str) -> tuple[list[tuple[str, str]], str]:
    """Ours, then a person's own in the workspace."""
    known = presets(method, studio.presets)
    return [("For the loaded base", ""), *((preset.title, preset.name) for preset in known)], ""


def _form(studio: Studio, asked: _Asked, kind: gr.State, message: gr.HTML) -> None:
    """The settings of the chosen method with the preset's values for the base, and the button that reads them."""

    @gr.render(inputs=[asked.method, asked.preset, kind], show_progress="hidden", queue=False)
    def form(method: str | None, preset: str | None, base_kind: str) -> None:
        if method is None or preset not in [name for _, name in _presets_of(studio, method)[0]]:
            return  # the preset list follows the method a moment later
        values = load_preset(method, preset or None, base_kind, studio.presets)
        settings = fields(type(values))
        shown = basic(type(values))
        boxes: dict[str, Any] = {}
        with gr.Row(elem_classes="fields"):
            for setting in [each for each in settings if each.name in shown]:
                boxes[setting.name] = component(setting, getattr(values, setting.name))
        with gr.Accordion("Advanced", open=False, elem_id="train-advanced"), gr.Row(elem_classes="fields"):
            for setting in [each for each in settings if each.name not in shown]:
                boxes[setting.name] = component(setting, getattr(values, setting.name))
            seed = gr.Number(0, precision=0, label="Seed", info="Every random choice follows from it")
        button = gr.Button("Train", variant="primary", elem_id="train-button")

        @answering(0)
        def train(photos: str, classes: str, seed: int, *given: Any) -> tuple[str]:
            params = read(type(values), dict(zip(boxes, given, strict=False)))
            first, *more = things.read(given[len(boxes) :])
            wish = Training(
                photos=_needed(photos, "There are no photos yet. Add some, or choose the example."),
                noun=first["noun"],
                name=first["name"],
                method=method,
                params=params.model_dump(mode="json"),
                seed=int(seed or 0),
                base=studio.base.where,
                classes=classes or "",
                more=more,
            )
            things.complete([first, *more])
            ahead = len(studio.jobs.active())
            wish, told = with_rare_words(studio, wish)
            job = start_training(studio, wish)
            told += unused_masks(studio, wish.things()) if params.masked_loss else ""
            return (done(f"{job.title.removeprefix('Train ')} is being trained.{told}{waiting(ahead)}"),)

        asks = [asked.photos, asked.classes, seed, *boxes.values(), *asked.things.all]
        button.click(train, asks, [message], api_visibility="private")


def _needed(text: str, sentence: str) -> str:
    if not (text or "").strip():
        raise StudioError(sentence)
    return text.strip()


def _live_sign(studio: Studio) -> Any:
    job = studio.latest("train")
    return None if job is None else (job.id, job.state, job.since(10**12)[0], job.over and studio.library_sign())


def _live(studio: Studio) -> str:
    job = studio.latest("train")
    return NO_RUN if job is None else train_markup(job, studio.view(job), _kept_as(studio, job))


def _kept_as(studio: Studio, job: Job) -> Concept | None:
    """What came of a run that is over, as it lies in the library now: it may have got another name on the way."""
    found = (each for each in studio.library.concepts() if each.recipe.get("run") == job.id)
    return next(found, None) if job.over else None


def _runs_sign(studio: Studio) -> Any:
    return studio.workspace.runs.stat().st_mtime, tuple((job.id, job.state) for job in studio.jobs.jobs())
