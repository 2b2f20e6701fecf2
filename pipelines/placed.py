"""States that are added at a token position of the prompt, as Cones 2's configuration names its subjects."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StudioError
from pipelines.files import printable

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.text import TextStates

MOST_NUMBERS = 75 * 4096


@dataclass(frozen=True)
class Placed:
    """Rows (tokens, width) that are added to the text encoder's output from token `position` on; 0 = the start token.

    They travel with the picture's recipe, so that it can be made again without the file they came from.
    """

    name: str
    position: int
    width: int
    data: bytes  # fp32, little-endian, row by row
    strength: float = 1.0

    @classmethod
    def of(cls, name: str, position: int, rows: Tensor, strength: float = 1.0) -> Placed:
        """From a tensor (tokens, width)."""
        values = rows.detach().float().cpu().contiguous().numpy().astype("<f4")
        return cls(name, position, values.shape[1], values.tobytes(), strength)

    @property
    def rows(self) -> NDArray[np.float32]:
        """(tokens, width) fp32."""
        return np.frombuffer(self.data, "<f4").reshape(-1, self.width).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, the inverse of `from_json`."""
        text = base64.b64encode(self.data).decode("ascii")
        return {"name": self.name, "at": self.position, "width": self.width, "rows": text, "strength": self.strength}

    @classmethod
    def from_json(cls, data: Any) -> Placed:
        """ValueError, TypeError or KeyError for anything that `to_json` did not make."""
        content = base64.b64decode(data["rows"], validate=True)
        position, width, strength = data["at"], data["width"], float(data["strength"])
        if type(position) is not int or type(width) is not int or position < 0 or width < 1:
            raise ValueError("not a place")
        if not content or len(content) > 4 * MOST_NUMBERS or len(content) % (4 * width):
            raise ValueError("not rows of that width")
        placed = cls(str(data["name"]), position, width, content, strength)
        if not (np.isfinite(placed.rows).all() and np.isfinite(strength)):
            raise ValueError("not numbers")
        return placed


def add_placed(text: TextStates, placed: tuple[Placed, ...]) -> TextStates:
    """The prompt's states (1, tokens, width) with the rows added; the very same without any.

    Two at one position are both added. StudioError for another width, or a position that the prompt doesn't have.
    """
    if not placed:
        return text
    import dataclasses

    import torch

    states = text.states.clone()
    length, width = states.shape[1:]
    for one in placed:
        rows = torch.from_numpy(one.rows) * one.strength
        if one.width != width:
            raise StudioError(
                f"'{printable(one.name)}' was made for text states {one.width} wide, those of this base have {width}. "
                "Load the base it was trained on."
            )
        if one.position + len(rows) > length:
            raise StudioError(
                f"'{printable(one.name)}' is for token {one.position}, but a prompt has only {length} here. "
                "Give the position of its word."
            )
        states[0, one.position : one.position + len(rows)] += rows.to(states)
    return dataclasses.replace(text, states=states)
