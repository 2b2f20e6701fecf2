"""Guidance configurations of Cones 2 and its forks in the page: opened from one upload of the file with what it names,
and written from a picture, as a zip.
"""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from pipelines import Config, Event, Finished, Request, StudioError, Trained, again, read_config
from studio.jobs import Job
from studio.session import Studio

ENDINGS = (".json", ".png", ".jpg", ".jpeg", ".webp", ".pt", ".bin", ".safetensors")
PUBLISHED = {"steps": 50, "guidance": 7.5, "scheduler": "euler", "recur": 1}  # what the original paints with


def start_opening(studio: Studio, files: Sequence[Path]) -> Job:
    """Queue the reading of a configuration; it ends with {"request": a request as JSON, "notes": sentences}.

    StudioError at once when the upload isn't complete. Of several elements the first is taken.
    """
    configs = _gathered(studio, files)

    def work() -> Iterator[Event]:
        from pipelines import attached, config_request

        model = yield from studio.base.ready()
        with attached(model, _cast(studio, configs[0])):
            request, notes = config_request(model, configs[0], Request(configs[0].prompt, **PUBLISHED))
        if len(configs) > 1:
            notes.append(f"The file has {len(configs)} pictures; this is the first. The command line paints them all.")
        data = request.to_json()
        yield Finished(
            {"request": {name: data[name] for name in data if name not in ("seeds", "width", "height")}}
            | {"notes": notes}
        )

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


def _gathered(studio: Studio, files: Sequence[Path]) -> list[Config]:
    """The uploaded files where the configuration says they are, in a folder of their own."""
    named = [path for path in files if path.suffix.lower() == ".json"]
    if len(named) != 1:
        raise StudioError("Choose one guidance configuration (.json), together with the files it names.")
    root = studio.scratch()
    folder = root / "a" / "b"  # room for paths that begin with ..
    folder.mkdir(parents=True)
    config = Path(shutil.copyfile(named[0], folder / named[0].name))
    elements: list[Config] = read_config(config)
    needed = _needed(elements[0])
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
    return elements


def _sources(config: str, needed: Sequence[str], files: Sequence[Path]) -> list[Path]:
    """The upload of each needed file. Uploads come without their folders, so a file is known by its last name alone."""
    last = [PurePosixPath(name.replace("\\", "/")).name for name in needed]
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
