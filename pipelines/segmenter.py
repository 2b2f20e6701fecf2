"""Click or box to mask, with Segment Anything: the embedded one, or a published checkpoint by its path.

Kirillov et al., "Segment Anything", ICCV 2023, arXiv 2304.02643.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError

if TYPE_CHECKING:
    import torch

    from pipelines.events import Picture
    from pipelines.photos import Mask

EMBEDDED = Path(__file__).parents[1] / "assets" / "toybox" / "segmenter.safetensors"
LARGEST = 3_000_000_000  # bytes of a checkpoint; ViT-H has 2.6 GB
# width of the image encoder -> name of the published size
SIZES = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}


class Segmenter:
    """One Segment Anything model. `look` at a picture first, then ask for as many masks as you like."""

    def __init__(self, sam: Any, name: str) -> None:
        from segment_anything import SamPredictor

        self.name = name
        self._predictor = SamPredictor(sam)
        self._size = (0, 0)

    def look(self, image: Picture) -> None:
        """Read `image`, (height, width, 3) uint8; what follows is asked of it."""
        self._size = (image.shape[0], image.shape[1])
        self._predictor.set_image(np.ascontiguousarray(image))

    def click(
        self,
        points: Sequence[tuple[float, float]],
        inside: Sequence[bool] | None = None,
        box: Sequence[float] | None = None,
    ) -> Mask:
        """The mask of what is at `points` (x, y in pixels), (height, width) uint8, 255 = it.

        `inside` says of each point whether it is on it or not (default: all are); `box` is drawn around it as well. The
        best of the three alternatives where a single click leaves open what is meant. StudioError when there is
        nothing, or a point is outside.
        """
        labels = [True] * len(points) if inside is None else list(inside)
        if len(labels) != len(points) or not (any(labels) or box is not None):
            raise StudioError("Click at least once on what you want to mark.")
        for x, y in points:
            self._inside(x, y)
        around = None if box is None else self._around(box)
        if not points:
            return self._found(None, None, around)
        return self._found(np.array(points, np.float32), np.array(labels, np.int64), around)

    def box(self, box: Sequence[float]) -> Mask:
        """The mask of what is in a box x0, y0, x1, y1 in pixels, (height, width) uint8, 255 = it.

        StudioError for a box without area or outside the picture.
        """
        return self._found(None, None, self._around(box))

    def _around(self, box: Sequence[float]) -> NDArray[np.float32]:
        x0, y0, x1, y1 = (float(value) for value in box)
        self._inside(x0, y0)
        self._inside(x1, y1)
        if x1 - x0 < 1 or y1 - y0 < 1:
            raise StudioError("The box has no area. Draw it around the thing you want to mark.")
        return np.array([x0, y0, x1, y1], np.float32)

    def _inside(self, x: float, y: float) -> None:
        height, width = self._size
        if not height:
            raise RuntimeError("look() at a picture first")
        if not (0 <= x <= width and 0 <= y <= height):
            raise StudioError(f"({x:g}, {y:g}) is outside the picture of {width} x {height} pixels. Mark inside it.")

    def _found(self, points: Any, labels: Any, box: Any) -> Mask:
        several = points is not None and len(points) == 1 and box is None
        masks, quality, _ = self._predictor.predict(points, labels, box, multimask_output=several)
        mask: NDArray[np.bool_] = masks[int(quality.argmax())]
        if not mask.any():
            raise StudioError("Nothing was found there. Click elsewhere, draw a box around it, or paint the mask.")
        return mask.astype(np.uint8) * 255


@lru_cache(maxsize=2)
def load_segmenter(where: str = "", device: str = "cpu") -> Segmenter:
    """The embedded segmenter, or the checkpoint at path `where` (sam_vit_b, _l or _h; .pth or .safetensors).

    StudioError when it is missing, broken, or no Segment Anything model.
    """
    if not where:
        return Segmenter(_embedded(device), "toybox")
    tensors = _tensors(Path(where))
    width = tensors["image_encoder.pos_embed"].shape[-1] if "image_encoder.pos_embed" in tensors else 0
    if width not in SIZES:
        raise StudioError(f"'{where}' is no checkpoint of Segment Anything. Get sam_vit_b, sam_vit_l or sam_vit_h.")
    from segment_anything import sam_model_registry

    sam = sam_model_registry[SIZES[width]]()
    return Segmenter(_filled(sam, tensors, where, device), SIZES[width])


def check_segmenter(where: str, base: str = "", detector: str = "") -> None:
    """StudioError where no checkpoint is named and neither the base's kind (or name) nor the detector is "toybox": the
    embedded segmenter knows only Toybox's world, and would draw anything else badly without a word."""
    if not where and "toybox" not in (base, detector):
        raise StudioError(
            "The embedded Segment Anything knows only Toybox's own world. For photos of the real one name a "
            "checkpoint: sam_vit_b, sam_vit_l or sam_vit_h."
        )


def _embedded(device: str) -> Any:
    from safetensors.torch import load_file

    from pipelines.toybox.segmenter import new_segmenter

    if not EMBEDDED.is_file():
        raise StudioError("The embedded segmenter is missing from this copy of Attune. Name a checkpoint of your own.")
    return _filled(new_segmenter(), load_file(EMBEDDED), EMBEDDED.name, device)


def _filled(sam: Any, tensors: dict[str, torch.Tensor], where: str, device: str) -> Any:
    try:
        sam.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        raise StudioError(f"'{where}' doesn't fit Segment Anything. Get the file again from its source.") from error
    return sam.to(device).eval().requires_grad_(False)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise StudioError(f"There is no file '{path}'. Name a checkpoint of Segment Anything.")
    if path.suffix == ".safetensors":
        from pipelines.intake import load_tensors

        return load_tensors(path, LARGEST)[0]
    from pipelines.formats.jail import read_tensors

    tensors = read_tensors(path, LARGEST)
    return tensors if isinstance(tensors, dict) else {}
