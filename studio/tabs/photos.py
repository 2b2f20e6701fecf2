"""The photo part of the Train tab: the example, photo sets of one's own, masks, captions."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines import StudioError, caption_file, load_photos, load_preset, method_names
from studio.datasets import SHOWN, photo_cards
from studio.forms import read
from studio.page import Page, Watch
from studio.parts.cards import cards, cards_markup, picked
from studio.parts.message import answering, done, problem
from studio.parts.pictures import data_uri
from studio.session import Studio
from studio.work import EXAMPLE, Training, start_training

NEW = ""
ADVICE = (
    '<p class="message advice">Toybox knows only its own drawn world of toys; real photos mean nothing to it. '
    "To learn from them, load another base at the top of the page, such as "
    "<code>stable-diffusion-v1-5/stable-diffusion-v1-5</code>.</p>"
)
HOW = (
    "PNG, JPEG or WebP, three to ten of one thing. A mask is named like its photo: cat.jpg and cat-masklabel.png "
    "(white = the subject); a caption is cat.txt. Or a folder of MuDI's: all its files with metadata.jsonl "
    "or class_metadata.jsonl."
)


def build(studio: Studio, page: Page) -> tuple[gr.Dropdown, gr.HTML]:
    """Gives the dropdown that says which photos to train on, and their gallery."""
    with gr.Column(elem_id="welcome", visible=_has_example(studio)) as welcome:
        gr.HTML(_welcome(studio), elem_id="welcome-text", apply_default_css=False)
        example = gr.Button("Train the example (about a minute)", variant="primary", elem_id="example-button")
        said = gr.HTML("", elem_id="example-message")
    with gr.Row():
        chosen = gr.Dropdown(
            choices(studio), value=_first(studio), label="Photos", elem_id="train-photos", scale=3, min_width=160
        )
        upload = gr.UploadButton(
            "Add photos", file_count="multiple", file_types=[".png", ".jpg", ".jpeg", ".webp", ".txt", ".jsonl"],
            elem_id="train-upload", scale=1, min_width=120,
        )  # fmt: skip
    shown = cards("train-gallery", "Photos")
    advice = gr.HTML("", elem_id="train-advice")
    message = gr.HTML("", elem_id="photos-message")
    with gr.Row(visible=False, elem_id="photo-edit") as edit:
        photo = gr.State("")
        caption = gr.Textbox(
            label="Caption of this photo",
            info="Several: an empty line between; every step takes one",
            lines=2,  # with one, Gradio keeps Enter to itself
            max_lines=4,
            placeholder="a photo of <name> on the grass",
            scale=4,
            elem_id="photo-caption",
        )
        save = gr.Button("Save", size="sm", min_width=70, elem_id="photo-save")
        remove = gr.Button("Remove photo", size="sm", variant="stop", min_width=110, elem_id="photo-remove")
    built = choices(studio)
    page.watch(
        Watch(
            [chosen, shown, advice],
            lambda value: _sign(studio, json.loads(value)),
            lambda value: _look(studio, json.loads(value), built),
            [page.seen(chosen)],
        )
    )
    page.watch(
        Watch(
            [welcome],
            lambda: not studio.library_sign(),
            lambda: [gr.update(visible=_has_example(studio) and not studio.library_sign())],
        )
    )
    _wire_example(studio, example, said)
    _wire_upload(studio, upload, chosen, message)
    _wire_edit(studio, chosen, shown, edit, photo, caption, save, remove, message)
    return chosen, shown


def _wire_example(studio: Studio, button: gr.Button, said: gr.HTML) -> None:
    @answering(0)
    def train_example() -> tuple[str]:
        about = example_about(studio)
        known = studio.library.concepts()
        taken = {each.name for each in known} | {
            subject.token.strip("<>") for each in known for subject in each.subjects
        }
        names = [about["name"], *(f"{about['name']}-{number}" for number in range(2, 1000))]
        params = load_preset(about["method"], None, "toybox")
        params = read(type(params), params.model_dump() | about["settings"])
        name = next(name for name in names if name not in taken)
        wish = Training(
            EXAMPLE, about["noun"], name, about["method"], params.model_dump(mode="json"), base=studio.example_base
        )
        start_training(studio, wish)
        return (done(f"Training <{name}> from the example photos. Watch it learn on the right."),)

    button.click(train_example, None, [said], api_visibility="private")


def _wire_upload(studio: Studio, upload: gr.UploadButton, chosen: gr.Dropdown, message: gr.HTML) -> None:
    @answering(1)
    def add(files: list[str] | None, dataset: str) -> tuple[Any, str]:
        into = "" if dataset in (EXAMPLE, NEW, None) else dataset
        title = time.strftime("Photos of %d %b %Y, %H:%M")
        folder, notes = studio.datasets.add([Path(file) for file in files or []], title, into)
        said = f"{len(files or [])} files added. {' '.join(notes)}"
        if folder not in [each.id for each in studio.datasets.all()]:
            return gr.update(), done(said.strip())  # class pictures
        return gr.update(choices=choices(studio), value=folder), done(said.strip())

    upload.upload(add, [upload, chosen], [chosen, message], api_visibility="private")


def _wire_edit(
    studio: Studio, chosen: gr.Dropdown, shown: gr.HTML, edit: gr.Row, photo: gr.State, caption: gr.Textbox,
    save: gr.Button, remove: gr.Button, message: gr.HTML,
) -> None:  # fmt: skip
    closed = gr.update(visible=False)

    @answering(3)
    def open_photo(dataset: str, event: gr.EventData) -> tuple[Any, ...]:
        if dataset in (EXAMPLE, NEW):
            return closed, "", "", ""
        found = [each for each in studio.datasets.photos(dataset) if each.path.name == picked(event)]
        if not found:
            return closed, "", "", ""
        label = f"Caption of {found[0].path.name}"
        return (
            gr.update(visible=True),
            found[0].path.name,
            gr.update(value=caption_file(found[0].caption or "").strip(), label=label),
            "",
        )

    @answering(1)
    def write(dataset: str, name: str, text: str) -> tuple[Any, str]:
        studio.datasets.caption(dataset, name, text or "")
        return closed, done(f"The caption of {name} is saved.")

    @answering(1)
    def drop(dataset: str, name: str) -> tuple[Any, str]:
        studio.datasets.remove(dataset, name)
        return closed, done(f"{name} is in the workspace's trash now.")

    shown.pick(open_photo, chosen, [edit, photo, caption, message], api_visibility="private")
    save.click(write, [chosen, photo, caption], [edit, message], api_visibility="private")
    remove.click(drop, [chosen, photo], [edit, message], api_visibility="private")
    chosen.input(lambda: closed, None, edit, queue=False, api_visibility="private")


def example_about(studio: Studio) -> dict[str, Any]:
    """What the example shows, from the file beside its folder: {"name", "noun", "method", "settings"}."""
    about: dict[str, Any] = {"name": "my-toy", "noun": "toy", "method": method_names()[0], "settings": {}}
    path = studio.example.with_name(f"{studio.example.name}.json")
    return about | (json.loads(path.read_text("utf-8")) if path.is_file() else {})


def _has_example(studio: Studio) -> bool:
    return studio.example.is_dir()


def _welcome(studio: Studio) -> str:
    if not _has_example(studio):
        return ""
    photos = load_photos(studio.example, short_side=128)[:6]
    strip = "".join(f'<img src="{data_uri(photo.image, 128)}" alt="{photo.path.stem}">' for photo in photos)
    return (
        f'<div class="wrap-welcome"><h2>Teach it one toy</h2><p>{len(photos)} photos of a toy the base has never seen. '
        f'Train it, then put it anywhere.</p><div class="strip">{strip}</div></div>'
    )


def choices(studio: Studio) -> list[tuple[str, str]]:
    example = [("The example", EXAMPLE)] if _has_example(studio) else []
    return [*example, *((each.title, each.id) for each in studio.datasets.all()), ("New set: add photos", NEW)]


def _look(studio: Studio, chosen: str, built: list[tuple[str, str]]) -> list[Any]:
    """The sets there are, and what is in the chosen one; another one is chosen where it has gone.

    What a page has from its beginning isn't sent again: it could come later than a set that was added meanwhile.
    """
    sets = choices(studio)
    offered = gr.skip() if sets == built else gr.update(choices=sets)
    if chosen not in [value for _, value in sets]:
        chosen = sets[0][1]
        offered = gr.update(choices=sets, value=chosen)
    return [offered, _gallery(studio, chosen), _advice(studio, chosen)]


def _first(studio: Studio) -> str:
    return choices(studio)[0][1]


def _sign(studio: Studio, chosen: str) -> Hashable:
    folders = tuple(each.id for each in studio.datasets.all())
    inside = studio.workspace.datasets / chosen if chosen in folders else None
    changed = inside and tuple(sorted((path.name, path.stat().st_mtime_ns) for path in inside.iterdir()))
    return chosen, folders, changed, studio.base.kind


def _gallery(studio: Studio, chosen: str) -> str:
    try:
        if chosen == EXAMPLE:
            photos = load_photos(studio.example, short_side=SHOWN)
        else:
            photos = studio.datasets.photos(chosen) if chosen else []
    except StudioError as error:  # somebody put a broken file there by hand
        return problem(str(error))
    return cards_markup(photo_cards(photos), empty=HOW)


def _advice(studio: Studio, chosen: str) -> str:
    return ADVICE if studio.base.kind == "toybox" and chosen not in (EXAMPLE,) else ""
