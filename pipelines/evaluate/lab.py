"""Where claims are measured: photos of Toybox's subjects, concepts learned once for all claims, pictures, and sight."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.concept import Concept, Trained
from pipelines.events import Snapshot
from pipelines.files import json_bytes, save_tensors
from pipelines.intake import load_tensors
from pipelines.toybox.judge import Found, Verdict, look
from pipelines.toybox.photos import Shoot, shoot, write_photos
from pipelines.toybox.quality import learn, lineup
from pipelines.toybox.scenes import subject

if TYPE_CHECKING:
    from pipelines.events import Picture
    from pipelines.layout import Layout
    from pipelines.model import Model
    from pipelines.params import TrainParams
    from pipelines.request import Request
    from pipelines.start_noise import Start

BATCH = 8
QUICK = 0.5  # of the steps are taken in a quick run
STEPS = ("steps", "embedding_steps", "attention_steps", "shift_steps", "split_steps")
LETTERS = "abcdefgh"  # names of what is learned
Maps = NDArray[np.float32]
Masks = Literal["none", "found", "true"]


@dataclass(frozen=True)
class Lesson:
    """What is learned: photos by photos, one shoot for each subject or one of all; `masks` are none, those that
    attention finds, or the true ones. The subjects' names are a, b, c ... in the order of the seeds."""

    method: str
    shoots: tuple[Shoot, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    masks: Masks = "none"
    first: int = 0  # of the names: 0 = <a>, 1 = <b> ...
    described: bool = False  # whether a subject's noun says its main colour too: "pink car", MuDI's descriptive class

    @property
    def seeds(self) -> tuple[int, ...]:
        """The subjects, in the order of their names."""
        return tuple(seed for one in self.shoots for seed in one.seeds)

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called."""
        return tuple(LETTERS[self.first + number] for number in range(len(self.seeds)))


@dataclass
class Lab:
    """One base, one folder, and what has been learned so far. `say` gets a sentence before long work.

    `shorter` are settings over all others and `steps` those of each picture, for a walk through everything.
    """

    model: Model
    folder: Path
    quick: bool = False
    say: Callable[[str], None] = lambda text: None
    shorter: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 25

    def params(self, lesson: Lesson) -> TrainParams:
        """The method's preset for this base, with the lesson's settings; nothing is written on the way."""
        from pipelines.preset import load_preset
        from pipelines.settings import validated

        chosen = load_preset(lesson.method, None, self.model.kind)
        quiet = {"sample_every": 0, "checkpoint_every": 0, "masked_loss": chosen.masked_loss or lesson.masks != "none"}
        wanted = chosen.model_dump() | quiet | dict(lesson.settings)
        if self.quick:
            wanted |= {key: max(1, round(QUICK * wanted[key])) for key in wanted if key in STEPS and wanted[key]}
        shorter = {key: value for key, value in self.shorter.items() if key in type(chosen).model_fields}
        return validated(type(chosen), wanted | shorter)

    def learned(self, lesson: Lesson) -> Trained:
        """The concept, trained now or kept from before: claims share what they learn."""
        params = self.params(lesson)
        key = json_bytes([asdict(lesson), params.model_dump(mode="json"), self.model.fingerprint])
        path = self.folder / "concepts" / f"{lesson.method}-{hashlib.sha256(key).hexdigest()[:20]}.safetensors"
        if path.is_file():
            tensors, about = load_tensors(path)
            return Trained(Concept.from_json(json.loads(about["concept"])), tensors)
        self.say(f"learning {lesson.method} {' '.join(map(str, lesson.seeds))}")
        trained = self._trained(lesson, params)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, trained.tensors, {"concept": json.dumps(trained.concept.to_json())})
        return trained

    def _trained(self, lesson: Lesson, params: TrainParams) -> Trained:
        toys = [toy for one in lesson.shoots for toy in toys_of(one)]
        nouns = [f"{toy.colors[0]} {toy.category}" if lesson.described else toy.category for toy in toys]
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            folders = [_photos(one, Path(place) / f"photos-{i}", lesson) for i, one in enumerate(lesson.shoots)]
            wish: dict[str, Any] = {"photos": folders, "noun": nouns, "name": lesson.names, "params": params}
            return learn(self.model, Path(place) / "workspace", method=lesson.method, seed=0, **wish)

    def paint(
        self, request: Request, concepts: Sequence[Trained] = (), start: Start | None = None, probes: Sequence[Any] = ()
    ) -> list[Picture]:
        """The request's pictures, a few at a time."""
        from pipelines.generate import generate

        wish = replace(request, batch=min(BATCH, len(request.seeds)), preview_every=0, steps=self.steps)
        events = generate(self.model, wish, concepts=[(one, 1.0) for one in concepts], start=start, probes=probes)
        return [event.image for event in events if isinstance(event, Snapshot) and event.image is not None]

    def maps(self, request: Request, concepts: Sequence[Trained], words: Sequence[str]) -> tuple[list[Picture], Maps]:
        """The request's pictures, and the words' mean attention in each, (words, pictures, h, w), each map's sum 1."""
        from pipelines.attach import attached
        from pipelines.attention.store import AttentionStore
        from pipelines.tokens import find_word

        with attached(self.model, [(one, 1.0) for one in concepts]):
            read = self.model.tokenize(request.prompt)
            store = AttentionStore({word: find_word(read, word) for word in words}, budget_mb=0)
        pictures = self.paint(request, concepts, probes=[store])
        found = np.stack([store.maps(word) for word in words])
        return pictures, found / found.sum((2, 3), keepdims=True)

    def few(self, count: int) -> int:
        """How many pictures to paint where the whole measurement takes `count`."""
        return max(2, count // 2) if self.quick else count

    def known(self, seed: int, category: str | None = None, background: str | None = None) -> NDArray[np.float32]:
        """(1 + RIVALS, 64): the judge's identity of a subject's photos, then those of others of its category."""
        key = (seed, category, background)
        if key not in self._known:
            self._known[key] = lineup(seed, category or subject(seed).category, background)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[int, str | None, str | None], NDArray[np.float32]]:
        return {}


def looks(lab: Lab, request: Request, concepts: Sequence[Trained], words: Sequence[str]) -> Picture:
    """The request's pictures with each word's attention laid over, word by word, side by side."""
    from pipelines.attention.heatmap import overlay

    pictures, maps = lab.maps(request, concepts, words)
    return strip([overlay(maps[word, row], one) for row, one in enumerate(pictures) for word in range(len(words))], 8)


def toys_of(one: Shoot) -> list[Any]:
    """The subjects of a shoot."""
    return [subject(seed, one.category) for seed in one.seeds]


def unlike(first: int, count: int) -> list[int]:
    """The first so many subjects from seed `first` on that are all of different kinds."""
    found: list[int] = []
    for seed in range(first, first + 1000):
        if subject(seed).category not in {subject(other).category for other in found}:
            found.append(seed)
    return found[:count]


def boxed(lab: Lab, boxes: Sequence[Sequence[float]], strength: float) -> Layout:
    """<a>, <b> ... each in a box (left, top, right, bottom as shares of the picture)."""
    from pipelines.layout import Area, Layout, Region

    size = lab.model.native_size
    areas = [Area.box([round(size * value) for value in box], (size, size)) for box in boxes]
    return Layout(tuple(Region(f"<{letter}>", area) for letter, area in zip(LETTERS, areas, strict=False)), strength)


def _photos(one: Shoot, folder: Path, lesson: Lesson) -> Path:
    """Photos of a shoot, with masks only where the lesson has the true ones."""
    truth = write_photos(shoot(one), folder)
    several = len(one.seeds) > 1
    for picture in truth["pictures"]:
        stem = Path(picture["file"]).stem
        for toy in picture["toys"]:
            mask = folder / toy["mask"]
            if lesson.masks != "true":
                mask.unlink()
            elif several:
                name = lesson.names[one.seeds.index(toy["subject_seed"])]
                mask.rename(folder / f"{stem}-masklabel-{name}.png")
    return folder


def likeness(verdict: Verdict, known: NDArray[np.float32]) -> NDArray[np.float32]:
    """(subjects,) cosines of the surest toy with known identities; -1 where there is no toy."""
    toy = verdict.surest
    if toy is None:
        return np.full(len(known), -1.0, np.float32)
    cosines: NDArray[np.float32] = known @ toy.identity
    return cosines


def is_own(toy: Found | None, known: NDArray[np.float32], kind: str) -> bool:
    """Whether a found toy is of the subject's kind, and more like the subject than like any of its rivals."""
    return toy is not None and toy.category == kind and int((known @ toy.identity).argmax()) == 0


def centre(toy: Found) -> tuple[float, float]:
    """x, y of a found toy."""
    x0, y0, x1, y1 = toy.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def sight(pictures: Sequence[Picture]) -> list[Verdict]:
    """What the judge sees."""
    return look(list(pictures))


def share(hits: Sequence[bool]) -> float:
    """Of how many; NaN of none."""
    return float(np.mean(hits)) if len(hits) else float("nan")


def strip(pictures: Sequence[Picture], most: int = 6) -> Picture:
    """Pictures side by side."""
    return np.concatenate(list(pictures[:most]), axis=1)


def settings(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings in a fixed order, for a Lesson."""
    return tuple(sorted(values.items()))
