"""How well a concept is learned: Textual Inversion's protocol, with what later work measures beside it.

    identity   mean over pictures x photos of cos(CLIP picture, CLIP photo)        (Gal et al. 2023, section 5)
    text       mean over pictures of cos(CLIP picture, CLIP prompt)
               "bare": the prompt without the subject; "named": with its category in the subject's place
    dino       as identity, by a DINO (DreamBooth, section 4.2), where one is given

Each is measured for every picture, then averaged over a prompt's pictures, then over the prompts. "masked" repeats the
identities on what the masks leave of both sides, cut to the subject's square, so that a likeness of backgrounds doesn't
count (as CoRe does). Leaving a subject out raises "bare" text: read the figures together, never one alone.
The published protocol takes 64 pictures a prompt, 50 DDIM steps and a guidance of 5, AttnDreamBooth 32 pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError
from pipelines.evaluate.masked import photos_of, subject_of, with_found_masks
from pipelines.evaluate.prompts import with_subject, without_subject
from pipelines.events import Event, Finished, Progress, Snapshot
from pipelines.request import usual_guidance

if TYPE_CHECKING:
    from pipelines.concept import Concept, Subject, Trained
    from pipelines.evaluate.encoders import Features
    from pipelines.events import Picture
    from pipelines.model import Model
    from pipelines.photos import Mask, Photo

STAGE = "evaluate"
Values = NDArray[np.float64]  # one number a picture


class Look(Protocol):
    """What compares pictures."""

    name: str

    @property
    def blank(self) -> tuple[int, int, int]: ...

    def pictures(self, pictures: Sequence[Picture]) -> Features: ...


class LookAndRead(Look, Protocol):
    """What compares pictures with texts as well."""

    def texts(self, texts: Sequence[str]) -> Features: ...


@dataclass(frozen=True)
class Wish:
    """What to measure. `images` pictures a prompt, seeds from `seed` on, the same for every concept."""

    prompts: tuple[str, ...]
    images: int = 8
    steps: int = 50
    guidance: float | None = None  # None: what suits the base
    scheduler: str = "ddim"
    seed: int = 0
    size: int = 0  # pixels, 0 = the base's own
    masked: bool = False
    subject: str = ""  # of a concept with several; "" = the first

    def check(self) -> None:
        """StudioError for anything that can't be measured."""
        if not self.prompts:
            raise StudioError("There are no prompts to evaluate. Write at least one, with {} for the subject.")
        for prompt in self.prompts:
            if prompt.count("{}") != 1:
                raise StudioError(f"The prompt '{prompt[:80]}' needs {{}} once, where the subject goes.")
        if not 1 <= self.images <= 1000:
            raise StudioError(f"{self.images} pictures a prompt can't be painted. Choose 1 to 1000.")


@dataclass(frozen=True)
class Shown:
    """The pictures of one prompt, and each one's mask of the subject where there is one."""

    prompt: str  # with {}
    pictures: tuple[Picture, ...]
    masks: tuple[Mask | None, ...] = ()


@dataclass(frozen=True)
class Measured:
    """The pictures of one prompt with their numbers: measure -> one a picture (NaN where it couldn't be taken)."""

    prompt: str
    values: dict[str, Values]
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """One concept's numbers, and what they were measured with."""

    name: str
    noun: str
    method: str
    looks: dict[str, str]  # "clip", "dino" -> which
    rows: tuple[Measured, ...]
    photos: tuple[Picture, ...] = ()
    settings: dict[str, object] = field(default_factory=dict)
    subject: str = ""  # its <token>

    @property
    def measures(self) -> list[str]:
        """The names of the numbers, in order."""
        return list(self.rows[0].values) if self.rows else []


def evaluate(
    model: Model,
    concept: tuple[Trained, float],
    photos: Sequence[Photo],
    wish: Wish,
    clip: LookAndRead,
    dino: Look | None = None,
) -> Iterator[Event]:
    """Paint `wish.images` pictures of each prompt with the concept, and measure them.

    Yields Progress, a Snapshot("picture") with info {"prompt", "seed"} for each picture, and Finished(Evaluation).
    StudioError for a concept of another base, no photos, or prompts that can't be painted.
    """
    wish.check()
    trained, strength = concept
    subject, notes = subject_of(trained.concept, wish.subject)
    yield from notes
    photos = photos_of(photos, subject)
    shown: list[Shown] = []
    for number, prompt in enumerate(wish.prompts):
        pictures = []
        for event in _painted(model, concept, with_subject(prompt, subject.token), wish):
            pictures.append(event.image)
            yield replace(event, info=event.info | {"prompt": prompt})
            yield Progress(STAGE, number * wish.images + len(pictures), len(wish.prompts) * wish.images)
        shown.append(Shown(prompt, tuple(picture for picture in pictures if picture is not None)))
    if wish.masked:
        photos, shown = yield from with_found_masks(model, photos, shown, subject.noun)
    settings: dict[str, object] = {
        "strength": strength,
        "images": wish.images,
        "steps": wish.steps,
        "guidance": usual_guidance(model.kind) if wish.guidance is None else wish.guidance,
    }
    settings |= {"scheduler": wish.scheduler, "seed": wish.seed, "base": model.id}
    yield Finished(_evaluation((trained.concept, subject), shown, photos, (clip, dino), settings))


