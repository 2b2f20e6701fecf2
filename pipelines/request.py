"""What a person asks to be painted."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.errors import StudioError
from pipelines.schedulers import scheduler_title

MOST_STEPS = 1000
MOST_SEEDS = 1000
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One prompt and how to paint it, once per seed.

    `negative` None means no negative prompt at all: for SDXL that is another thing than an empty one, as in diffusers.
    `guidance` of 1 or less switches classifier-free guidance off. `width` and `height` are pixels, 0 = the base's own.
    `batch` pictures are painted at a time; a picture is reproduced bit for bit only among the same neighbours, so the
    default is one. `keep` are the seeds whose pictures are wanted, () = all. `preview_every` 0 = no previews.
    """

    prompt: str
    negative: str | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int = 25
    guidance: float = 7.5
    scheduler: str = "ddim"
    width: int = 0
    height: int = 0
    preview_every: int = 5
    batch: int = 1
    keep: tuple[int, ...] = ()

    def check(self) -> None:
        """StudioError for anything that no base could paint."""
        scheduler_title(self.scheduler)
        if not self.seeds or len(self.seeds) > MOST_SEEDS:
            raise StudioError(f"{len(self.seeds)} pictures were asked for. Ask for 1 to {MOST_SEEDS}.")
        if any(not 0 <= seed <= LARGEST_SEED for seed in self.seeds):
            raise StudioError(f"A seed is a whole number from 0 to {LARGEST_SEED}. Choose another.")
        if not 1 <= self.steps <= MOST_STEPS:
            raise StudioError(f"{self.steps} steps can't be painted. Choose 1 to {MOST_STEPS}.")
        if not math.isfinite(self.guidance) or not 0 <= self.guidance <= 100:
            raise StudioError(f"A guidance of {self.guidance} is out of range. Choose 0 to 100; 7.5 is usual.")
        if self.batch < 1 or self.preview_every < 0:
            raise StudioError("The batch is at least 1, and previews come every 0 (never) or more steps.")
        for text in (self.prompt, self.negative or ""):
            if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
                raise StudioError("The prompt has characters that are not Unicode text. Type it again.")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, the inverse of `from_json`."""
        return asdict(self) | {"seeds": list(self.seeds), "keep": list(self.keep)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """StudioError on anything else than what `to_json` made; the values are checked too."""
        try:
            request = cls(**(data | {"seeds": tuple(data["seeds"]), "keep": tuple(data.get("keep", ()))}))
            whole = (*request.seeds, *request.keep, request.steps, request.width, request.height, request.batch)
            if not all(type(value) is int for value in (*whole, request.preview_every)):
                raise TypeError("not a whole number")
            if not isinstance(request.prompt, str) or not isinstance(request.negative, str | None):
                raise TypeError("not a text")
            request.check()
        except (TypeError, KeyError, AttributeError) as error:
            raise StudioError("The recipe in this file is damaged or from a newer Attune. Choose another.") from error
        return request
