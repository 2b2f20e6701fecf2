"""How good learned concepts are: is a picture for another background the own subject, and is that background there?

Five photos of an unseen subject on one background; afterwards pictures on other backgrounds. A picture counts as the
own subject when the judge's identity of its best toy is nearest to the own photos among ten subjects of its category.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.events import Event, Finished, Progress
from pipelines.toybox.evaluation import paint
from pipelines.toybox.judge import Verdict, look
from pipelines.toybox.photos import Shoot, shoot, write_photos
from pipelines.toybox.scenes import stream, subject
from pipelines.toybox.words import BACKGROUNDS

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.model import Model
    from pipelines.params import TrainParams

RIVALS, PHOTOS, PLACES, SEEDS = 9, 5, 4, 2
Images = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Trial:
    """What to learn and how. `subjects` are subject seeds; tuning and reporting use different ones."""

    method: str
    subjects: tuple[int, ...]
    params: TrainParams
    masks: bool = False
    photo_background: str | None = None  # None: each subject's own, from its seed


@dataclass
class Score:
    """One subject's pictures: how many show it, how many the asked background, the mean likeness to its photos."""

    subject_seed: int
    category: str
    own: float
    background: float
    likeness: float
    seconds: float = 0.0
    base: dict[str, float] = field(default_factory=dict)


def identity(verdict: Verdict) -> NDArray[np.float32]:
    """The best found toy's identity; zeros where there is none."""
    best = verdict.surest
    return best.identity if best else np.zeros(64, np.float32)


def portrait_identity(seed: int, category: str, background: str | None) -> NDArray[np.float32]:
    """The mean identity in PHOTOS photos of a subject, unit length."""
    photos = shoot(Shoot((seed,), PHOTOS, background, category))
    mean = np.mean([identity(v) for v in look([p.image for p in photos])], axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-9)


def measure(images: Images, asked: Sequence[str], known: NDArray[np.float32]) -> dict[str, float]:
    """`known`: identities (1 + rivals, 64), the own one first; `asked`: background of each picture."""
    seen = look(images)
    likeness = np.stack([identity(verdict) for verdict in seen]) @ known.T
    found = np.array([bool(verdict.toys) for verdict in seen])
    return {
        "own": float(np.mean((likeness.argmax(1) == 0) & found)),
        "background": float(np.mean([v.background == b for v, b in zip(seen, asked, strict=True)])),
        "likeness": float(likeness[:, 0].mean()),
    }


def lineup(seed: int, category: str, background: str | None) -> NDArray[np.float32]:
    """(1 + RIVALS, 64): the identity in a subject's photos, then in those of others of its category."""
    rivals = [portrait_identity(1_000_000 + 100 * seed + i, category, None) for i in range(RIVALS)]
    return np.stack([portrait_identity(seed, category, background), *rivals])


def learn(model: Model, workspace: Path, **wish: Any) -> Trained:
    """What `train_concept(**wish)` makes in a throwaway workspace, its events unseen."""
    from pipelines.runs import train_concept
    from pipelines.workspace import Workspace

    (trained,) = [e.value for e in train_concept(Workspace(workspace), model, **wish) if isinstance(e, Finished)]
    result: Trained = trained
    return result


def score_subject(model: Model, trial: Trial, seed: int) -> Score:
    """Photograph, learn, paint on other backgrounds, judge; the base's own try with the bare noun beside it."""
    draw = stream("photo", seed, 2_000_003)
    order = [str(b) for b in draw.permutation([b for b in BACKGROUNDS if b != "simple"])]
    home = trial.photo_background or order[0]
    places = [b for b in order if b != home][:PLACES]
    noun = subject(seed).category
    known = lineup(seed, noun, home)
    prompts = [(f"a photo of {{}} {BACKGROUNDS[b]}", b) for b in places]
    asked = [b for _, b in prompts for _ in range(SEEDS)]
    seeds = tuple(range(100, 100 + SEEDS))
    base = [image for text, _ in prompts for image in paint(model, text.replace("{}", f"a {noun}"), seeds)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_photos(shoot(Shoot((seed,), PHOTOS, home)), photos)
        wish = {"method": trial.method, "params": trial.params, "masks": trial.masks, "seed": seed}
        trained = learn(model, Path(folder) / "workspace", photos=photos, noun=noun, name="it", **wish)
    seconds = time.monotonic() - began
    concepts = [(trained, 1.0)]
    images = [image for text, _ in prompts for image in paint(model, text.replace("{}", "a <it>"), seeds, concepts)]
    result = measure(images, asked, known)
    return Score(seed, noun, **result, seconds=seconds, base=measure(base, asked, known))


def concept_quality(model: Model, trial: Trial) -> Iterator[Event]:
    """Score every subject; ends with Finished({"method", "n", "own", "background", ..., "base", "subjects"})."""
    scores: list[Score] = []
    for number, seed in enumerate(trial.subjects, start=1):
        scores.append(score_subject(model, trial, seed))
        last = scores[-1]
        values = {"own": last.own, "background": last.background, "seconds": last.seconds}
        yield Progress(f"{trial.method} {last.category}", number, len(trial.subjects), values)
    mean = {name: round(float(np.mean([getattr(s, name) for s in scores])), 4) for name in ("own", "background")}
    mean["likeness"] = round(float(np.mean([s.likeness for s in scores])), 4)
    mean["seconds"] = round(float(np.mean([s.seconds for s in scores])), 1)
    base = {name: round(float(np.mean([s.base[name] for s in scores])), 4) for name in scores[0].base}
    subjects = [vars(score) for score in scores]
    yield Finished({"method": trial.method, "n": len(scores), **mean, "base": base, "subjects": subjects})
