"""Guidance configurations of Cones 2 and its forks in the page: opened from one upload of the file with what it names,
and written from a picture, as a zip.
"""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines import Config, Event, Finished, Request, StudioError, Trained, again, read_config
from studio.asked import filled, seeds_of
from studio.jobs import Job
from studio.layouts import Values
from studio.prompt_files import Line, line_of
from studio.session import Studio

ENDINGS = (".json", ".png", ".jpg", ".jpeg", ".webp", ".pt", ".bin", ".safetensors")
PUBLISHED = {"steps": 50, "guidance": 7.5, "scheduler": "euler", "recur": 1}  # what the original paints with
OWN = ("prompt", "layout", "start")  # what a picture is of: each element's own, whatever the page shows by now


def start_opening(studio: Studio, files: Sequence[Path]) -> Job:
    """Queue the reading of a configuration; it ends with {"name", "requests": the elements' as JSON, "numbers": which
    elements they are, from 1, "notes"}.

    StudioError at once when the first element's files aren't complete. A later one that can't be painted is left out,
    and told.
    """
    configs, left_out = _gathered(studio, files)
    name = configs[1].file.name

    def work() -> Iterator[Event]:
        model = yield from studio.base.ready()
        notes, found = list(left_out), {}
        for number, config in configs.items():
            try:
                found[number], said = _request(studio, model, config)
            except StudioError as error:
                said = [_left_out(config, number, error)]
            notes += said
        requests, numbers = list(found.values()), list(found)
        yield Finished({"name": name, "requests": requests, "numbers": numbers, "notes": list(dict.fromkeys(notes))})

    return studio.jobs.submit(f"Open {name}"[:80], work, kind="open", record=False)


def _request(studio: Studio, model: Any, config: Config) -> tuple[dict[str, Any], list[str]]:
    """An element's request as JSON, without what only the controls say, and notes about it."""
    from pipelines import attached, config_request

    with attached(model, _cast(studio, config)):
        request, notes = config_request(model, config, Request(config.prompt, **PUBLISHED))
    data = request.to_json()
    return {name: data[name] for name in data if name not in ("seeds", "width", "height")}, notes


def _left_out(config: Config, number: int, error: StudioError) -> str:
    """A sentence about an element that can't be painted. The first one is what was asked for: its error is raised."""
    if number == 1:
        raise error
    return f"Picture {number} of {config.file.name} is left out: {error}"


def export(studio: Studio, picture: Path) -> Job:
    """Queue the writing of what a picture was painted from; it ends with {"zip": its path, "notes": sentences}.

    StudioError at once for a picture without a recipe; the job fails in words when its concepts are no residuals.
    """
    wanted = again(picture)

    def work() -> Iterator[Event]:
        from pipelines import write_config

        model = yield from studio.base.ready()
        wanted.check(model)
        folder = studio.scratch() / f"{picture.stem}-guidance"
        made = write_config(folder, model, wanted.request, wanted.find_concepts(studio.library))
        target = folder.with_suffix(".zip")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in made.files:
                archive.write(path, path.relative_to(folder.parent))
            if made.notes:  # what the other form can't say
                archive.writestr(f"{folder.name}/NOTES.txt", "\n".join(made.notes) + "\n")
        yield Finished({"zip": str(target), "notes": made.notes})

    return studio.jobs.submit(f"Export {picture.stem}"[:80], work, kind="open", record=False)


def _cast(studio: Studio, config: Config) -> list[tuple[Trained, float]]:
    """The concepts of the library that the prompt names."""
    return [(studio.library.load(one.name), 1.0) for one in studio.library.named_in(config.prompt)]


def asked_elements(studio: Studio, values: Values, opened: Mapping[str, Any]) -> list[Line]:
    """What the elements of an opened configuration ask for, with the controls' seeds.

    `opened` is what `start_opening` ended with, and under "shown" the controls' values when it was filled in. A control
    that was changed since counts for every picture, any other one as each element says. StudioError, with its number,
    for one that can't be painted so.
    """
    seeds, changed = seeds_of(values["seed"], int(values["count"])), _changed(values, opened["shown"])
    lines = []
    for number, element in zip(opened["numbers"], opened["requests"], strict=True):
        own = {"layout": ""} | filled(studio, {"request": element})
        own = {name: value for name, value in own.items() if name not in changed}
        lines.append(line_of(studio, {**values, **own, "seed": str(seeds[0])}, f"{opened['name']}, picture {number}"))
    return lines


