"""Guidance configurations of Cones 2 and its forks, opened in the page: the file with what it names, as one upload."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from pipelines import Config, Event, Finished, Request, StudioError, read_config
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
        from pipelines import config_request

        model = yield from studio.base.ready()
        request, notes = config_request(model, configs[0], Request(configs[0].prompt, **PUBLISHED))
        if len(configs) > 1:
            notes.append(f"The file has {len(configs)} pictures; this is the first. The command line paints them all.")
        data = request.to_json()
        yield Finished(
            {"request": {name: data[name] for name in data if name not in ("seeds", "width", "height")}}
            | {"notes": notes}
        )

    return studio.jobs.submit(f"Open {configs[0].file.name}"[:80], work, kind="open", record=False)


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
    uploaded = {path.name: path for path in files}
    for name in _needed(elements[0]):
        source = uploaded.get(PurePosixPath(name.replace("\\", "/")).name)
        if source is None:
            raise StudioError(f"{config.name} names '{name[:80]}'. Choose that file together with it.")
        target = folder / name
        if not target.resolve().is_relative_to(root.resolve()):
            raise StudioError(f"{config.name} names '{name[:80]}', which is far away from it. Give a path beside it.")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return elements


def _needed(config: Config) -> list[str]:
    """The files that painting a configuration reads."""
    drawing = [config.layout] if config.colours and config.guidance_steps and config.guidance_weight else []
    return [*drawing, *dict.fromkeys(config.residuals[subject.name] for subject in config.subjects)]
