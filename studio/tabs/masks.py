"""The part of the Train tab where masks are found and painted: white is the subject, the rest is not learned from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from pipelines import StudioError
from studio.jobs import Job
from studio.page import Memory, Page, Watch
from studio.parts.cards import picked
from studio.parts.download import download
from studio.parts.live import progress_text
from studio.parts.message import answering, done, problem
from studio.parts.painter import painter, wanted
from studio.parts.pictures import data_uri
from studio.photo_masks import (
    EXAMPLE_STAYS,
    Opened,
    as_mudi,
    has_finder,
    layers,
    mask_drawing,
    photo_of,
    save_changes,
    thing_names,
    with_outline,
)
from studio.session import Studio
from studio.tabs import mask_settings, things
from studio.tabs.mask_settings import ATTENTION
from studio.work import EXAMPLE, Look, start_masks, start_outline, waiting

PATIENCE = 300  # seconds that a page waits for an outline
PATIENCE_FOR_THINGS = 3600  # and for things to be found, to name their rows
HOW = (
    '<p class="hint">A mask says what of a photo is learned: the subject, and not what is around it. Find them by what '
    "the base sees in your word, then click a photo above and put right what is wrong.</p>"
)
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class _Editor:
    """Where one photo's masks are painted."""

    opened: gr.State  # Opened, None while no photo is
    column: gr.Column
    title: gr.HTML
    board: gr.HTML
    save: gr.Button
    close: gr.Button


def build(studio: Studio, page: Page, chosen: gr.Dropdown, gallery: gr.HTML, named: things.Things) -> None:
    """`gallery` are the photos of the set `chosen`, a click on one of which opens its masks."""
    with gr.Accordion("Masks", open=False, elem_id="masks") as box:
        gr.HTML(HOW)
        with gr.Row(elem_classes="actions"):
            find = gr.Button("Find masks by attention", size="sm", elem_id="masks-find", min_width=150)
            detect = gr.Button("Find masks by a detector", size="sm", elem_id="masks-detect", min_width=150)
            discover = gr.Button("Find things without a word", size="sm", elem_id="masks-discover", min_width=150)
        overwrite = gr.Checkbox(label="Also replace masks that I made", elem_id="masks-overwrite")
        message = gr.HTML("", elem_id="masks-message")
        live = gr.HTML("", elem_id="masks-live")
        editor = _editor()
        how = mask_settings.build(studio, page)
        mudi = gr.Button("Download as MuDI’s folder", size="sm", elem_id="masks-mudi", min_width=150)
    page.watch(Watch([live], lambda: _sign(studio), lambda: [_live(studio)]))
    _wire_finding(studio, [chosen, overwrite, *how.all], named, (find, detect, discover), message)
    _wire_opening(studio, editor, chosen, gallery, named, box, how, message)
    _wire_outlines(studio, editor, how, message)
    download(mudi, "masks-mudi-zip", lambda *given: as_mudi(studio, *_here(*given)), [chosen, *named.all], message)

    @answering(1)
    def write(opened: Opened | None, value: str) -> tuple[Any, str]:
        changed = save_changes(studio, opened, value)
        said = done(f"Saved: {', '.join(changed)}." if changed else "Nothing was changed.")
        return opened and replace(opened, before=value), said

    editor.save.click(write, [editor.opened, editor.board], [editor.opened, message], **QUIET)
    _keep_draft(studio, page, editor, box, message)


def _editor() -> _Editor:
    with gr.Column(visible=False, elem_id="mask-editor") as column:
        title = gr.HTML("", elem_id="mask-title")
        board = painter("mask-painter", "masks")
        with gr.Row(elem_classes="actions"):
            save = gr.Button("Save the masks", size="sm", variant="primary", elem_id="mask-save", min_width=120)
            close = gr.Button("Close", size="sm", min_width=80, elem_id="mask-close")
    return _Editor(gr.State(None), column, title, board, save, close)


