"""Eyes for real photos: what the embedders take from a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.errors import StudioError
from pipelines.evaluate.eyes import Dino, DreamSim, Owl, Pair, detector, eyes, squared
from tests.test_detect_compare import tiny_dino

PICTURE = np.random.default_rng(0).integers(0, 256, (96, 100, 3), dtype=np.uint8)
BOX = (10.0, 5.0, 40.0, 25.0)


def test_dino_is_the_mean_of_all_its_last_tokens(tmp_path: Path) -> None:
    """The class token's among them, as MuDI's evaluation has it."""
    embedder = Dino(str(tiny_dino(tmp_path / "dino")))
    processor, model = embedder._parts
    for box in (None, BOX):
        with torch.no_grad():
            seen = model(**processor(images=squared(PICTURE, box), return_tensors="pt")).last_hidden_state[0]
        assert len(seen) == 1 + 16
        (look,) = embedder.embed([(PICTURE, box)])
        np.testing.assert_allclose(look, seen.numpy().mean(0), atol=1e-6)
        for other in (seen[0], seen[1:].mean(0)):  # the class token, and all others
            assert np.abs(look - other.numpy()).max() > 1e-3


class Colors(nn.Module):
    """Stands for DreamSim's network: (rows, 3, height, width) -> (rows, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def embed(self, pixels: Tensor) -> Tensor:
        return self.scale * pixels.mean((2, 3))


def prepare(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255.0


def test_a_detector_must_be_as_sure_as_in_mudi() -> None:
    both = eyes("some/owl", "some/dino")
    assert isinstance(both, Pair) and isinstance(both.detector, Owl) and both.detector.threshold == 0.4
    alone = detector("some/owl")
    assert isinstance(alone, Owl) and alone.threshold == 0.2


def test_dreamsim_sees_pictures_and_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    package = ModuleType("dreamsim")
    package.dreamsim = lambda **options: (asked.append(options), (Colors(), prepare))[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    both = eyes("some/owl", "dreamsim")
    assert isinstance(both, Pair) and isinstance(both.embedder, DreamSim) and both.name == "some/owl + dreamsim"
    looks = both.embed([(PICTURE, None), (PICTURE, BOX)])
    expected = [2 * picture.mean((0, 1)) / 255 for picture in (PICTURE, squared(PICTURE, BOX))]
    np.testing.assert_allclose(looks, expected, rtol=1e-4)
    both.embed([(PICTURE, None)])
    assert asked == [{"pretrained": True, "device": "cpu"}]  # loaded once


def test_without_dreamsim_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(StudioError) as told:
        DreamSim().embed([(PICTURE, None)])
    assert str(told.value) == "DreamSim is not installed. Run 'pip install dreamsim', or name a DINOv2 model instead."