def evaluate_painted(
    trained: Trained,
    photos: Sequence[Photo],
    shown: Sequence[Shown],
    clip: LookAndRead,
    dino: Look | None = None,
    *,
    masker: Model | None = None,
    subject: str = "",
) -> Iterator[Event]:
    """`evaluate` for pictures of the subject that were painted before (see `read_shown`); ends with
    Finished(Evaluation).

    With `masker`, a base without anything attached, masks that nobody painted are found, and the masked measures taken;
    without it they are taken where all photos have masks. StudioError without photos.
    """
    whom, notes = subject_of(trained.concept, subject)
    yield from notes
    photos, pictures = photos_of(photos, whom), list(shown)
    if masker is not None:
        photos, pictures = yield from with_found_masks(masker, photos, pictures, whom.noun)
    settings: dict[str, object] = {"pictures": sum(len(one.pictures) for one in pictures), "painted": "before"}
    yield Finished(_evaluation((trained.concept, whom), pictures, photos, (clip, dino), settings))


def _evaluation(
    who: tuple[Concept, Subject],
    shown: Sequence[Shown],
    photos: Sequence[Photo],
    eyes: tuple[LookAndRead, Look | None],
    settings: dict[str, object],
) -> Evaluation:
    (concept, subject), (clip, dino) = who, eyes
    looks = {"clip": clip.name} | ({"dino": dino.name} if dino else {})
    images = tuple(photo.image for photo in photos)
    rows = measure(shown, photos, subject.noun, clip, dino)
    return Evaluation(concept.name, subject.noun, concept.method, looks, rows, images, settings, subject.token)


def measure(
    shown: Sequence[Shown],
    photos: Sequence[Photo],
    noun: str,
    clip: LookAndRead,
    dino: Look | None = None,
) -> tuple[Measured, ...]:
    """The numbers of pictures that are there already: identity, text_bare, text_named, dino, and their masked kin.

    Masked ones are measured when every photo has a mask and any picture has; a picture without its own gives NaN, and a
    photo whose mask is empty (the subject wasn't found in it) is compared whole alone.
    """
    masks = [subject_mask(photo) for photo in photos]
    looks: dict[str, Look] = {"identity": clip} | ({"dino": dino} if dino else {})
    whole = {key: look.pictures([photo.image for photo in photos]) for key, look in looks.items()}
    cut: dict[str, Features] = {}
    if all(mask is not None for mask in masks) and any(mask is not None for one in shown for mask in one.masks):
        pairs = [(photo.image, mask) for photo, mask in zip(photos, masks, strict=True) if _marks(mask)]
        cut = (
            {}
            if not pairs
            else {key: look.pictures([alone(*pair, look.blank) for pair in pairs]) for key, look in looks.items()}
        )
    found = []
    for one in shown:
        seen = clip.pictures(one.pictures)
        bare, named = clip.texts([without_subject(one.prompt), with_subject(one.prompt, noun)])
        values: dict[str, Values] = {"identity": _against(seen, whole["identity"])}
        values |= {"text_bare": _against(seen, bare[None]), "text_named": _against(seen, named[None])}
        if dino is not None:
            values["dino"] = _against(dino.pictures(one.pictures), whole["dino"])
        values |= {f"{key}_masked": _masked_values(one, looks[key], reference) for key, reference in cut.items()}
        found.append(Measured(one.prompt, values, one.pictures))
    return tuple(found)


def subject_mask(photo: Photo) -> Mask | None:
    """All masks of a photo as one."""
    return np.maximum.reduce(list(photo.masks.values())) if photo.masks else None


def alone(picture: Picture, mask: Mask, blank: tuple[int, int, int]) -> Picture:
    """The masked part on a square of `blank`, cut to its box. A mask of another size is fitted; an empty one leaves
    nothing but `blank`."""
    from PIL import Image

    if mask.shape != picture.shape[:2]:
        mask = np.asarray(Image.fromarray(mask).resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
    inside = mask > 127
    if not inside.any():
        return np.full((2, 2, 3), blank, np.uint8)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    place = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    only = np.where(inside[place][..., None], picture[place], np.array(blank, np.uint8))
    height, width = only.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), blank, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = only
    return square


def _marks(mask: Mask | None) -> TypeGuard[Mask]:
    """Whether there is a mask, and anything in it."""
    return mask is not None and bool((mask > 127).any())


def _against(seen: Features, others: Features) -> Values:
    """Each picture's mean cosine with all of `others`."""
    return (seen.astype(np.float64) @ others.astype(np.float64).T).mean(1)


def _masked_values(one: Shown, look: Look, reference: Features) -> Values:
    values = np.full(len(one.pictures), np.nan)
    places = [place for place, mask in enumerate(one.masks) if _marks(mask)]
    if places:
        parts = [alone(one.pictures[place], one.masks[place], look.blank) for place in places]  # type: ignore[arg-type]
        values[places] = _against(look.pictures(parts), reference)
    return values


def _painted(model: Model, concept: tuple[Trained, float], prompt: str, wish: Wish) -> Iterator[Snapshot]:
    from pipelines.generate import Request, generate

    request = Request(
        prompt,
        seeds=tuple(range(wish.seed, wish.seed + wish.images)),
        steps=wish.steps,
        guidance=wish.guidance,
        scheduler=wish.scheduler,
        width=wish.size,
        height=wish.size,
        preview_every=0,
    )
    events = generate(model, request, concepts=[concept])
    return (event for event in events if isinstance(event, Snapshot) and event.image is not None)
