"""The base model of this studio: loaded by the worker, once, and told about to everybody else."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipelines import Event, Finished, Note, StudioError

if TYPE_CHECKING:
    from pipelines import Model


class Base:
    """Which base is wanted, and the loaded one. Only the worker may use `model`; `tokenizer` is a copy for reading."""

    def __init__(self, where: str = "toybox") -> None:
        self.where = where
        self.model: Model | None = None
        self.tokenizer: Any = None  # of the first encoder
        self.error = ""  # why the last attempt failed

    @property
    def kind(self) -> str:
        """The family of the loaded base, else that of the wanted one as far as its name tells."""
        if self.model is not None:
            return str(self.model.kind)
        return "toybox" if self.where == "toybox" else "sd1"

    @property
    def title(self) -> str:
        """What to call it on a page."""
        where = self.where if self.model is None else str(self.model.id)
        return "Toybox" if where == "toybox" else where

    @property
    def fingerprint(self) -> str:
        """Of the loaded base; "" before."""
        return "" if self.model is None else str(self.model.fingerprint)

    @property
    def native_size(self) -> int:
        """Pixels of a side that the loaded base was made for; before one is loaded, a guess by its family."""
        if self.model is not None:
            return int(self.model.native_size)
        return 64 if self.kind == "toybox" else 512

    def identity(self) -> dict[str, str]:
        """What a concept made for the loaded base carries. StudioError before one is loaded."""
        if self.model is None:
            raise StudioError("No base is loaded yet. Wait until it is, or leave the box unticked.")
        return {"id": str(self.model.id), "fingerprint": self.fingerprint}

    def ready(self) -> Generator[Event, None, Model]:
        """The model, loaded first when it is not: `model = yield from base.ready()` inside a job."""
        if self.model is None:
            yield from self._load(self.where)
        return self.model

    def change(self, where: str, last: bool = True) -> Iterator[Event]:
        """Load another base; the present one stays when that fails. As a job of its own it is the `last` thing."""
        where = (where or "").strip()
        if not where:
            raise StudioError("No base is named. Type 'toybox', a Hub id, a folder or a .safetensors file.")
        if where != self.where or self.model is None:
            yield from self._load(where)
        if last:
            yield Finished({"base": self.title})

    def _load(self, where: str) -> Generator[Event, None, None]:
        yield Note(f"Loading {'Toybox' if where == 'toybox' else where} …")
        try:
            model = yield from _in_background(where)
        except StudioError as error:
            self.error = str(error)
            raise
        self.tokenizer = copy.deepcopy(model.tokenizers[0])
        self.where, self.model, self.error = where, model, ""


class _Stopped(Exception):
    """Raised inside a download that nobody waits for any more."""


def _in_background(where: str) -> Generator[Event, None, Model]:
    """`load_model` in a thread of its own, so that its progress can be yielded while it downloads."""
    from pipelines import load_model  # late: it brings diffusers and transformers

    said: queue.Queue[Event] = queue.Queue()
    stop = threading.Event()

    def report(event: Event) -> None:
        if stop.is_set():
            raise _Stopped
        said.put(event)

    with ThreadPoolExecutor(1, thread_name_prefix="attune-load") as pool:
        loading = pool.submit(load_model, where, progress=report)
        try:
            while not loading.done() or not said.empty():
                try:
                    yield said.get(timeout=0.1)
                except queue.Empty:
                    continue
        finally:
            stop.set()
        return loading.result()
