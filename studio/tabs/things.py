"""The part of the Train tab that says what the photos show: one thing, or several that are learned together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from pipelines import StudioError, named_subjects
from studio.page import Page, Watch
from studio.session import Studio
from studio.tabs import photos
from studio.work import EXAMPLE

MOST = 6
SAME = ""
LONGEST = 1000  # characters of a field that a browser remembers
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Things:
    """The fields of up to MOST things. The first one's photos are the set that is chosen above."""

    count: gr.Number  # not seen; no State, which the browser couldn't keep
    nouns: list[gr.Textbox]
    names: list[gr.Textbox]
    photos: list[gr.Dropdown]  # of the second thing on
    shown: list[Any]  # what `_rows` updates
    settled: gr.State  # the set that the fields speak of

    @property
    def all(self) -> list[Any]:
        """As inputs of an event, for `read`."""
        return [self.count, *self.nouns, *self.names, *self.photos]


def build(studio: Studio, page: Page, chosen: gr.Dropdown) -> Things:
    """Rows for a thing each; all but the first are hidden until they are asked for."""
    about = photos.example_about(studio) if chosen.value == EXAMPLE else {"noun": "", "name": ""}
    count = gr.Number(1, precision=0, visible=False)
    nouns, names, sets, rows = [], [], [], []
    for number in range(MOST):
        with gr.Row(visible=number == 0, elem_id=f"thing-{number + 1}") as row:
            ending = "" if number == 0 else f"-{number + 1}"
            nouns.append(
                gr.Textbox(
                    about["noun"] if number == 0 else "", label="What is it?" if number == 0 else "And what is this?",
                    placeholder="cat", info="The ordinary word for it", elem_id=f"train-noun{ending}", min_width=120,
                )
            )  # fmt: skip
            names.append(
                gr.Textbox(
                    about["name"] if number == 0 else "", label="Call it", placeholder="my-cat",
                    info="You will write <my-cat>", elem_id=f"train-name{ending}", min_width=120,
                )
            )  # fmt: skip
            if number:
                sets.append(
                    gr.Dropdown(
                        _sets(studio), value=SAME, label="Its photos", info="The same, or a set of its own",
                        elem_id=f"train-photos{ending}", min_width=120,
                    )
                )  # fmt: skip
        rows.append(row)
    with gr.Row(elem_classes="actions"):
        more = gr.Button("Learn another thing with it", size="sm", elem_id="train-more", min_width=140)
        fewer = gr.Button("Take the last one out", size="sm", visible=False, elem_id="train-fewer", min_width=120)
    things = Things(count, nouns, names, sets, [count, *rows, more, fewer], gr.State(chosen.value))
    _wire(studio, page, chosen, things, more, fewer)
    return things


def _wire(studio: Studio, page: Page, chosen: gr.Dropdown, things: Things, more: gr.Button, fewer: gr.Button) -> None:
    more.click(lambda count: _rows((count or 1) + 1), things.count, things.shown, **QUIET)
    fewer.click(lambda count: _rows((count or 1) - 1), things.count, things.shown, **QUIET)
    page.watch(
        Watch(
            things.photos,
            lambda: tuple(each.id for each in studio.datasets.all()),
            lambda: [gr.update(choices=_sets(studio)) for _ in things.photos],
        )
    )
    for box, noun, name in zip(things.photos, things.nouns[1:], things.names[1:], strict=True):
        box.input(lambda *given: _known(studio, *given), [box, noun, name], [noun, name], **QUIET)
    chosen.change(
        lambda *given: _chosen(studio, *given),
        [things.settled, chosen, things.nouns[0], things.names[0]],
        [things.settled, *things.shown, *things.nouns, *things.names, *things.photos],
        **QUIET,
    )


def _rows(count: int) -> list[Any]:
    count = max(1, min(int(count or 1), MOST))
    rows = [gr.update(visible=number < count) for number in range(MOST)]
    return [count, *rows, gr.update(visible=count < MOST), gr.update(visible=count > 1)]


def _sets(studio: Studio) -> list[tuple[str, str]]:
    return [("The same photos", SAME), *((each.title, each.id) for each in studio.datasets.all())]


