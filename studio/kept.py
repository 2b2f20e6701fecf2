"""The events of one job in bounded memory: every Progress as bare numbers, of the rest what a page can still show."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import OrderedDict
from collections.abc import Iterator

from pipelines import Event, Finished, Heatmap, Note, Preview, Progress, Snapshot, Trained

_MOST: dict[type, int] = {Preview: 64, Heatmap: 64, Snapshot: 2000, Note: 200, Finished: 1}
_PICTURES = 8  # snapshots that keep their picture in memory because it has no file
_Shape = tuple[str, int, tuple[str, ...]]  # stage, total, names of the curves


class Kept:
    """A list of events that forgets what is outdated: earlier previews of a picture, earlier heat maps of a word.

    Events are numbered from 1; `count` is the number of the newest. A snapshot with a path loses its picture (it is
    on disk), a finished `Trained` its tensors (they are in the library).
    """

    def __init__(self) -> None:
        self.count = 0
        self._rows: dict[_Shape, array[float]] = {}  # each row: number, step, eta or NaN, then the curves' values
        self._others: dict[type, OrderedDict[object, tuple[int, Event]]] = {kind: OrderedDict() for kind in _MOST}

    def add(self, event: Event) -> None:
        """Append one event."""
        self.count += 1
        if isinstance(event, Progress):
            rows = self._rows.setdefault((event.stage, event.total, tuple(event.values)), array("d"))
            eta = math.nan if event.eta is None else event.eta
            rows.extend((self.count, event.step, eta, *event.values.values()))
            return
        kept = self._others[type(event)]
        key = _key(event, self.count)
        kept.pop(key, None)
        kept[key] = (self.count, _lighter(event))
        if len(kept) > _MOST[type(event)]:
            kept.popitem(last=False)
        if isinstance(event, Snapshot):
            self._drop_pictures()

    def since(self, number: int) -> list[Event]:
        """What came after the event `number` and is still kept, in order."""
        found: list[tuple[int, Event]] = []
        for shape, rows in self._rows.items():
            found.extend(_progress_after(number, shape, rows))
        for kept in self._others.values():
            found.extend(pair for pair in kept.values() if pair[0] > number)
        return [event for _, event in sorted(found, key=lambda pair: pair[0])]

    def _drop_pictures(self) -> None:
        snapshots = self._others[Snapshot]
        pictured = [
            key for key, (_, event) in snapshots.items() if isinstance(event, Snapshot) and event.image is not None
        ]
        for key in pictured[:-_PICTURES]:
            number, event = snapshots[key]
            snapshots[key] = (number, dataclasses.replace(event, image=None))


def _progress_after(number: int, shape: _Shape, rows: array[float]) -> Iterator[tuple[int, Event]]:
    stage, total, names = shape
    width = 3 + len(names)
    low, high = 0, len(rows) // width  # first row whose number is larger: numbers ascend
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if rows[middle * width] <= number else (low, middle)
    for start in range(low * width, len(rows), width):
        at, step, eta, *values = rows[start : start + width]
        yield (
            int(at),
            Progress(stage, int(step), total, dict(zip(names, values, strict=True)), None if math.isnan(eta) else eta),
        )


def _key(event: Event, number: int) -> object:
    if isinstance(event, Preview):
        return event.index
    if isinstance(event, Heatmap):
        return event.token, event.step > 0  # a picture's attention (no step) doesn't replace the region found before it
    return number


def _lighter(event: Event) -> Event:
    if isinstance(event, Snapshot) and event.path is not None:
        return dataclasses.replace(event, image=None)
    if isinstance(event, Finished) and isinstance(event.value, Trained):
        return Finished(event.value.concept)
    return event