def _wire_opening(
    studio: Studio, editor: _Editor, chosen: gr.Dropdown, gallery: gr.HTML, named: things.Things, box: gr.Accordion,
    how: mask_settings.MaskSettings, message: gr.HTML,
) -> None:  # fmt: skip
    """Opening a photo, closing it, going to another set: what was painted until then is saved on the way."""

    @answering(5)
    def open_photo(
        opened: Opened | None, value: str, dataset: str, path: str, by: str, *given: Any, event: Any
    ) -> list[Any]:
        said = _left(studio, opened, value)
        if dataset == EXAMPLE:
            raise StudioError(EXAMPLE_STAYS)
        shown = photo_of(studio, dataset, picked(event))
        mine = layers(shown, [one["name"] for one in things.read_of(dataset, given)])
        drawn = mask_drawing(shown, mine)
        look = gr.update(value=drawn, picture=data_uri(shown.image, 1024), finder=by == ATTENTION or has_finder(path))
        head = f"<h3 class='part'>Masks of {escape(shown.path.name)}</h3>"
        now = Opened(dataset, shown.path.name, tuple(mine), drawn)
        return [gr.update(open=True), gr.update(visible=True), head, look, now, said]

    def shut(opened: Opened | None, value: str) -> list[Any]:
        return [gr.update(visible=False), None, _left(studio, opened, value)]

    before = [editor.opened, editor.board]
    gallery.pick(
        _with_event(open_photo),
        [*before, chosen, how.where, how.outlines, *named.all],
        [box, editor.column, editor.title, editor.board, editor.opened, message],
        **QUIET,
    )
    gr.on([editor.close.click, chosen.change], shut, before, [editor.column, editor.opened, message], **QUIET)


def _keep_draft(studio: Studio, page: Page, editor: _Editor, box: gr.Accordion, message: gr.HTML) -> None:
    """The browser keeps what is painted until it is saved: a reloaded page saves it."""
    draft = gr.Textbox("", visible=False)
    told = editor.opened.change(lambda now: json.dumps(asdict(now)) if now else "", editor.opened, draft, **QUIET)

    def recall(values: list[Any]) -> list[Any]:
        if not values[0]:
            return [gr.skip(), gr.skip()]
        given = json.loads(values[0])
        layers = tuple(str(name) for name in given["layers"])
        opened = Opened(str(given["dataset"]), str(given["photo"]), layers, str(given["before"]))
        said = _left(studio, opened, str(values[1] or ""))
        return [gr.update(open=True) if said else gr.skip(), said]

    changes = [editor.board.paint, told.then]
    page.remember(Memory("masks", [draft, editor.board], changes, recall, [box, message], once=True))


def _left(studio: Studio, opened: Opened | None, value: str) -> str:
    """Save what was painted in a photo that is left; a word about it."""
    try:
        changed = save_changes(studio, opened, value)
    except StudioError as error:
        return problem(str(error))
    return done(f"Saved: {', '.join(changed)}.") if changed else ""


def _wire_outlines(studio: Studio, editor: _Editor, how: mask_settings.MaskSettings, message: gr.HTML) -> None:
    """A found outline is put into the drawing as it is when it comes: the person may have gone on painting."""
    found = gr.State(None)

    @answering(1)
    def outline(opened: Opened, path: str, by: str, event: gr.EventData) -> list[Any]:
        number, at, _ = wanted(event)
        image = photo_of(studio, opened.dataset, opened.photo).image
        job = start_outline(studio, image, at, (path or "").strip(), by == ATTENTION)
        job.wait(PATIENCE)
        if job.state != "done":
            raise StudioError(job.error or "No outline was found. Paint the mask.")
        return [(opened.dataset, opened.photo, number, studio.view(job).result), ""]

    @answering(2)
    def put(found: Any, opened: Opened | None, value: str) -> list[Any]:
        if found is None or opened is None or (opened.dataset, opened.photo) != found[:2]:
            return [gr.skip(), None, gr.skip()]
        return [with_outline(value, *found[2:]), None, gr.skip()]

    asked = editor.board.find(outline, [editor.opened, how.where, how.outlines], [found, message], **QUIET)
    asked.then(put, [found, editor.opened, editor.board], [editor.board, found, message], **QUIET)


