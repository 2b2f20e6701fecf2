"""What a person asks to be painted."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.schedulers import scheduler_title

if TYPE_CHECKING:
    from pipelines.cutouts import StartNoise
    from pipelines.layout import Layout
    from pipelines.placed import Placed

MOST_STEPS = 1000
MOST_SEEDS = 1000
MOST_RECURRENCES = 20
LARGEST_SEED = 2**63 - 1


def usual_guidance(kind: str = "") -> float:
    """The weight of classifier-free guidance for a kind of base. Toybox's was chosen on tuning prompts: with 5 both of
    two toys come out as asked in 63 % of pictures, with 7.5 in 49 % (n = 80)."""
    return 5.0 if kind == "toybox" else 7.5


@dataclass(frozen=True)
class Request:
    """One prompt and how to paint it, once per seed.

    `negative` None means no negative prompt at all: for SDXL that is another thing than an empty one, as in diffusers.
    `guidance` of 1 or less switches classifier-free guidance off; None is what suits the base. `width` and `height` are
    pixels, 0 = the base's own. `batch` pictures are painted at a time; a picture is reproduced bit for bit only among
    the same neighbours, so the default is one. `keep` are the seeds whose pictures are wanted, () = all.
    `preview_every` 0 = no previews.

    `layout` leads words to regions, and concepts named there that change weights act in their region alone. Without a
    layout `apart` finds such regions by a short first pass, one for each concept; None: where two or more of the
    prompt's concepts change weights. `placed` are states added at token
    positions. `recur`: how often a step is taken again with fresh noise, in the layout's guided steps (all, without a
    layout). `ramp` doubles the guidance at first and lets it fall; `trim` leaves out the padding of short prompts.
    `start` makes pictures begin as a faint collage of the subjects (MuDI), from the seeds and what it holds alone.
    """

    prompt: str
    negative: str | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int = 25
    guidance: float | None = None
    scheduler: str = "ddim"
    width: int = 0
    height: int = 0
    preview_every: int = 5
    batch: int = 1
    keep: tuple[int, ...] = ()
    layout: Layout | None = None
    apart: bool | None = False
    placed: tuple[Placed, ...] = ()
    recur: int = 0
    ramp: bool = False
    trim: bool = False
    start: StartNoise | None = None

    @property
    def scale(self) -> float:
        """The weight of classifier-free guidance; 7.5 where none was chosen and no base is known yet."""
        return usual_guidance() if self.guidance is None else self.guidance

    def check(self) -> None:
        """StudioError for anything that no base could paint."""
        scheduler_title(self.scheduler)
        if not self.seeds or len(self.seeds) > MOST_SEEDS:
            raise StudioError(f"{len(self.seeds)} pictures were asked for. Ask for 1 to {MOST_SEEDS}.")
        if any(not 0 <= seed <= LARGEST_SEED for seed in self.seeds):
            raise StudioError(f"A seed is a whole number from 0 to {LARGEST_SEED}. Choose another.")
        if not 1 <= self.steps <= MOST_STEPS:
            raise StudioError(f"{self.steps} steps can't be painted. Choose 1 to {MOST_STEPS}.")
        if not math.isfinite(self.scale) or not 0 <= self.scale <= 100:
            raise StudioError(f"A guidance of {self.guidance} is out of range. Choose 0 to 100; 7.5 is usual.")
        if self.batch < 1 or self.preview_every < 0:
            raise StudioError("The batch is at least 1, and previews come every 0 (never) or more steps.")
        if not 0 <= self.recur <= MOST_RECURRENCES:
            raise StudioError(f"A step can't be taken again {self.recur} times. Choose 0 to {MOST_RECURRENCES}.")
        if self.layout is not None:
            self.layout.check()
        if self.start is not None:
            self.start.check(self.layout)
        for text in (self.prompt, self.negative or ""):
            if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
                raise StudioError("The prompt has characters that are not Unicode text. Type it again.")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, the inverse of `from_json`; of what is newer than the format, only what is used."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data |= {"seeds": list(self.seeds), "keep": list(self.keep)}
        if self.layout is not None:
            data["layout"] = self.layout.to_json()
        if self.start is not None:
            data["start"] = self.start.to_json()
        data["placed"] = [one.to_json() for one in self.placed]
        return {name: value for name, value in data.items() if value or name not in _NEWER}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """StudioError on anything else than what `to_json` made; the values are checked too.

        A start noise comes without its cut-outs' pixels, which `make_pictures` finds in the workspace.
        """
        from pipelines.layout import Layout  # numpy, which the command line starts without
        from pipelines.placed import Placed

        try:
            known = data | {"seeds": tuple(data["seeds"]), "keep": tuple(data.get("keep", ()))}
            if "layout" in data:
                known["layout"] = Layout.from_json(data["layout"])
            if "start" in data:
                from pipelines.cutouts import StartNoise

                known["start"] = StartNoise.from_json(data["start"])
            known["placed"] = tuple(Placed.from_json(one) for one in data.get("placed", ()))
            request = cls(**known)
            whole = (*request.seeds, *request.keep, request.steps, request.width, request.height, request.batch)
            if not all(type(value) is int for value in (*whole, request.preview_every, request.recur)):
                raise TypeError("not a whole number")
            if not all(type(value) is bool for value in (request.apart or False, request.ramp, request.trim)):
                raise TypeError("neither yes nor no")
            if not isinstance(request.prompt, str) or not isinstance(request.negative, str | None):
                raise TypeError("not a text")
            request.check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise StudioError("The recipe in this file is damaged or from a newer Attune. Choose another.") from error
        return request


_NEWER = ("layout", "apart", "placed", "recur", "ramp", "trim", "start")
