"""Eyes: what finds things in a picture and says how alike they look. Toybox's judge, or models for real photos.

For photos: OWLv2 as the detector, DINOv2 or DreamSim as the embedder, as MuDI's released code has them (there
google/owlv2-base-patch16-ensemble at threshold 0.4, facebook/dinov2-base). Any two models of these kinds will do, by
Hub id or folder; only safetensors are read and no code of theirs is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError
from pipelines.evaluate.encoders import loaded
from pipelines.evaluate.sights import Box, Sight, apart

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.events import Picture
    from pipelines.toybox.judge import Judge

View = tuple["Picture", Box | None]  # a picture, and the part of it that is meant; None = as a photo of its subject
Features = NDArray[np.float32]

DREAMSIM = "dreamsim"  # the embedder of that package, where it is installed


class Eyes(Protocol):
    """A detector and an embedder."""

    name: str  # what a result is said to be measured with

    def find(self, picture: Picture, queries: Sequence[str]) -> list[Box]:
        """Everything in the picture that is one of `queries`, in any order."""
        ...

    def embed(self, views: Sequence[View]) -> Features:
        """What the views look like, (views, width); their cosines say how alike they are."""
        ...


class Detector(Protocol):
    """One half of a pair of eyes."""

    name: str

    def find(self, picture: Picture, queries: Sequence[str]) -> list[Box]: ...

    def spot(self, picture: Picture, queries: Sequence[str]) -> list[Sight]:
        """Each thing once, by the query that fits it best, the surest first; what fits none is left out."""
        ...


class Embedder(Protocol):
    """The other half."""

    name: str

    def embed(self, views: Sequence[View]) -> Features: ...


@dataclass
class Pair:
    """A detector and an embedder as eyes."""

    detector: Detector
    embedder: Embedder
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.detector.name} + {self.embedder.name}"

    def find(self, picture: Picture, queries: Sequence[str]) -> list[Box]:
        return self.detector.find(picture, queries)

    def embed(self, views: Sequence[View]) -> Features:
        return self.embedder.embed(views)


@dataclass
class ToyboxEyes:
    """The judge of the embedded world: finds every toy, whatever it is asked for, and knows identities."""

    judge: Judge | None = None
    name: str = "Toybox's judge"

    def find(self, picture: Picture, queries: Sequence[str]) -> list[Box]:
        return [_floats(toy.box) for toy in self._look(picture)]

    def spot(self, picture: Picture, queries: Sequence[str]) -> list[Sight]:
        """A toy answers to the query that names its category; among several, to the one that says more of it."""
        found = []
        for toy in self._look(picture):
            known = {toy.category, toy.colors[0], toy.pattern}
            said = [set(query.casefold().split()) for query in queries]
            fits = [len(words & known) if toy.category in words else 0 for words in said]
            if max(fits, default=0):
                score = float(toy.score) * toy.scores.get("category", 1.0)
                found.append(Sight(_floats(toy.box), score, fits.index(max(fits))))
        return apart(found)

    def embed(self, views: Sequence[View]) -> Features:
        """A view without a box is a photo of its best toy; one without any toy is like nothing (zeros)."""
        import torch

        from pipelines.toybox.judge import IDENTITY, crop, load_judge

        judge, rows = self.judge or load_judge(), []
        for picture, wanted in views:
            box = wanted or self._best(picture)
            if box is None:
                rows.append(np.zeros(IDENTITY, np.float32))
                continue
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
            with torch.no_grad():
                rows.append(judge.reader(crop(pixels, box)[None])[1][0].numpy())
        return np.stack(rows)

    def _best(self, picture: Picture) -> Box | None:
        best = max(self._look(picture), key=lambda toy: toy.score, default=None)
        return _floats(best.box) if best else None

    def _look(self, picture: Picture) -> Sequence[Any]:
        from pipelines.toybox.judge import look

        return look([picture], self.judge)[0].toys


@dataclass
class Owl:
    """OWLv2 (Minderer et al. 2023) as the detector, by Hub id or folder. Boxes of all queries count, unsuppressed."""

    where: str
    threshold: float = 0.4
    device: str = "cpu"
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.name = self.where

    def find(self, picture: Picture, queries: Sequence[str]) -> list[Box]:
        return [sight.box for sight in self._all(picture, queries)]

    def spot(self, picture: Picture, queries: Sequence[str]) -> list[Sight]:
        return apart(self._all(picture, queries))

    def _all(self, picture: Picture, queries: Sequence[str]) -> list[Sight]:
        """Boxes clipped to the picture. The processor pads it to a square, and scales its boxes by that side."""
        import torch

        processor, model = self._parts
        height, width = picture.shape[:2]
        inputs = processor(text=[list(queries)], images=[np.array(picture)], return_tensors="pt").to(self.device)
        with torch.no_grad():
            seen = model(**inputs)
        (found,) = processor.post_process_grounded_object_detection(
            seen, threshold=self.threshold, target_sizes=[(height, width)]
        )
        rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
        clipped = [
            Sight((max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)), score, query)
            for (x0, y0, x1, y1), score, query in rows
        ]
        return [one for one in clipped if one.box[2] - one.box[0] >= 1 and one.box[3] - one.box[1] >= 1]

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        return loaded(Owlv2Processor, self.where), _model(Owlv2ForObjectDetection, self.where, self.device)


@dataclass
class Dino:
    """DINOv2 (Oquab et al. 2023) as the embedder, by Hub id or folder: the mean of all its last tokens, as in MuDI.

    A box is cut out and set on a white square first.
    """

    where: str
    device: str = "cpu"
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.name = self.where

    def embed(self, views: Sequence[View]) -> Features:
        import torch

        processor, model = self._parts
        rows = []
        for picture, box in views:
            inputs = processor(images=squared(picture, box), return_tensors="pt").to(self.device)
            with torch.no_grad():
                tokens: Tensor = model(**inputs).last_hidden_state  # (1, tokens, width)
            rows.append(tokens.mean(dim=1)[0].float().cpu().numpy())
        return np.stack(rows)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModel

        return loaded(AutoImageProcessor, self.where), _model(AutoModel, self.where, self.device)


@dataclass
class DreamSim:
    """DreamSim (Fu et al. 2023), the paper's own embedder, where its package is installed."""

    device: str = "cpu"
    name: str = DREAMSIM

    def embed(self, views: Sequence[View]) -> Features:
        import torch
        from PIL import Image

        model, prepare = self._parts
        with torch.no_grad():
            rows = [
                model.embed(prepare(Image.fromarray(squared(*view))).to(self.device))[0].cpu().numpy() for view in views
            ]
        return np.stack(rows)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        try:
            from dreamsim import dreamsim
        except ImportError as error:
            raise StudioError(
                "DreamSim is not installed. Run 'pip install dreamsim', or name a DINOv2 model instead."
            ) from error
        parts: tuple[Any, Any] = dreamsim(pretrained=True, device=self.device)
        return parts


