"""Mask files from boxes and clicks: a detector's box or a person's marks, cut out by Segment Anything.

MuDI's automatic masks (Jang et al. 2024, arXiv 2404.04243, appendix A; there OWLv2 and SAM ViT-H in a notebook): one
box of the noun, a little larger on each side, is what Segment Anything is asked to cut out. Departures: where several
things of a noun are seen the surest is taken and told (there the photo is skipped), several nouns are looked for at
once and compete, masks are PNG (there JPEG), and a person's marks go before the detector.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipelines.errors import StudioError
from pipelines.evaluate.sights import Sight, widened
from pipelines.events import Event, Finished, Note, Progress
from pipelines.marks import Given, Marking, Marks, Point, read_marks
from pipelines.mask_files import Report, Wish, keeps, mask_file, read_photos, write_mask
from pipelines.masks import STAGE

if TYPE_CHECKING:
    from pipelines.class_masks import Find
    from pipelines.evaluate.eyes import Detector
    from pipelines.evaluate.sights import Box
    from pipelines.events import Picture
    from pipelines.photos import Mask, Photo
    from pipelines.segmenter import Segmenter

LOOKED_AT = 1024  # pixels of the short side that Segment Anything and a detector are shown; their own sizes are below
MARGIN = 0.05  # of the photo, that a detector's box is made larger by on each side; as in MuDI's notebook
_LEAST, _MOST = 0.02, 0.9  # of a photo: a mask with less or more is worth a look
_ALONG = 5  # clicks that stand for a line


@dataclass(frozen=True)
class Finder:
    """What finds the nouns, and how much larger its boxes are made (a share of the photo)."""

    detector: Detector
    margin: float = MARGIN

    def check(self) -> None:
        """StudioError for a margin that makes no sense."""
        if not 0 <= self.margin <= 0.5:
            raise StudioError(f"A box can't be made larger by {self.margin:g} of the photo. Choose 0 to 0.5.")


def segmented_masks(
    segmenter: Segmenter, wish: Wish, given: Sequence[Given] = (), finder: Finder | None = None
) -> Iterator[Event]:
    """Write a mask of every thing that is marked or, with a `finder`, of every noun in every photo.

    Without a finder only photos with marks are looked at. Ends with Finished({"written", "kept", "missing"} of file
    names, "boxes" where a detector saw them). StudioError for marks that can't be meant, before anything is written.
    """
    photos = yield from read_photos(wish, LOOKED_AT)
    marks = read_marks(given, photos, wanted(wish))
    report = Report()
    for number, photo in enumerate(photos, start=1):
        yield from _one_photo(segmenter, wish, photo, marks, finder, report)
        yield Progress(STAGE, number, len(photos))
    yield Finished(report.as_json())


def wanted(wish: Wish) -> tuple[str, ...]:
    """The names that marks may have; () = any, where one thing at most is wanted and has no name."""
    names = tuple(wish.files())
    return () if names == ("",) else names


def _one_photo(
    segmenter: Segmenter, wish: Wish, photo: Photo, marks: Marks, finder: Finder | None, report: Report
) -> Iterator[Event]:
    own = {name: marking for (file, name), marking in marks.items() if file == photo.path.name}
    names = []
    for name in dict.fromkeys([*own, *(wish.files() if finder else ())]):
        if not (yield from keeps(wish, photo, name, report)):
            names.append(name)
    if not names:
        return
    segmenter.look(photo.image)
    search = finder is not None and any(name not in own for name in names)
    sights = finder.detector.spot(photo.image, wish.nouns) if finder and search else []
    for name in names:
        marking = own.get(name)
        if marking is not None:
            marking = marking.scaled(*_scale(photo))
        else:
            found = yield from _surest(wish, photo, name, sights, report)
            if found is None:
                continue
            marking = Marking(box=widened(found, finder.margin if finder else 0.0, photo.image.shape[:2]))
        try:
            mask = cut_by_marks(segmenter, marking)
        except StudioError as error:  # the other photos are worth going on for
            yield Note(f"{photo.path.name}: {error}")
            report.missing.append(mask_file(photo, name))
            continue
        yield from _doubt(photo, name, mask)
        yield from write_mask(wish, photo, name, whole(mask, photo), report)


def _surest(
    wish: Wish, photo: Photo, name: str, sights: Sequence[Sight], report: Report
) -> Generator[Event, None, Box | None]:
    """The box of the surest thing of that name, in pixels of the photo as it is looked at."""
    query, file = wish.files().index(name), photo.path.name
    noun, found = wish.nouns[query], [one for one in sights if one.query == query]
    if not found:
        yield Note(f"No '{noun}' was found in {file}. Click on it (--click {file}:X,Y), or look less strictly.")
        report.missing.append(mask_file(photo, name))
        return None
    first, *others = found
    if others:
        rivals = ", ".join(f"{one.score:.2f}" for one in others)
        yield Note(
            f"{file} shows {len(found)} things like '{noun}'; the surest one ({first.score:.2f}, the others {rivals}) "
            f"is masked. If another is meant, draw its box: --box {file}:X0,Y0,X1,Y1"
        )
    across, down = _scale(photo)
    left, top, right, bottom = first.box
    report.boxes[mask_file(photo, name)] = [
        round(value) for value in (left / across, top / down, right / across, bottom / down)
    ]
    return first.box


def by_detector(segmenter: Segmenter, finder: Finder) -> Find:
    """What `masked_class_pictures` takes: the mask of the one thing of a class; None when there is not exactly one."""

    def find(picture: Picture, noun: str) -> Mask | None:
        sights = finder.detector.spot(picture, [noun])
        if len(sights) != 1:
            return None
        segmenter.look(picture)
        try:
            return segmenter.box(widened(sights[0].box, finder.margin, picture.shape[:2]))
        except StudioError:  # nothing there after all
            return None

    return find


def _scale(photo: Photo) -> tuple[float, float]:
    """How large the photo is looked at: shares of its width and of its height."""
    return photo.image.shape[1] / photo.size[0], photo.image.shape[0] / photo.size[1]


def _doubt(photo: Photo, name: str, mask: Mask) -> Iterator[Note]:
    """A word about a mask that is hardly right."""
    share = float((mask > 127).mean())
    if not _LEAST <= share <= _MOST:
        yield Note(f"{mask_file(photo, name)} covers {share:.0%} of the photo. Look whether it is right.")


def cut_by_marks(segmenter: Segmenter, marking: Marking) -> Mask:
    """The mask (height, width) of what is marked in the picture that `segmenter` looks at. A line counts as clicks
    along it. StudioError when nothing is found there."""
    on = [*marking.clicks, *(point for line in marking.lines for point in along(line, _ALONG))]
    return segmenter.click([*on, *marking.away], [True] * len(on) + [False] * len(marking.away), marking.box)


def along(line: Sequence[Point], count: int) -> list[Point]:
    """`count` points (x, y) spread evenly over a line through two or more points."""
    steps = np.hypot(*np.diff(np.array(line, float), axis=0).T)
    reached = np.concatenate([[0.0], np.cumsum(steps)])
    at = np.linspace(0, reached[-1], count)
    xs, ys = (np.interp(at, reached, values) for values in zip(*line, strict=True))
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]


def whole(mask: Mask, photo: Photo) -> Mask:
    """A mask of the photo as it is looked at, as large as the whole photo (height, width)."""
    if mask.shape == photo.size[::-1]:
        return mask
    large = Image.fromarray(mask).resize(photo.size, Image.Resampling.BILINEAR)
    return np.where(np.asarray(large) > 127, 255, 0).astype(np.uint8)