def _with_event(handler: Any) -> Any:
    """Gradio finds out by its annotation which argument is the event; after *args it needs one that comes first."""

    def call(event: gr.EventData, *given: Any) -> Any:
        return handler(*given, event=event)

    return call


def _wire_finding(
    studio: Studio, given: list[Any], named: things.Things, buttons: tuple[gr.Button, ...], message: gr.HTML
) -> None:
    """`given` are the photo set, whether a person's masks are replaced, and how masks are found; `buttons` find by
    attention, by a detector and without a word."""
    settings = len(given) - 2

    def start(dataset: str, nouns: list[str], names: list[str], replace: bool, look: Look | None) -> tuple[Job, str]:
        if dataset == EXAMPLE or not dataset:
            raise StudioError(EXAMPLE_STAYS if dataset else "There are no photos yet. Add some first.")
        ahead = len(studio.jobs.active())
        job = start_masks(studio, dataset, nouns, names, bool(replace), look)
        return job, done(f"{job.title}.{waiting(ahead)}")

    def by_word(read: Any) -> Any:
        @answering(0)
        def find(dataset: str, replace: bool, *rest: Any) -> tuple[str]:
            look, known = read(studio, rest[:settings]), _here(dataset, *rest[settings:])[1]
            nouns, names = ([one[key] for one in known] for key in ("noun", "name"))
            return (start(dataset, nouns, names, replace, look)[1],)

        return find

    @answering(1)
    def without(dataset: str, replace: bool) -> tuple[str, str]:
        job, said = start(dataset, [], [], replace, None)
        return job.id, said

    def name_them(search: str) -> list[Any]:
        """The things' rows get the names of the masks: they are learned from them under these alone."""
        job = studio.jobs.job(search)
        found = [] if job is None or not job.wait(PATIENCE_FOR_THINGS) else thing_names(studio.view(job).result)
        rows = things.calling(named, found)[1] if found else [gr.skip() for _ in outputs]
        return [*rows, ""]

    find, detect, discover = buttons
    for button, read in ((find, mask_settings.by_attention), (detect, mask_settings.by_detector)):
        button.click(by_word(read), [*given, *named.all], [message], api_visibility="private")
    search, outputs = gr.State(""), things.calling(named, [])[0]
    started = discover.click(without, given[:2], [search, message], api_visibility="private")
    started.then(name_them, search, [*outputs, search], concurrency_limit=8, **QUIET)


def _here(dataset: str, *given: Any) -> tuple[str, list[dict[str, str]]]:
    """The chosen photo set and what is in it, from the values of `Things.all`. StudioError where that isn't said."""
    known = things.read_of(dataset, given)
    if not all(one["noun"] for one in known):
        raise StudioError("What do the photos show? Give the ordinary word for it above, such as 'cat'.")
    if len(known) > 1 and not all(one["name"] for one in known):
        raise StudioError("Give each thing a name above: its masks are called by it.")
    return dataset, known


def _sign(studio: Studio) -> Any:
    job = studio.latest("masks")
    return None if job is None else (job.id, job.state, job.since(10**12)[0])


def _live(studio: Studio) -> str:
    """What the newest search is doing, or what came of it."""
    job = studio.latest("masks")
    if job is None:
        return ""
    view = studio.view(job)
    if not job.over:
        return f'<p class="hint" data-state="{job.state}">{escape(progress_text(job, view))}</p>'
    if job.state == "failed":
        return problem(job.error)
    found = view.result or {"written": [], "kept": [], "missing": []}
    told = [f"{len(found['written'])} masks are found; they are in the pictures above."]
    if names := thing_names(view.result):
        told.append(
            f"They are called {' and '.join(names)}, the largest first: what is to be learned from them has these "
            "names above. Say there what each is; what was learned can be renamed in the Library."
        )
    if found["kept"]:
        told.append(f"{len(found['kept'])} that a person made are kept.")
    if found["missing"]:
        told.append(f"Nothing was found for {', '.join(found['missing'][:6])}: paint it, or choose another word.")
    return f'<div data-state="{job.state}">{done(" ".join(told))}</div>'
