"""The judge: finds the toys in a picture and says what they are. Truth to measure with, never a training signal."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.errors import StudioError
from pipelines.toybox.scenes import PROPS, SIZE
from pipelines.toybox.toys import ACCENTS
from pipelines.toybox.words import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS

WEIGHTS = Path(__file__).parents[2] / "assets" / "toybox" / "judge.safetensors"
STRIDE, CROP, IDENTITY = 4, 32, 64
MARGIN = 0.08  # of the box, kept around a crop
# what is read off one toy's crop -> its possible answers
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES,
    "color": tuple(COLORS),
    "second": tuple(COLORS),
    "pattern": PATTERNS,
    "accent": ACCENTS,
    "accent_color": ("none", *COLORS),
}


@dataclass(frozen=True)
class Found:
    """One toy in a picture. `box` = x0, y0, x1, y1 in the picture's pixels; `identity` has unit length."""

    category: str
    colors: tuple[str, str]
    pattern: str
    box: tuple[int, int, int, int]
    score: float
    scores: dict[str, float]  # probability of each answer
    identity: NDArray[np.float32]  # (64,)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture."""

    background: str
    background_score: float
    toys: tuple[Found, ...]
    props: tuple[tuple[str, float], ...] = field(default=())

    @property
    def surest(self) -> Found | None:
        """The toy that the judge is surest of."""
        return max(self.toys, key=lambda toy: toy.score, default=None)

    def to_json(self, file: str) -> dict[str, Any]:
        """One entry of the same shape as truth.json's, with scores."""
        toys = [
            {
                "subject_seed": None,
                "category": toy.category,
                "colors": list(toy.colors),
                "pattern": toy.pattern,
                "box": list(toy.box),
                "mask": None,
                "score": round(toy.score, 4),
                "scores": {name: round(value, 4) for name, value in toy.scores.items()},
                "identity": [round(float(v), 5) for v in toy.identity],
            }
            for toy in self.toys
        ]
        return {
            "file": file,
            "mask": None,
            "caption": None,
            "background": self.background,
            "background_score": round(self.background_score, 4),
            "props": [{"kind": kind, "score": round(score, 4)} for kind, score in self.props],
            "toys": toys,
        }


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(8, outside), nn.SiLU(inplace=True))


class Finder(nn.Module):
    """Centres, boxes and kind of everything that stands in a picture, and its background."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 24, 2), _block(24, 48, 2), _block(48, 96), _block(96, 96))
        self.wide = nn.Sequential(_block(96, 128, 2), _block(128, 128), _block(128, 128))
        self.join = _block(96 + 128, 96)
        self.centre = nn.Conv2d(96, 1 + len(PROPS), 1)  # toy, then each kind of prop
        self.box = nn.Conv2d(96, 4, 1)  # distances from the cell to left, top, right, bottom, in cells
        self.background = nn.Linear(128, len(BACKGROUNDS))
        nn.init.constant_(self.centre.bias, -4.0)  # type: ignore[arg-type]

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 3, 64, 64) in [-1, 1] -> centre logits (n, 5, 16, 16), boxes (n, 4, 16, 16), backgrounds (n, 9)."""
        fine = self.stem(pictures)
        wide = self.wide(fine)
        joined = self.join(torch.cat([fine, F.interpolate(wide, scale_factor=2.0, mode="nearest")], 1))
        return self.centre(joined), F.softplus(self.box(joined)), self.background(wide.mean((2, 3)))


class Reader(nn.Module):
    """Attributes and identity of one toy from its crop."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(3, 32), _block(32, 64, 2), _block(64, 96, 2), _block(96, 128, 2))
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(128 * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(answers)) for name, answers in ATTRIBUTES.items()})
        self.identity = nn.Linear(256, IDENTITY)

    def forward(self, crops: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(n, 3, 32, 32) -> logits of each attribute, identities (n, 64) of unit length."""
        mixed = self.mix(self.body(crops))
        return {name: head(mixed) for name, head in self.heads.items()}, F.normalize(self.identity(mixed), dim=-1)


class Judge(nn.Module):
    """Finder and Reader together."""

    def __init__(self) -> None:
        super().__init__()
        self.finder, self.reader = Finder(), Reader()


