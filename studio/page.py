"""What the tabs of one page share: where it is, what is chosen, and the one timer that keeps everything up to date."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from pipelines import StudioError
from studio.parts.message import reported

log = logging.getLogger(__name__)
EVERY = 0.7  # seconds between two looks
_KEEP = "(...values) => JSON.stringify(values)"  # as text: one list would be taken for a list of outputs
_SEEN = "(value) => JSON.stringify(value ?? null)"
_RECALL = "(kept, ...now) => { const then = JSON.parse(kept || '[]'); return then.length === now.length ? then : now; }"


@dataclass(frozen=True)
class Watch:
    """Components that follow something: `draw` gets the values of `inputs` whenever `sign` gives another value.

    `sign` must be cheap: it is asked several times a second by every open page.
    """

    outputs: Sequence[gr.components.Component]
    sign: Callable[..., Hashable]
    draw: Callable[..., Sequence[Any]]
    inputs: Sequence[gr.components.Component] = ()


@dataclass(frozen=True)
class Memory:
    """Components whose values the browser keeps under `key` whenever one of the events `changes` happens.

    They come back as they were; or, where they may have become outdated meanwhile, through `recall`, which gets the
    values and gives updates for `outputs`. The values come from a browser: it must not trust them.
    """

    key: str
    components: Sequence[gr.components.Component]
    changes: Sequence[Callable[..., Any]]
    recall: Callable[[list[Any]], Sequence[Any]] | None = None
    outputs: Sequence[gr.components.Component] = ()
    once: bool = False  # forget it when it was recalled


@dataclass
class Page:
    """Handed to every tab beside the Studio."""

    result: gr.State  # id of the result the Attention tab shows
    tabs: list[gr.Tabs] = field(default_factory=list)  # the one there is, once it is made
    watches: list[Watch] = field(default_factory=list)

    opened: list[Callable[[], None]] = field(default_factory=list)  # called when a page is opened or reloaded
    memories: list[Memory] = field(default_factory=list)

    def seen(self, component: gr.components.Component) -> gr.Textbox:
        """The component's value as JSON, for a watch of a dropdown whose list changes while the page is open.

        Gradio refuses a value that has gone from the list, and with it the whole event: the timer would never come as
        far as choosing another one.
        """
        value = gr.Textbox(json.dumps(getattr(component, "value", None)), visible=False)
        component.change(None, component, value, js=_SEEN, show_progress="hidden")
        return value

    def watch(self, watch: Watch) -> None:
        """Keep its outputs up to date on every open page, from its first moment on."""
        self.watches.append(watch)

    def remember(self, memory: Memory) -> None:
        """Let a reload bring the components' values back."""
        self.memories.append(memory)


def keep_watching(blocks: gr.Blocks, page: Page) -> None:
    """One timer for the whole page. A reloaded page or a second browser starts with nothing seen and draws it all."""
    seen = gr.State({})
    inputs = [component for watch in page.watches for component in watch.inputs]
    outputs = [component for watch in page.watches for component in watch.outputs]

    def open_page(*values: Any) -> list[Any]:
        with reported():
            for call in page.opened:
                call()
            return _look(page.watches, {}, list(values))

    def look(before: dict[int, Hashable], *values: Any) -> list[Any]:
        with reported():
            return _look(page.watches, before, list(values))

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    blocks.load(open_page, inputs, [seen, *outputs], **quiet)
    for memory in page.memories:
        _keep(blocks, memory)
    gr.Timer(EVERY).tick(look, [seen, *inputs], [seen, *outputs], trigger_mode="once", **quiet)


def _keep(blocks: gr.Blocks, memory: Memory) -> None:
    """Here and not in a tab: what lies in a tab that nobody opened yet is not there in the browser."""
    kept = gr.BrowserState("", storage_key=f"attune-{memory.key}", secret="attune")  # known, so that a restart reads it
    components = list(memory.components)
    for change in memory.changes:  # events of our own widgets are no triggers for gr.on
        change(None, components, kept, js=_KEEP, show_progress="hidden")
    if memory.recall is None:
        blocks.load(None, [kept, *components], components, js=_RECALL, show_progress="hidden")
        return

    def recall(kept: Any) -> list[Any]:
        with reported():
            return [*_recalled(memory, kept), *forgotten]

    forgotten = ["[]"] if memory.once else []  # "" would not be written down
    outputs = [*memory.outputs, *([kept] if memory.once else [])]
    blocks.load(recall, kept, outputs, queue=False, show_progress="hidden", api_visibility="private")


def _recalled(memory: Memory, kept: Any) -> list[Any]:
    """Nothing where nothing was kept, or what was kept by another version or changed by hand."""
    nothing = [gr.skip() for _ in memory.outputs]
    try:
        values = json.loads(kept or "[]")
        if memory.recall is None or not isinstance(values, list) or len(values) != len(memory.components):
            return nothing
        return list(memory.recall(values))
    except (ValueError, TypeError, AttributeError, LookupError, StudioError) as error:
        log.warning("What the browser remembered as '%s' is not usable: %s", memory.key, error)
        return nothing


def _look(watches: Sequence[Watch], before: dict[int, Hashable], values: list[Any]) -> list[Any]:
    now: dict[int, Hashable] = {}
    drawn: list[Any] = []
    for index, watch in enumerate(watches):
        given, values = values[: len(watch.inputs)], values[len(watch.inputs) :]
        now[index] = watch.sign(*given)
        unchanged = index in before and before[index] == now[index]
        drawn.extend([gr.skip() for _ in watch.outputs] if unchanged else _drawn(watch, given))
    return [gr.skip() if now == before else now, *drawn]


def _drawn(watch: Watch, given: Sequence[Any]) -> Sequence[Any]:
    try:
        return watch.draw(*given)
    except StudioError as error:
        log.warning("Not shown: %s", error)
        return [gr.skip() for _ in watch.outputs]
