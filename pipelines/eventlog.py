"""Events on disk: one JSON line each in `events.jsonl`, pictures as PNG and heat maps as .npy files beside it.

A line is written whole or not at all as far as a reader can see: a torn last one (kill -9) is dropped on reading and
cut off before the next is appended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.concept import Concept, Trained
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Heatmap, Note, Picture, Preview, Progress, Snapshot
from pipelines.files import spare_disk
from pipelines.intake import parse_json

LOG_NAME = "events.jsonl"
_LINE_LIMIT = 4_000_000
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Progress, Preview, Heatmap, Snapshot, Note, Finished)}
logger = logging.getLogger(__name__)


class EventLog:
    """Appends events to `folder`/events.jsonl; a context manager. One writer at a time, any number of readers.

    Of previews only the latest of each picture stays on disk. StudioError when the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / LOG_NAME, "a+b")  # noqa: SIM115 - closed by close()
        self._snapshots = self._cut_torn_line()

    def append(self, event: Event) -> Event:
        """Record `event` and return it as kept: a snapshot whose picture is now on disk names its path."""
        event = self._keep_snapshot(event)
        line = json.dumps(encode(event, self.folder), allow_nan=False) + "\n"
        with spare_disk(self.folder / LOG_NAME, len(line)):
            self._file.write(line.encode())
            self._file.flush()
            if isinstance(event, Snapshot | Finished):
                os.fsync(self._file.fileno())
        return event

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut_torn_line(self) -> int:
        """Drop an unfinished last line; the number of snapshots so far, which numbers the next picture."""
        self._file.seek(0)
        whole = count = 0
        for line in self._file:
            if line.endswith(b"\n"):
                whole += len(line)
                count += b'"Snapshot"' in line
        self._file.truncate(whole)
        return count

    def _keep_snapshot(self, event: Event) -> Event:
        if not isinstance(event, Snapshot):
            return event
        self._snapshots += 1
        if event.path is None and event.image is not None:
            path = self.folder / f"{_slug(event.kind)}-{self._snapshots:05d}.png"
            _write_picture(path, event.image)
            return dataclasses.replace(event, path=str(path))
        return event


def encode(event: Event, folder: Path | None = None) -> dict[str, Any]:
    """`event` as JSON data. Pictures and heat maps go into `folder`, or are left out when there is none.

    A `Finished` with a `Trained` keeps its concept only: the tensors are in the library. TypeError on other values
    that JSON doesn't know.
    """
    data: dict[str, Any] = {"event": type(event).__name__}
    if isinstance(event, Preview):
        data |= {"index": event.index, "step": event.step, "total": event.total}
        data |= _picture(folder, f"preview-{event.index}.png", event.image)
    elif isinstance(event, Heatmap):
        stem = f"heat-{hashlib.sha256(event.token.encode()).hexdigest()[:10]}-{event.step:06d}"
        data |= {"token": event.token, "step": event.step} | _picture(folder, f"{stem}.png", event.image)
        if folder is not None:
            _write(folder / f"{stem}.npy", _npy(event.values))
            data["values"] = f"{stem}.npy"
    elif isinstance(event, Snapshot):
        data |= {"kind": event.kind, "path": _shorten(event.path, folder), "info": _plain(event.info)}
    elif isinstance(event, Finished):
        data["value"] = _plain(event.value)
    else:
        data |= _plain(dataclasses.asdict(event))
    return data


def decode(data: dict[str, Any], folder: Path | None = None) -> Event:
    """The inverse of `encode`; pictures and heat maps are read back from `folder`.

    A `Finished` with a concept gives that `Concept`. A missing picture is None (a black dot for a Preview); KeyError,
    TypeError or ValueError when `data` is no event.
    """
    data = dict(data)
    kind = _KINDS[data.pop("event")]
    if kind is Preview:
        image = _read_picture(folder, data.pop("image", None))
        return Preview(np.zeros((1, 1, 3), np.uint8) if image is None else image, **data)
    if kind is Heatmap:
        image, values = _read_picture(folder, data.pop("image", None)), _read_npy(folder, data.pop("values", None))
        return Heatmap(values=values, image=image, **data)
    if kind is Snapshot and data.get("path") and folder is not None:
        data["path"] = str(folder / data["path"])  # an absolute path stays itself
    if kind is Finished and isinstance(data["value"], dict) and set(data["value"]) == {"concept"}:
        data["value"] = Concept.from_json(data["value"]["concept"])
    if kind is Progress:
        data["values"] = {name: math.nan if value is None else value for name, value in data["values"].items()}
    return kind(**data)


def read_events(folder: Path) -> Iterator[Event]:
    """What was recorded in `folder`, oldest first; nothing without a log. Lines that make no sense are skipped."""
    try:
        file = open(folder / LOG_NAME, "rb")  # noqa: SIM115 - closed by the next line
    except FileNotFoundError:
        return
    with file:
        for line in iter(lambda: file.readline(_LINE_LIMIT), b""):
            if not line.endswith(b"\n"):
                continue
            try:
                yield decode(json.loads(line), folder)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                logger.warning("%s: a line was skipped (%s)", folder / LOG_NAME, type(error).__name__)


def training_log(events: Iterator[Event]) -> bytes:
    """The curves and notes among `events` as JSON lines: a concept's run.jsonl."""
    kept = (event for event in events if isinstance(event, Progress | Note))
    return "".join(json.dumps(encode(event)) + "\n" for event in kept).encode()


def parse_log(data: bytes) -> list[Event]:
    """The inverse of `training_log`. StudioError when a line is no event."""
    try:
        return [decode(parse_json(line, "run.jsonl")) for line in data.splitlines()]
    except (KeyError, TypeError, ValueError) as error:
        raise StudioError("run.jsonl is not a training log. Get the file again from its source.") from error


def _plain(value: Any) -> Any:
    """`value` as JSON data: paths as text, concepts as their description, NaN and infinity as null."""
    if isinstance(value, Trained | Concept):
        return {"concept": (value.concept if isinstance(value, Trained) else value).to_json()}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _shorten(path: str | None, folder: Path | None) -> str | None:
    """A path inside `folder` without it, so that a workspace can be moved."""
    if path is not None and folder is not None and Path(path).is_relative_to(folder):
        return Path(path).relative_to(folder).as_posix()
    return path


def _picture(folder: Path | None, name: str, image: Picture | None) -> dict[str, str]:
    if folder is None or image is None:
        return {}
    _write_picture(folder / name, image)
    return {"image": name}


def _write_picture(path: Path, image: Picture) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    _write(path, buffer.getvalue())


def _npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all for a reader, but without waiting for the disk: a picture lost in a power cut is no harm."""
    temporary = path.with_name(f".{path.name}.tmp")
    with spare_disk(path, len(data)):
        temporary.write_bytes(data)
        os.replace(temporary, path)


def _read_picture(folder: Path | None, name: str | None) -> Picture | None:
    from PIL import Image

    if folder is None or name is None:
        return None
    with contextlib.suppress(OSError), Image.open(folder / Path(name).name, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))
    return None


def _read_npy(folder: Path | None, name: str | None) -> Any:
    if folder is not None and name is not None:
        with contextlib.suppress(OSError):
            return np.load(folder / Path(name).name, allow_pickle=False)
    return np.zeros((1, 1), np.float32)


def _slug(text: str) -> str:
    return "".join(c for c in text.lower() if c.isascii() and c.isalnum())[:20] or "picture"
