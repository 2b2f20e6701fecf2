"""Library: the concepts as cards; look, rename, delete and bring back, export, import."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines import Concept, Entry, StudioError, problems
from studio.page import Page, Watch
from studio.parts.cards import cards, cards_markup, picked
from studio.parts.concepts import concept_cards, concept_facts
from studio.parts.download import download
from studio.parts.message import answering, done
from studio.session import Studio

TITLE = "Library"
ID = "library"
EMPTY = "No concepts yet. Train one, or import one below."
NONE_FOUND = "No concept has these words."
MOST_TOLD = 12
NOTHING = '<p class="empty">Choose a concept to see what it is.</p>'
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class _Details:
    """The right-hand side: one concept."""

    chosen: gr.State  # id of the entry, "" for none
    deleted: gr.State  # trash id of what was deleted last, "" for none
    facts: gr.HTML
    actions: gr.Column
    name: gr.Textbox
    rename: gr.Button
    export: gr.Button
    original: gr.Button
    delete: gr.Button
    undo: gr.Button
    message: gr.HTML


def build(studio: Studio, page: Page) -> None:
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=7, min_width=330):
            search = gr.Textbox(
                placeholder="Search by name, word, method or base", show_label=False, elem_id="library-search"
            )
            shown = cards("library-cards", "Concepts")
            unsound = gr.HTML("", elem_id="library-unsound")
            _import(studio)
            _trash(studio, page)
            gr.HTML(f'<p class="hint">Everything is kept in {escape(str(studio.workspace.root))}</p>')
        with gr.Column(scale=5, min_width=300):
            details = _details()
    page.watch(
        Watch(
            [shown],
            lambda words, chosen: (words, chosen, studio.library_sign(), studio.base.fingerprint),
            lambda words, chosen: [_cards(studio, words, chosen)],
            [search, details.chosen],
        )
    )

    page.watch(Watch([unsound], lambda: (studio.library_sign(), studio.presets_sign()), lambda: [_unsound(studio)]))

    def show(event: gr.EventData) -> list[Any]:
        return [*_shown(studio, picked(event)), ""]

    outputs = [details.chosen, details.facts, details.actions, details.name, details.message]
    shown.pick(show, None, outputs, queue=False, **QUIET)
    _wire(studio, details)


def _details() -> _Details:
    chosen, deleted = gr.State(""), gr.State("")
    facts = gr.HTML(NOTHING, elem_id="library-details", apply_default_css=False)
    with gr.Column(visible=False, elem_id="library-actions") as actions:
        name = gr.Textbox(label="Name", elem_id="library-name")
        with gr.Row():
            rename = gr.Button("Rename", size="sm", elem_id="library-rename", min_width=90)
            export = gr.Button("Export as zip", size="sm", elem_id="library-export", min_width=90)
            original = gr.Button("Original files", size="sm", elem_id="library-original", min_width=90)
            delete = gr.Button("Delete", size="sm", variant="stop", elem_id="library-delete", min_width=90)
    message = gr.HTML("", elem_id="library-message")
    undo = gr.Button("Undo the deletion", visible=False, elem_id="library-undo")
    return _Details(chosen, deleted, facts, actions, name, rename, export, original, delete, undo, message)


def _wire(studio: Studio, details: _Details) -> None:
    @answering(4)
    def rename(chosen: str, name: str) -> list[Any]:
        before = _entry(studio, chosen).concept
        concept = studio.library.rename(_entry(studio, chosen).id, name or "")
        return [*_shown(studio, chosen), done(f"It is called {concept.name} now. {_words(before, concept)}")]

    @answering(6)
    def delete(chosen: str) -> list[Any]:
        entry = _entry(studio, chosen)
        trash = studio.library.delete(entry.id)
        hidden = gr.update(visible=False)
        return [trash, gr.update(visible=True), "", NOTHING, hidden, "", done(f"{entry.concept.name} is in the trash.")]

    @answering(2)
    def undo(trash: str) -> list[Any]:
        if not trash:
            raise StudioError("There is nothing to bring back. The trash is in the workspace's folder 'trash'.")
        return ["", gr.update(visible=False), done(f"{studio.library.restore(trash).name} is back.")]

    def export(chosen: str) -> str:
        return str(studio.library.export(_entry(studio, chosen).id, studio.scratch()))

    def original(chosen: str) -> str:
        """The way the method's own authors write it; several files as one zip."""
        entry, folder = _entry(studio, chosen), studio.scratch()
        files = originals(studio, entry, folder)
        if len(files) == 1:
            return str(files[0])
        return shutil.make_archive(str(studio.scratch() / entry.id.rpartition("-")[0]), "zip", folder)

    shown = [details.chosen, details.facts, details.actions, details.name]
    details.rename.click(rename, [details.chosen, details.name], [*shown, details.message], **QUIET)
    details.delete.click(delete, details.chosen, [details.deleted, details.undo, *shown, details.message], **QUIET)
    details.undo.click(undo, details.deleted, [details.deleted, details.undo, details.message], **QUIET)
    download(details.export, "library-download", export, [details.chosen], details.message)
    download(details.original, "library-originals", original, [details.chosen], details.message)


