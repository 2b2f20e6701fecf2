"""Pictures on disk: painted into a folder of their own with the attention of chosen words beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.album import Album, FromZero, open_album
from pipelines.events import Event, Finished, Heatmap, Note, Preview, Progress, Snapshot
from pipelines.gallery import Result, delete_result, list_results, read_result, zip_results
from pipelines.recipe import Again, again, for_picture, write_recipe

if TYPE_CHECKING:
    from pipelines.attention.store import AttentionStore
    from pipelines.concept import Trained
    from pipelines.found_regions import FoundRegions
    from pipelines.model import Model
    from pipelines.request import Request
    from pipelines.workspace import Workspace

__all__ = [
    "Again", "Result", "again", "check_reading", "delete_result", "list_results", "make_pictures", "read_result",
    "zip_results",
]  # fmt: skip


def make_pictures(
    workspace: Workspace,
    model: Model,
    request: Request,
    concepts: Sequence[tuple[Trained, float]] = (),
    attention: Sequence[str] = (),
    out: str | Path | FromZero | None = None,
) -> Iterator[Event]:
    """`generate`, with every picture saved as a PNG that carries its recipe, and heat maps of the words in `attention`.

    The folder is a new one in the workspace's results, or `out`, where numbering goes on after what is there. Yields
    what `generate` yields, each Snapshot with the `path` of its file and the folder's "result" id in its info, a
    Heatmap per picture and word, and Finished with the list of infos. Regions that a first pass finds are saved before
    their picture is begun, told as a Snapshot("regions") and named in the picture's info. Closing keeps what is done.
    The cut-outs of a start noise are kept in the workspace, and found there when the request is from a recipe.
    StudioError for what the model can't do, a word that isn't in the prompt, a concept for another base, or a full
    disk.
    """
    from pipelines.found_regions import FoundRegions
    from pipelines.generate import paint, sized
    from pipelines.regions import staged

    request = sized(model, request)
    if request.start is not None:
        from pipelines.cutouts import filled

        request = replace(request, start=filled(workspace, request.start))
    with ExitStack() as stack:
        stage = stack.enter_context(staged(model, request, concepts))
        words = _positions(model, request.prompt, attention)
        recipe = write_recipe(model, request, concepts, attention)
        album = stack.enter_context(open_album(workspace, recipe, out))
        run = _Run(request, album, recipe, FoundRegions(album, request, len(stage.own)))
        for first in range(0, len(request.seeds), request.batch):
            part = replace(request, seeds=request.seeds[first : first + request.batch])
            if request.keep and not set(request.keep) & set(part.seeds):
                continue
            store = _store(words)
            for event in paint(stage, part, probes=() if store is None else (store,)):
                yield from run.handle(event, first, store)
        album.complete()
    yield Finished(run.infos)


def check_reading(model: Model, request: Request, attention: Sequence[str] = ()) -> None:
    """StudioError, before anything is painted, for a size that isn't the base's, and for regions and words that aren't
    in the prompt or were cut off with its end. The concepts it names are attached when this is called."""
    from pipelines.generate import sized
    from pipelines.layout import bind

    sized(model, request)
    if request.layout is not None:
        bind(request.layout, model.tokenize(request.prompt))
    _positions(model, request.prompt, attention)


def _positions(model: Model, prompt: str, words: Sequence[str]) -> dict[str, list[int]]:
    """Where each word stands in the prompt, by the word as it was asked for."""
    if not words:
        return {}
    from pipelines.tokens import find_word

    read = model.tokenize(prompt)
    return {word: find_word(read, word) for word in words}


def _store(words: Mapping[str, list[int]]) -> AttentionStore | None:
    """A fresh store for every batch, so that memory doesn't grow with the number of pictures."""
    if not words:
        return None
    from pipelines.attention.store import AttentionStore

    return AttentionStore(words)


class _Run:
    """Turns the events of one batch into those of the whole request, and saves what they bring."""

    def __init__(self, request: Request, album: Album, recipe: dict[str, Any], regions: FoundRegions) -> None:
        self.request, self.album, self.recipe, self.regions = request, album, recipe, regions
        self.infos: list[dict[str, Any]] = []
        self._said: set[str] = set()
        self._started = time.monotonic()

    def handle(self, event: Event, first: int, store: AttentionStore | None) -> Iterator[Event]:
        if isinstance(event, Progress):
            yield self._progress(event, first)
        elif isinstance(event, Preview):
            yield replace(event, index=first + event.index)
        elif isinstance(event, Note):
            yield from self._once(event)
        elif isinstance(event, Heatmap):  # a region that was found
            yield event
            if saved := self.regions.take(event, first):
                index, path = saved
                yield Snapshot("regions", path=str(path), info={"index": index, "step": 0})  # before any step
        elif isinstance(event, Snapshot):
            yield from self._keep(event, first, store)

    def _progress(self, event: Progress, first: int) -> Progress:
        if event.stage != "generate":
            return event
        batches = -(-len(self.request.seeds) // self.request.batch)
        step, total = first // self.request.batch * event.total + event.step, batches * event.total
        pace = (time.monotonic() - self._started) / step
        return replace(event, step=step, total=total, eta=pace * (total - step))

    def _once(self, note: Note) -> Iterator[Note]:
        if note.text not in self._said:
            self._said.add(note.text)
            yield note

    def _keep(self, event: Snapshot, first: int, store: AttentionStore | None) -> Iterator[Event]:
        row = event.info["index"]
        index = first + row
        assert event.image is not None
        path = self.album.add(event.image, for_picture(self.recipe, self.request, index))
        info = event.info | {"index": index, "path": str(path)} | ({"result": self.album.id} if self.album.id else {})
        if index in self.regions.files:
            info["regions"] = str(self.regions.files[index])
        heats = {} if store is None else {word: store.maps(word)[row] for word in store.tokens}
        if store is not None:
            if len(self.infos) == 0:  # the same for every batch, but for the numbers in a last, smaller one
                yield Note(store.note)
            info["attention"] = self.album.add_attention(path, event.image, heats, row, store)
        self.infos.append(info)
        yield replace(event, path=str(path), info=info)
        for word, values in heats.items():
            yield Heatmap(word, values, event.image)
