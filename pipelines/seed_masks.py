"""Masks of what a person marks in a photo, from the base's self-attention: iSeg without a noun (`attention.seeds`).

The alternative to Segment Anything (`pipelines.marked_masks`) that needs no model beside the base. Several things in a
photo compete for every place with each other, with the background and with what is marked as not theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipelines.attention.refine import shares
from pipelines.attention.seeds import away_columns, cell_links, room, seed_columns, spread
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Heatmap, Note, Progress
from pipelines.marked_masks import wanted
from pipelines.marks import Given, Marking, read_marks
from pipelines.mask_files import Report, Wish, mask_file, read_photos, write_mask
from pipelines.masks import STAGE, MaskParams, SoftMask
from pipelines.settings import parse_settings, validated

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.model import Model
    from pipelines.photos import Mask

_PUBLISHED: dict[str, Any] = {"entropy": 0.1, "steps": 50, "threshold": 0.5}  # of the authors' desktop program
# chosen on 40 of Toybox's tuning scenes, for a click and for a box together: layers, noise level, entropy, rounds and
# threshold; mean IoU there 0.55 for one click, 0.80 for a box
_BY_KIND: dict[str, dict[str, Any]] = {"toybox": {"layers": "up", "entropy": 0.05, "steps": 2, "threshold": 0.2}}


def seed_params(kind: str, settings: Sequence[str] = ()) -> MaskParams:
    """The settings for marks on a kind of base ("sd1", "toybox" ...), some changed by KEY=VALUE."""
    own = parse_settings(MaskParams, list(settings))
    return validated(MaskParams, _PUBLISHED | _BY_KIND.get(kind, {}) | own)


def seed_masks(
    model: Model, image: Picture, markings: Mapping[str, Marking], params: MaskParams | None = None
) -> dict[str, SoftMask]:
    """The masks of what is marked in one picture (height, width, 3), by name; the marks are in its pixels."""
    params = params or seed_params(model.kind)
    height, width = image.shape[:2]
    links, grid = cell_links(model, image, params)
    scores = []
    for marking in markings.values():
        score = spread(links, seed_columns(marking, (width, height), grid).to(links), params.steps)
        scores.append(score * room(marking, (width, height), grid).to(links))
    for marking in markings.values():
        away = away_columns(marking, (width, height), grid).to(links)
        if away.shape[1]:
            scores.append(spread(links, away, params.steps))
    parts = shares(torch.stack(scores).unflatten(1, grid), params.threshold).cpu().numpy()
    return {name: SoftMask(name, index, parts, (height, width)) for index, name in enumerate(markings)}


def marked_mask(model: Model, image: Picture, marking: Marking) -> Mask:
    """The mask (height, width) of one marked thing in a picture. StudioError when nothing stands out there."""
    mask = seed_masks(model, image, {"": marking})[""].picture()
    if not mask.any():
        raise StudioError("Nothing stands out there. Mark more of it, or paint its mask.")
    return mask


def seeded_masks(model: Model, wish: Wish, given: Sequence[Given]) -> Iterator[Event]:
    """Write a mask of every thing that is marked; photos without marks are left alone. Ends as `segmented_masks`.

    StudioError for marks that can't be meant, before anything is written.
    """
    params = seed_params(model.kind, wish.settings)
    photos = yield from read_photos(wish, model.native_size)
    marks = read_marks(given, photos, wanted(wish))
    report = Report()
    marked = [photo for photo in photos if any(file == photo.path.name for file, _ in marks)]
    for number, photo in enumerate(marked, start=1):
        across, down = photo.image.shape[1] / photo.size[0], photo.image.shape[0] / photo.size[1]
        own = {name: one.scaled(across, down) for (file, name), one in marks.items() if file == photo.path.name}
        for name, mask in seed_masks(model, photo.image, own, params).items():
            yield Heatmap(name or photo.path.stem, mask.soft, photo.image)
            if mask.binary().any():
                picture = mask.picture((photo.size[1], photo.size[0]), soft=wish.soft)
                yield from write_mask(wish, photo, name, picture, report)
            else:
                yield Note(f"Nothing stands out where {photo.path.name} is marked. Mark more of it, or paint its mask.")
                report.missing.append(mask_file(photo, name))
        yield Progress(STAGE, number, len(marked))
    yield Finished(report.as_json())