def set_aside(values: Values, opened: Mapping[str, Any]) -> str:
    """A sentence when the page's prompt or drawing is another than the file's by now; "" where it isn't."""
    if all((values[name] or "") == (opened["shown"][name] or "") for name in ("prompt", "layout")):
        return ""
    return " Prompts and layouts are the file's; what you changed of them here, Generate paints."


def _changed(values: Values, shown: Values) -> set[str]:
    """The controls that a person has changed. An empty field may hold None. Residuals can only be left out."""
    names = {name for name, value in values.items() if (value or None) != (shown[name] or None)}
    return names - {*OWN, *(["placed"] if values["placed"] else [])}


def _gathered(studio: Studio, files: Sequence[Path]) -> tuple[dict[int, Config], list[str]]:
    """The elements by number, with the uploaded files where they say they are, and what is left out."""
    named = [path for path in files if path.suffix.lower() == ".json"]
    if len(named) != 1:
        raise StudioError("Choose one guidance configuration (.json), together with the files it names.")
    root = studio.scratch()
    folder = root / "a" / "b"  # room for paths that begin with ..
    folder.mkdir(parents=True)
    config = Path(shutil.copyfile(named[0], folder / named[0].name))
    taken: dict[int, Config] = {}
    left_out: list[str] = []
    laid: list[str] = []
    for number, one in enumerate(read_config(config), start=1):
        try:
            laid = _laid(root, one, laid, files)
            taken[number] = one
        except StudioError as error:
            left_out.append(_left_out(one, number, error))
    return taken, left_out


def _laid(root: Path, config: Config, before: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Put the files that an element names where it says they are; their names, after those that lie there before."""
    needed = list(dict.fromkeys((*before, *_needed(config))))
    sources = _sources(config.file.name, needed, files)
    for name, source in list(zip(needed, sources, strict=True))[len(before) :]:
        target = config.file.parent / name
        try:
            if not target.resolve().is_relative_to(root.resolve()):
                raise StudioError(
                    f"{config.file.name} names '{name[:80]}', which is far away from it. Give a path beside it."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except (OSError, ValueError) as error:
            raise StudioError(
                f"{config.file.name} names '{name[:80]}', which is no usable path. Shorten it."
            ) from error
    return needed


def _last(name: str) -> str:
    """The name of a file without its folders."""
    return PurePosixPath(name.replace("\\", "/")).name


def _sources(config: str, needed: Sequence[str], files: Sequence[Path]) -> list[Path]:
    """The upload of each needed file. Uploads come without their folders, so a file is known by its last name alone."""
    last = [_last(name) for name in needed]
    paths: dict[str, set[PurePosixPath]] = {}
    for name, base in zip(needed, last, strict=True):
        paths.setdefault(base, set()).add(PurePosixPath(name.replace("\\", "/")))
    uploaded = Counter(path.name for path in files)
    alike = [base for base in paths if len(paths[base]) > 1]
    twice = [base for base in paths if uploaded[base] > 1 and base not in alike]
    missing = [f"'{name[:80]}'" for name, base in zip(needed, last, strict=True) if not uploaded[base]]
    told = []
    if missing:
        told.append(f"{config} names {', '.join(missing)}. Choose {'that file' if len(missing) == 1 else 'them'} too, ")
        told[-1] += "together with the configuration."
    if alike:
        both = ", ".join(f"'{path}'"[:80] for base in alike for path in sorted(paths[base]))
        told.append(
            f"{config} names files that are called the same in different folders ({both}), and an upload comes without "
            f"its folders. Rename them, there and in {config}."
        )
    if twice:
        both = ", ".join(f"'{base[:80]}'" for base in twice)
        told.append(f"{both} was chosen more than once. Choose the one that {config} means, or rename them.")
    if told:
        raise StudioError(" ".join(told))
    by_name = {path.name: path for path in files}
    return [by_name[base] for base in last]


def _needed(config: Config) -> list[str]:
    """The files that painting a configuration reads. StudioError where it doesn't name one."""
    bound = any(colour.words.strip().startswith("<") for colour in config.colours)  # concepts keep to it, guided or not
    drawn = bound or (config.colours and config.guidance_steps and config.guidance_weight)
    if drawn and not config.layout.strip():
        raise config.wrong("layout", "it names no layout. Write the path of the picture there.")
    drawing = [config.layout] if drawn else []
    return [*drawing, *dict.fromkeys(config.residuals[subject.name] for subject in config.subjects)]