def originals(studio: Studio, entry: Entry, folder: Path) -> list[Path]:
    """The original files of a concept. Where they hold all of its base and that is a folder, the loaded base is taken,
    if it is the one; StudioError when another one is."""
    try:
        return list(studio.library.export_original(entry.id, folder))
    except StudioError as error:
        if "--base" not in str(error):  # the command line's way of naming it
            raise
        base = entry.concept.base_model
        if base.get("fingerprint") and base["fingerprint"] == studio.base.fingerprint:
            return list(studio.library.export_original(entry.id, folder, studio.base.where))
        which = f"'{base['id']}' ({base['fingerprint'][:8]})" if base.get("fingerprint") else "its own base"
        raise StudioError(
            f"The original files of '{entry.concept.name}' hold its whole base, and {studio.base.title} is loaded. "
            f"Load {which} at the top of the page and export again, or export it as a zip."
        ) from error


def _import(studio: Studio) -> None:
    with gr.Accordion("Import a concept", open=False, elem_id="library-import"):
        gr.HTML(
            '<p class="hint">A zip that Attune exported needs nothing else. Original files of other tools '
            "(spectral_shifts.safetensors, residual.pt) don’t say what they show: give the word and a name. A folder "
            "of them (learned_embeds with unet, a LoRA with metadata.jsonl) comes in as a zip.</p>"
        )
        with gr.Row():
            noun = gr.Textbox(label="What is it?", placeholder="dog", min_width=120, elem_id="import-noun")
            name = gr.Textbox(label="Call it", placeholder="my-dog", min_width=120, elem_id="import-name")
        mine = gr.Checkbox(label="It was made for the base that is loaded now", elem_id="import-base")
        upload = gr.UploadButton(
            "Choose the file", file_types=[".zip", ".safetensors", ".pt", ".bin"], elem_id="import-file"
        )
        message = gr.HTML("", elem_id="import-message")

    @answering(0)
    def take(file: str, noun: str, name: str, mine: bool) -> tuple[str]:
        base = studio.base.identity() if mine else None
        concept = studio.library.add(Path(file), name=(name or "").strip(), noun=(noun or "").strip(), base=base)
        tokens = " ".join(subject.token for subject in concept.subjects)
        return (done(f"{concept.name} is in the library. Write {tokens} in a prompt."),)

    upload.upload(take, [upload, noun, name, mine], [message], **QUIET)


def _trash(studio: Studio, page: Page) -> None:
    """What was deleted, each a click away from coming back."""
    with gr.Accordion("Trash", open=False, elem_id="library-trash-box"):
        gr.HTML('<p class="hint">Click a concept to bring it back.</p>')
        shown = cards("library-trash", "Trash")
        message = gr.HTML("", elem_id="trash-message")

    @answering(0)
    def back(event: gr.EventData) -> tuple[str]:
        return (done(f"{studio.library.restore(picked(event)).name} is back."),)

    shown.pick(back, None, [message], **QUIET)
    page.watch(
        Watch(
            [shown],
            studio.library_sign,
            lambda: [cards_markup(concept_cards(studio.library.trashed(), ""), empty="The trash is empty.")],
        )
    )


def _entry(studio: Studio, chosen: str) -> Entry:
    """The entry of that id, found by listing; StudioError when it is gone."""
    for entry in studio.library.entries():
        if entry.id == chosen:
            return entry
    raise StudioError("This concept is not in the library any more. Choose another card.")


def _shown(studio: Studio, chosen: str) -> list[Any]:
    found = [entry for entry in studio.library.entries() if entry.id == chosen]
    if not found:
        return ["", NOTHING, gr.update(visible=False), ""]
    facts = concept_facts(found[0], studio.base.fingerprint, studio.base.title)
    return [chosen, facts, gr.update(visible=True), found[0].concept.name]


def _words(before: Concept, concept: Concept) -> str:
    """How a renamed concept is written; where its words stay, how they would be changed."""
    tokens = " and ".join(subject.token for subject in concept.subjects)
    if concept.subjects != before.subjects:
        return f"In a prompt, write {tokens}."
    several = len(concept.subjects) > 1
    how = " To change them, give a name with a word for each, such as tom-and-rex." if several else ""
    return f"In a prompt it is still {tokens}.{how}"


def _unsound(studio: Studio) -> str:
    """What lies in the workspace and can't be used, each with its reason."""
    concepts = [f"The folder concepts/{name}: {reason}" for name, reason in studio.library.broken().items()]
    told = [*concepts, *problems(studio.presets).values()]
    rows = "".join(f"<li>{escape(reason)}</li>" for reason in told[:MOST_TOLD])
    return f'<div class="message advice">Not usable:<ul class="notes">{rows}</ul></div>' if rows else ""


def _cards(studio: Studio, words: str, chosen: str) -> str:
    entries = studio.library.entries(words or "")
    return cards_markup(concept_cards(entries, studio.base.fingerprint), chosen, NONE_FOUND if words else EMPTY)