def _known(studio: Studio, chosen: str, noun: str, name: str) -> list[Any]:
    """What a set itself says it shows; the example's words are not those of somebody's own photos."""
    if chosen in (EXAMPLE, SAME, None):
        return [gr.skip(), gr.skip()]
    about = studio.datasets.about(chosen)
    if about:
        return [about["noun"], about["name"]]
    example = photos.example_about(studio)
    untouched = bool(noun) and (noun, name) == (example["noun"], example["name"])
    return ["", ""] if untouched else [gr.skip(), gr.skip()]


def _chosen(studio: Studio, settled: str, chosen: str, noun: str, name: str) -> list[Any]:
    """Another set: what it says of itself, and rows for those that came together with it.

    Nothing for the set that the fields already speak of, which is how a reloaded page gets it back.
    """
    if chosen == settled:
        return [gr.skip() for _ in range(4 + 4 * MOST - 1)]
    mine = _known(studio, chosen, noun, name)
    others = studio.datasets.about(chosen).get("with", []) if chosen not in (EXAMPLE, SAME, None) else []
    known = {each.id for each in studio.datasets.all()}
    others = [other for other in others if other in known][: MOST - 1]
    about = [studio.datasets.about(other) for other in others]
    blank = [gr.skip() for _ in range(MOST - 1 - len(others))]
    rows = _rows(1 + len(others)) if others else [gr.skip() for _ in range(MOST + 3)]
    nouns = [mine[0], *(each.get("noun", "") for each in about), *blank]
    names = [mine[1], *(each.get("name", "") for each in about), *blank]
    boxes = [gr.update(choices=_sets(studio), value=other) for other in others]
    return [chosen, *rows, *nouns, *names, *boxes, *blank]


def recalled(studio: Studio, things: Things, chosen: str, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Components and their updates for the values of `Things.all` from before a reload; sets that are gone are left."""
    count, given = int(values[0]), [str(value or "")[:LONGEST] for value in values[1:]]
    known = {each.id for each in studio.datasets.all()}
    sets = [each if each in known else SAME for each in given[2 * MOST :]]
    boxes = [gr.update(choices=_sets(studio), value=each) for each in sets]
    outputs = [things.settled, *things.shown, *things.nouns, *things.names, *things.photos]
    return outputs, [chosen, *_rows(count), *given[: 2 * MOST], *boxes]


def calling(things: Things, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Components and their updates for a row each of the things of that name, all in the photos chosen above."""
    names = names[:MOST]
    called = [gr.update(value=name) for name in names] + [gr.skip() for _ in range(MOST - len(names))]
    same = [gr.update(value=SAME) if number < len(names) else gr.skip() for number in range(1, MOST)]
    return [*things.shown, *things.names, *things.photos], [*_rows(len(names)), *called, *same]


def read(given: Sequence[Any]) -> list[dict[str, str]]:
    """{"photos", "noun", "name"} of each thing, from the values of `Things.all`; the fields may still be empty."""
    count, values = int(given[0] or 1), [(value or "").strip() for value in given[1:]]
    nouns, names, sets = values[:MOST], values[MOST : 2 * MOST], [SAME, *values[2 * MOST :]]
    return [
        {"photos": photos, "noun": noun, "name": name.strip("<>")}
        for noun, name, photos in list(zip(nouns, names, sets, strict=True))[:count]
    ]


def read_of(dataset: str, given: Sequence[Any]) -> list[dict[str, str]]:
    """Of `read` those whose photos are the set chosen above: the others are not in them."""
    return [one for one in read(given) if one["photos"] in (SAME, dataset)]


def complete(things: Sequence[dict[str, str]]) -> None:
    """StudioError when one of the things has no noun or no name, or a name that can't be written in a prompt."""
    for number, one in enumerate(things, start=1):
        which = f" {number}" if len(things) > 1 else ""
        if not one["noun"]:
            raise StudioError(
                f"What is it? Give the ordinary word for thing{which}, such as 'cat'." if which else _NOUN
            )
        if not one["name"]:
            raise StudioError(f"Give thing{which} a name, such as 'my-cat'." if which else _NAME)
    named_subjects([one["noun"] for one in things], [one["name"] for one in things])


_NOUN = "What is it? Give the ordinary word for it, such as 'cat'."
_NAME = "Give it a name, such as 'my-cat'."
