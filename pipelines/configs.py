"""From another tool's configuration file to what `generate` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.album import FromZero
from pipelines.config_subjects import find_file, place_subjects, wrong_at
from pipelines.errors import StudioError
from pipelines.events import Event, Note
from pipelines.files import printable
from pipelines.formats.cones_config import LARGEST, RECUR, SIZE, Config
from pipelines.layout import Area, Layout, Region, bind, colour_areas
from pipelines.results import make_pictures
from pipelines.sheet import write_sheet

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.model import Model
    from pipelines.request import Request
    from pipelines.text import Tokenized
    from pipelines.workspace import Workspace


def paint_configs(
    workspace: Workspace,
    model: Model,
    configs: Sequence[Config],
    request: Request,
    concepts: Sequence[tuple[Trained, float]] = (),
    settings: Mapping[str, Any] | None = None,
    attention: Sequence[str] = (),
    out: Path | None = None,
    *,
    legacy_names: bool = False,
) -> Iterator[Iterator[Event]]:
    """A run of `make_pictures` for each configuration, one after the other; all are read before the first paints.

    `settings` are fields of the Layout to be replaced. With `out` each paints into its own folder there, called as the
    original calls it (`Config.folder`), and leaves a sheet of all its pictures, all_images.png. The pictures are called
    0001.png, 0002.png ... as everywhere here, and none that is there is replaced; with `legacy_names` all is called as
    there to the letter, from 0.png on.
    """
    from pipelines.attach import attached

    with attached(model, concepts):  # prompts and colours may speak of them
        planned = [config_request(model, config, request, settings) for config in configs]
    for config, (wanted, notes) in zip(configs, planned, strict=True):
        folder = None if out is None else out / (config.legacy_folder if legacy_names else config.folder)
        place = FromZero(folder) if folder is not None and legacy_names else folder
        yield _painted(make_pictures(workspace, model, wanted, concepts, attention, place), notes, folder)


def _painted(events: Iterator[Event], notes: Sequence[str], folder: Path | None) -> Iterator[Event]:
    yield from (Note(note) for note in notes)
    yield from events
    if folder is not None:
        write_sheet(folder)


def config_request(
    model: Model, config: Config, request: Request, settings: Mapping[str, Any] | None = None
) -> tuple[Request, list[str]]:
    """`request` with the configuration's prompt, layout and residuals, and what the person should know about them.

    Concepts that the prompt names are attached when this is called. `settings` are fields of the Layout, and count
    before the file's. StudioError with file and line for what isn't there or doesn't fit the model.
    """
    given = dict(settings or {})
    Layout((Region("-", Area.box((0, 0, 1, 1), (1, 1))),), **given).check()  # not the file's fault
    try:
        prompt = model.tokenize(config.prompt)
    except StudioError as error:
        raise config.wrong("prompt", str(error)) from error
    placed, notes = place_subjects(model, config, prompt)
    steps = given.get("steps", config.guidance_steps)
    guided = bool(steps and given.get("strength", config.guidance_weight) and config.colours)
    routed = any(colour.words.strip() in model.placeholders for colour in config.colours)
    layout = _layout(config, prompt, given) if guided or routed else None
    again = guided or (layout is None and steps >= request.steps)
    notes += _unheard(config, given, guided) + _taken_once(config, request, steps, again)
    return replace(
        request, prompt=config.prompt, layout=layout, placed=placed, recur=request.recur if again else 0
    ), notes


def _unheard(config: Config, given: Mapping[str, Any], guided: bool) -> list[str]:
    """A sentence when layout settings were given to a configuration that guides nothing."""
    if guided or not given or 0 in (given.get("steps"), given.get("strength")):
        return []
    off = {
        "color_context": bool(config.colours),
        "guidance_steps": given.get("steps", config.guidance_steps),
        "guidance_weight": given.get("strength", config.guidance_weight),
    }
    field = next(field for field, value in off.items() if not value)
    state = "empty" if field == "color_context" else 0
    return [
        f"{printable(config.file.name)}, line {config.lines[field]}: '{field}' is {state}, so attention isn't led to "
        "regions, and what you said about that has no effect. Give that too."
    ]


def _taken_once(config: Config, request: Request, steps: int, again: bool) -> list[str]:
    """A sentence when the original, which goes by the number of guided steps alone, would take steps again."""
    if again or request.recur <= (0 if steps else RECUR):
        return []
    where = f"{printable(config.file.name)}, line {config.lines['guidance_steps']}"
    if not steps:
        return [f"{where}: no step is guided, so none is taken again."]
    return [
        f"{where}: steps are taken again only where attention is led to regions, or all of them; the original would "
        f"take the first {min(steps, request.steps)} again."
    ]


def _layout(config: Config, prompt: Tokenized, settings: Mapping[str, Any]) -> Layout:
    """The regions, with `settings` instead of the file's."""
    image = _image(config)
    regions = []
    for colour in config.colours:
        try:
            area = colour_areas(image, [colour.rgb], SIZE)[colour.rgb]
            regions.append(Region(colour.words, area, colour.occurrence, colour.weight))
            bind(Layout((regions[-1],)), prompt)
        except StudioError as error:
            raise wrong_at(config, colour.line, str(error)) from error
    layout = Layout(tuple(regions), config.guidance_weight, config.guidance_steps, config.weight_negative)
    layout = replace(layout, **settings)
    try:
        layout.check()
    except StudioError as error:
        raise config.wrong("weight_negative", str(error)) from error
    return layout


def _image(config: Config) -> Any:
    from PIL import Image

    path = find_file(config, config.layout, config.lines["layout"])
    try:
        with Image.open(path) as image:
            if image.width * image.height > LARGEST:
                raise config.wrong(
                    "layout", f"the layout has {image.width} x {image.height} pixels. Use a smaller one."
                )
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise config.wrong("layout", f"'{printable(path.name)}' is no readable picture.") from error
