"""A file of prompts in the Generate tab: every line as if it stood in the prompt box, all of them one job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines import Event, Finished, Note, Progress, Request, Snapshot, StudioError, numbered_prompts, prompt_lines
from studio.asked import Cast, asked, seeds_of
from studio.jobs import Job
from studio.layouts import Values
from studio.session import Studio
from studio.starts import Cut, cutter

MOST_PROMPTS = 500  # of one file


@dataclass(frozen=True)
class Line:
    """What one prompt of a file asks for."""

    where: str  # "prompts.txt, line 3"
    request: Request
    concepts: Cast
    words: tuple[str, ...]  # those whose attention is kept


def told(path: str) -> str:
    """A sentence about a file that was chosen. StudioError when there is nothing in it to paint."""
    count = len(_checked(path, prompt_lines(path)))
    prompts = "the prompt" if count == 1 else f"the {count} prompts"
    return f"Generate paints {prompts} in {Path(path).name} instead of the one above."


def asked_lines(studio: Studio, values: Values) -> list[Line]:
    """What the controls ask for with each prompt of the file `prompt_file`, with the same seeds for all.

    StudioError, with file and line, for a prompt that can't be painted so.
    """
    path = values["prompt_file"]
    if values["placed"]:
        raise StudioError(
            "The residuals of a configuration stand at the words of its own prompt. Leave them out, below the layout, "
            "or take the file of prompts out."
        )
    known = {concept.name: concept for concept in studio.library.concepts()}
    chosen = [known[name] for name in values["concepts"] or [] if name in known]
    prompts = _checked(path, numbered_prompts(path, chosen))
    seeds = seeds_of(values["seed"], int(values["count"]))
    same, cut = {**values, "seed": str(seeds[0])}, cutter(studio)
    return [line_of(studio, {**same, "prompt": prompt}, where, cut) for where, prompt in prompts]


def _checked(path: str, prompts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if len(prompts) > MOST_PROMPTS:
        raise StudioError(
            f"{Path(path).name} has {len(prompts)} prompts, and {MOST_PROMPTS} at most are painted at once. Split it."
        )
    return prompts


def line_of(studio: Studio, values: Values, where: str, cut: Cut | None = None) -> Line:
    """What controls with these values ask for; StudioError that says `where`."""
    from pipelines import chosen  # late: it brings numpy

    with _naming(where):
        request, concepts, words = asked(studio, values, cut or cutter(studio))
        if request.start is not None:  # one that a recipe brought has the things of another prompt
            request = replace(request, start=chosen(request.start, request.prompt))
            request.check()
    return Line(where, request, concepts, words)


def start_lines(studio: Studio, lines: Sequence[Line]) -> Job:
    """Queue the pictures of every prompt. All are checked on the loaded base before the first is painted."""

    def work() -> Iterator[Event]:
        from pipelines import make_pictures

        model = yield from studio.base.ready()
        loaded = {name: studio.library.load(name) for line in lines for name, _ in line.concepts}
        _check(model, lines, loaded)

        def paint(line: Line) -> Iterator[Event]:
            cast = [(loaded[name], strength) for name, strength in line.concepts]
            made: Iterator[Event] = make_pictures(studio.workspace, model, line.request, cast, attention=line.words)
            return made

        yield from _one_job(lines, paint)

    title = f"Paint {_counted(lines)} of {lines[0].where.rpartition(', ')[0]}"
    return studio.jobs.submit(title[:80], work, kind="generate")


def summary(lines: Sequence[Line]) -> str:
    """How many prompts and pictures: "3 prompts, 6 pictures"."""
    pictures = sum(len(line.request.seeds) for line in lines)
    return f"{_counted(lines)}, {pictures} {'picture' if pictures == 1 else 'pictures'}"


def _counted(lines: Sequence[Line]) -> str:
    return "1 prompt" if len(lines) == 1 else f"{len(lines)} prompts"


def _check(model: object, lines: Sequence[Line], loaded: dict[str, object]) -> None:
    """Concepts are put on once for all prompts that have the same ones: that may take seconds."""
    from pipelines import attached, check_reading

    casts: dict[tuple[tuple[str, float], ...], list[Line]] = {}
    for line in lines:
        casts.setdefault(tuple(line.concepts), []).append(line)
    for cast, theirs in casts.items():
        with ExitStack() as stack:
            with _naming(theirs[0].where):
                stack.enter_context(attached(model, [(loaded[name], strength) for name, strength in cast]))
            for line in theirs:
                with _naming(line.where):
                    check_reading(model, line.request, line.words)


def _one_job(lines: Sequence[Line], paint: Callable[[Line], Iterator[Event]]) -> Iterator[Event]:
    """The events of all prompts as those of one job: progress over all of them, every note once, one end.

    A Snapshot("prompt") tells where another one begins.
    """
    infos: list[object] = []
    said: set[str] = set()
    began = time.monotonic()
    for number, line in enumerate(lines):
        if number:
            yield Snapshot("prompt", info={"prompt": line.request.prompt})
        with _naming(line.where), closing(paint(line)) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Finished):
                    infos += event.value
                elif isinstance(event, Progress) and event.stage == "generate":
                    step, total = number * event.total + event.step, len(lines) * event.total
                    eta = (time.monotonic() - began) / step * (total - step)
                    yield replace(event, step=step, total=total, eta=eta)
                elif isinstance(event, Snapshot):
                    yield replace(event, info=event.info | {"prompt": line.request.prompt})
                elif not (isinstance(event, Note) and event.text in said):
                    said |= {event.text} if isinstance(event, Note) else set()
                    yield event
    yield Finished(infos)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says in errors which prompt they are about."""
    try:
        yield
    except StudioError as error:
        raise StudioError(f"{where}: {error}") from error