def crop(picture: Tensor, box: tuple[float, float, float, float] | list[float]) -> Tensor:
    """(3, h, w) and a box in pixels -> (3, 32, 32): a square around the box, resampled, edges repeated."""
    x0, y0, x1, y1 = (float(v) for v in box)
    half = max(x1 - x0, y1 - y0, 2.0) / 2 * (1 + 2 * MARGIN)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    height, width = picture.shape[-2:]
    line = (torch.arange(CROP) + 0.5) / CROP * 2 - 1
    grid_x = (x + line * half) / width * 2 - 1
    grid_y = (y + line * half) / height * 2 - 1
    grid = torch.stack(torch.meshgrid(grid_y, grid_x, indexing="ij")[::-1], -1)
    return F.grid_sample(picture[None], grid[None], padding_mode="border", align_corners=False)[0]


def _peaks(centres: Tensor, threshold: float) -> list[tuple[float, int, int]]:
    """(score, row, column) of local maxima of one (h, w) map of probabilities, best first."""
    top = F.max_pool2d(centres[None, None], 3, 1, 1)[0, 0]
    rows, columns = torch.nonzero((centres == top) & (centres > threshold), as_tuple=True)
    found = [(float(centres[r, c]), int(r), int(c)) for r, c in zip(rows, columns, strict=True)]
    return sorted(found, reverse=True)


def boxes_of(centre: Tensor, box: Tensor, threshold: float = 0.35) -> list[tuple[float, list[float]]]:
    """(score, box in pixels of the 64 px picture) from one picture's toy map (16, 16) and box map (4, 16, 16)."""
    out = []
    for score, r, c in _peaks(centre.sigmoid(), threshold):
        left, top, right, bottom = (float(v) for v in box[:, r, c])
        edges = [c + 0.5 - left, r + 0.5 - top, c + 0.5 + right, r + 0.5 + bottom]
        out.append((score, [min(max(v * STRIDE, 0.0), float(SIZE)) for v in edges]))
    return out


@lru_cache(maxsize=2)
def load_judge(path: Path = WEIGHTS) -> Judge:
    """The shipped judge. StudioError when its weights are missing."""
    if not path.exists():
        raise StudioError("The Toybox judge is missing. Run: python -m pipelines toybox build")
    judge = Judge().eval()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge


@torch.no_grad()
def look(pictures: list[NDArray[np.uint8]], judge: Judge | None = None) -> list[Verdict]:
    """Judges pictures (height, width, 3) uint8 of any size; other sizes than 64 px are resampled for finding."""
    judge = judge or load_judge()
    full = [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures]
    small = torch.stack([F.interpolate(p[None], (SIZE, SIZE), mode="area")[0] for p in full])
    centres, boxes, backgrounds = judge.finder(small)
    verdicts = []
    for i, picture in enumerate(full):
        scale = picture.shape[2] / SIZE, picture.shape[1] / SIZE
        found = boxes_of(centres[i, 0], boxes[i])
        props = [(kind, float(centres[i, 1 + k].sigmoid().max())) for k, kind in enumerate(PROPS)]
        chance = backgrounds[i].softmax(0)
        verdicts.append(
            Verdict(
                background=list(BACKGROUNDS)[int(chance.argmax())],
                background_score=float(chance.max()),
                toys=_read(judge.reader, picture, found, scale),
                props=tuple((kind, score) for kind, score in props if score > 0.35),
            )
        )
    return verdicts


def _read(
    reader: Reader, picture: Tensor, found: list[tuple[float, list[float]]], scale: tuple[float, float]
) -> tuple[Found, ...]:
    if not found:
        return ()
    boxes = [[b[0] * scale[0], b[1] * scale[1], b[2] * scale[0], b[3] * scale[1]] for _, b in found]
    answers, identities = reader(torch.stack([crop(picture, box) for box in boxes]))
    out = []
    for i, ((score, _), box) in enumerate(zip(found, boxes, strict=True)):
        chances = {name: logits[i].softmax(0) for name, logits in answers.items()}
        said = {name: ATTRIBUTES[name][int(chance.argmax())] for name, chance in chances.items()}
        out.append(
            Found(
                category=said["category"],
                colors=(said["color"], said["second"]),
                pattern=said["pattern"],
                box=(round(box[0]), round(box[1]), round(box[2]), round(box[3])),
                score=score,
                scores={name: float(chance.max()) for name, chance in chances.items()},
                identity=identities[i].numpy(),
            )
        )
    return tuple(out)
