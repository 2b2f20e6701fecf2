"""What a watcher shows of a job: a pure fold of its events. No Gradio, no clock, no files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines import Event, Finished, Heatmap, Note, Preview, Progress, Snapshot

Curve = tuple[tuple[int, float], ...]  # (step over all stages, value), ascending
MOST_POINTS = 600  # a curve is thinned to half of this when it grows past it; the plot is ~600 px wide
MOST_NOTES = 50
REGIONS = "regions"  # the stage in which a first pass finds where concepts will be
INSIDE = "inside"  # the curve of the share of attention inside the mask, 0 to 1


@dataclass(frozen=True)
class View:
    """Everything a page needs to draw a running or finished job."""

    stage: str = ""
    step: int = 0  # of `total`, in this stage
    total: int = 0
    before: int = 0  # steps that were done and are not in `step`: those of other stages
    left: dict[str, int] = field(default_factory=dict)  # the step at which a stage made way for another
    eta: float | None = None  # seconds
    curves: dict[str, Curve] = field(default_factory=dict)
    previews: dict[int, Preview] = field(default_factory=dict)  # by picture of the request
    pictures: tuple[Snapshot, ...] = ()
    samples: tuple[Snapshot, ...] = ()  # the first (untrained) and the last ones
    saved_at: int | None = None  # step of the newest checkpoint
    heatmaps: dict[str, Heatmap] = field(default_factory=dict)  # newest, by token
    regions: dict[str, Heatmap] = field(default_factory=dict)  # of the first pass that keeps concepts apart, by token
    notes: tuple[str, ...] = ()
    finished: bool = False
    result: Any = None

    @property
    def share(self) -> float:
        """How much of the present stage is done, 0 to 1."""
        return min(self.step / self.total, 1.0) if self.total else 0.0


def fold(view: View, events: Iterable[Event]) -> View:
    """`view` after `events`; folding in one go or in pieces gives the same."""
    for event in events:
        view = _after(view, event)
    return view


def _after(view: View, event: Event) -> View:
    match event:
        case Progress():
            return _progressed(view, event)
        case Preview():
            return replace(view, previews=view.previews | {event.index: event})
        case Heatmap() if view.stage == REGIONS:
            return replace(view, regions=view.regions | {event.token: event})
        case Heatmap():
            return replace(view, heatmaps=view.heatmaps | {event.token: event})
        case Snapshot(kind="picture"):
            done = event.info.get("index", len(view.pictures))
            waiting = {index: preview for index, preview in view.previews.items() if index != done}
            return replace(view, pictures=(*view.pictures, event), previews=waiting)
        case Snapshot(kind="sample"):
            first, last = view.samples[:1], view.samples[1:][-6:]
            return _measured(replace(view, samples=(*first, *last, event)), event)
        case Snapshot(kind="prompt"):
            return replace(view, regions={})
        case Snapshot():
            return replace(view, saved_at=event.info.get("step", view.before + view.step))
        case Note():
            return replace(view, notes=(*view.notes, event.text)[-MOST_NOTES:])
        case Finished():
            return replace(view, finished=True, result=event.value, previews={}, eta=None)
    raise TypeError(f"{type(event).__name__} is no event")


def _progressed(view: View, event: Progress) -> View:
    before, left = view.before, view.left
    if view.stage and event.stage != view.stage:
        left = left | {view.stage: view.step}
        earlier = left.get(event.stage, 0)  # a stage goes on after another one: pictures, each with a first pass
        before += view.step - (earlier if event.step > earlier else 0)
    x = before + event.step
    curves = dict(view.curves)
    for name, value in event.values.items():
        curves[name] = _with_point(curves.get(name, ()), x, value)
    return replace(
        view,
        stage=event.stage,
        step=event.step,
        total=event.total,
        before=before,
        left=left,
        eta=event.eta,
        curves=curves,
    )


def _measured(view: View, sample: Snapshot) -> View:
    """How much of the word's attention is inside the mask comes with the samples; it is a curve of its own."""
    if INSIDE not in sample.info:
        return view
    step = int(sample.info.get("step", view.before + view.step))
    return replace(
        view, curves=view.curves | {INSIDE: _with_point(view.curves.get(INSIDE, ()), step, sample.info[INSIDE])}
    )


def _with_point(curve: Curve, x: int, value: float) -> Curve:
    """A repeated or earlier step (a run taken up again) replaces what came after it."""
    while curve and curve[-1][0] >= x:
        curve = curve[:-1]
    if len(curve) >= MOST_POINTS:
        curve = curve[::2]
    return (*curve, (x, value))


def smoothed(curve: Curve, span: int = 12) -> Curve:
    """Running mean over the last `span` points: a step's loss is mostly the luck of its timestep."""
    means = []
    for index in range(len(curve)):
        window = curve[max(0, index + 1 - span) : index + 1]
        means.append((curve[index][0], sum(value for _, value in window) / len(window)))
    return tuple(means)


def clock(seconds: float | None) -> str:
    """`75` -> `1 min 15 s`; nothing when it isn't known."""
    if seconds is None or seconds != seconds or seconds < 0:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