def eyes(detector: str = "toybox", embedder: str = "", *, threshold: float = 0.4, device: str = "cpu") -> Eyes:
    """Eyes by name: "toybox", or an OWLv2 model with a DINOv2 model or "dreamsim", by Hub id or folder.

    StudioError when one of the two is missing; a model that can't be loaded says so when it is first used.
    """
    if detector == "toybox":
        if embedder:
            raise StudioError(f"Toybox's judge both finds and compares. Leave out '{embedder}', or name a detector.")
        return ToyboxEyes()
    if not embedder:
        raise StudioError(f"'{detector}' only finds things. Name what compares them: a DINOv2 model, or '{DREAMSIM}'.")
    seer: Embedder = DreamSim(device) if embedder == DREAMSIM else Dino(embedder, device)
    return Pair(Owl(detector, threshold, device), seer)


def detector(where: str = "toybox", *, threshold: float = 0.2, device: str = "cpu") -> Detector:
    """What finds things, by name: "toybox", or an OWLv2 model by Hub id or folder."""
    return ToyboxEyes() if where == "toybox" else Owl(where, threshold, device)


def squared(picture: Picture, box: Box | None) -> Picture:
    """A box of a picture in the middle of a white square; the whole picture as it is where there is no box."""
    if box is None:
        return np.array(picture)
    left, top, right, bottom = (round(value) for value in box)
    cut = picture[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)]
    height, width = cut.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = cut
    return square


def _floats(box: Sequence[float]) -> Box:
    left, top, right, bottom = (float(value) for value in box)
    return left, top, right, bottom


def _model(kind: Any, where: str, device: str) -> Any:
    return loaded(kind, where, use_safetensors=True).to(device).eval()
