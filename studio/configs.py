"""Guidance configurations of Cones 2 and its forks in the page: opened from one upload of the file with what it names,
and written from a picture, as a zip.
"""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
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
SHARED = ("steps", "guidance", "scheduler", "negative", "words", "seed", "count")  # of all its pictures: the controls'


def start_opening(studio: Studio, files: Sequence[Path]) -> Job:
    """Queue the reading of a configuration; it ends with {"name", "requests": each element's as JSON, "notes"}.

    StudioError at once when the upload isn't complete. An element after the first whose files were not chosen is left
    out, and told.
    """
    configs, left_out = _gathered(studio, files)

    def work() -> Iterator[Event]:
        from pipelines import attached, config_request

        model = yield from studio.base.ready()
        notes, found = list(left_out), []
        for config in configs:
            with attached(model, _cast(studio, config)):
                request, said = config_request(model, config, Request(config.prompt, **PUBLISHED))
            data = request.to_json()
            found.append({name: data[name] for name in data if name not in ("seeds", "width", "height")})
            notes += said
        yield Finished({"name": configs[0].file.name, "requests": found, "notes": list(dict.fromkeys(notes))})

    return studio.jobs.submit(f"Open {configs[0].file.name}"[:80], work, kind="open", record=False)


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


def asked_elements(studio: Studio, values: Values, name: str, elements: Sequence[dict[str, Any]]) -> list[Line]:
    """What the elements of the opened configuration `name` ask for, with the controls' seeds and settings.

    StudioError, with its number, for one that can't be painted so.
    """
    seeds = seeds_of(values["seed"], int(values["count"]))
    same = {**values, "seed": str(seeds[0]), "counted": "", "start": None, "start_photos": []}
    own = [filled(studio, {"request": element}) for element in elements]
    kept = [{name: one[name] for name in one if name not in SHARED} for one in own]
    return [line_of(studio, same | one, f"{name}, picture {number}") for number, one in enumerate(kept, start=1)]


def _gathered(studio: Studio, files: Sequence[Path]) -> tuple[list[Config], list[str]]:
    """The uploaded files where the configuration says they are, in a folder of their own, and what is left out."""
    named = [path for path in files if path.suffix.lower() == ".json"]
    if len(named) != 1:
        raise StudioError("Choose one guidance configuration (.json), together with the files it names.")
    root = studio.scratch()
    folder = root / "a" / "b"  # room for paths that begin with ..
    folder.mkdir(parents=True)
    config = Path(shutil.copyfile(named[0], folder / named[0].name))
    elements: list[Config] = read_config(config)
    there = {path.name for path in files}
    lacking = [[name for name in _needed(one) if _last(name) not in there] for one in elements]
    taken = [one for number, one in enumerate(elements) if not (number and lacking[number])]
    left_out = [
        f"Picture {number} of {config.name} is left out: it needs '{names[0][:80]}'. Choose that file too."
        for number, names in enumerate(lacking, start=1)
        if number > 1 and names
    ]
    needed = list(dict.fromkeys(name for one in taken for name in _needed(one)))
    for name, source in zip(needed, _sources(config.name, needed, files), strict=True):
        target = folder / name
        try:
            if not target.resolve().is_relative_to(root.resolve()):
                raise StudioError(
                    f"{config.name} names '{name[:80]}', which is far away from it. Give a path beside it."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except (OSError, ValueError) as error:
            raise StudioError(f"{config.name} names '{name[:80]}', which is no usable path. Shorten it.") from error
    return taken, left_out


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
    """The files that painting a configuration reads."""
    bound = any(colour.words.strip().startswith("<") for colour in config.colours)  # concepts keep to it, guided or not
    drawn = bound or (config.colours and config.guidance_steps and config.guidance_weight)
    drawing = [config.layout] if drawn else []
    return [*drawing, *dict.fromkeys(config.residuals[subject.name] for subject in config.subjects)]
