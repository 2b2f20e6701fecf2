"""Subjects of one photo while they are learned: whom a row names, its masks, and what its attention should show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pipelines.attention.follow import Follow
from pipelines.attention.gaze import cross_levels
from pipelines.attention.losses import EMPTY, contrast, emd, mse, on_grid
from pipelines.learned_tokens import LearnedTokens, learned_tokens, token_names
from pipelines.noise import generator
from pipelines.text import TextStates, covered
from pipelines.tokens import Expansion, added_tokens, placeholder

if TYPE_CHECKING:
    from pipelines.batch import Batch
    from pipelines.concept import Subject
    from pipelines.methods import Stage
    from pipelines.model import Model
    from pipelines.shifts import Shifts

Named = list[
    list[tuple[int, str]]
]  # for each row: the subjects in its prompt, by number, and what they are called there


@dataclass(frozen=True)
class ShiftSettings:
    """What `pipelines.shifts` asks of settings."""

    lr: float
    lr_1d: float
    layers: str
    mode_1d: str
    train_text_encoder: bool


class Settings(Protocol):
    """What is asked of a method's settings here, all of them read-only."""

    @property
    def lr(self) -> float: ...
    @property
    def attention(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def init(self) -> str: ...
    @property
    def split(self) -> int: ...
    @property
    def shift_steps(self) -> int: ...
    @property
    def shift_lr(self) -> float: ...
    @property
    def lr_1d(self) -> float: ...
    @property
    def layers(self) -> str: ...
    @property
    def mode_1d(self) -> str: ...
    @property
    def train_text_encoder(self) -> bool: ...


@contextmanager
def extraction(model: Model, params: Any, subjects: Sequence[Subject]) -> Iterator[Extraction]:
    """A token for each subject, which stands alone in a prompt; with a second phase, shifts of zero."""
    with ExitStack() as stack:
        shifts = stack.enter_context(_shifts(model, params)) if params.shift_steps else None
        learned = stack.enter_context(learned_tokens(model, subjects, with_noun=False))
        if params.init == "random":
            rows = zip(learned.keys(), learned.parameters(), strict=True)
            learned.load({key: _random_rows(model, place, own, 0) for place, (key, own) in enumerate(rows)})
        yield Extraction(stack, model, params, subjects, learned, shifts)


@contextmanager
def _shifts(model: Model, params: Settings) -> Iterator[Shifts]:
    """Folded in until the second phase begins: shifts of zero cost nothing then."""
    from pipelines.shifts import Shifts, chosen, no_change
    from pipelines.weights import changed

    settings = ShiftSettings(params.shift_lr, params.lr_1d, params.layers, params.mode_1d, params.train_text_encoder)
    changes = {name: no_change(module, settings) for name, module in chosen(model, settings).items()}
    with changed(model, changes) as group:
        yield Shifts(group, settings)


class Extraction:
    """The adapter: one learned token a subject, several before they are merged, and shifts in a second phase."""

    def __init__(
        self,
        stack: ExitStack,
        model: Model,
        params: Any,
        subjects: Sequence[Subject],
        learned: LearnedTokens,
        shifts: Shifts | None,
    ) -> None:
        self.params = params
        self.sites = next(iter(cross_levels(model).values()))  # the coarsest on the way down and up
        self._stack = stack  # what begins with training ends with the rest
        self._model = model
        self._subjects = tuple(subjects)
        self._learned = learned
        self._shifts = shifts
        self._parts: tuple[nn.Parameter, ...] = ()  # (subjects * split, width) for each text encoder
        # Steps done, and whether the split tokens are merged. No gradient ever reaches it; it stands among the
        # parameters so that a resumed run has it too.
        self._state = nn.Parameter(torch.zeros(2), requires_grad=False)

    @property
    def strength(self) -> float:
        """Of tokens and shifts alike."""
        return self._learned.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._learned.strength = value
        if self._shifts:
            self._shifts.strength = value

    def param_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """The split tokens, the tokens, or the shifts."""
        if self.params.split > 1 and not self._parts:
            self._parts = self._split()
        if stage.name == "shifts" and self._shifts:
            groups = self._shifts.param_groups(stage)
        else:
            rows = self._parts if stage.name == "split" else self._learned.parameters()
            groups = [{"params": [*rows], "lr": self.params.lr}]
        return [*groups, {"params": [self._state], "lr": 0.0}]

    def tensors(self) -> dict[str, Tensor]:
        """{"tokens.text_encoder": (subjects, width), ...} and the shifts by layer."""
        self._settle()
        return self._learned.tensors() | (self._shifts.tensors() if self._shifts else {})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; StudioError when they don't fit this base."""
        own = set(self._learned.keys())
        self._learned.load({name: values for name, values in tensors.items() if name in own})
        if self._shifts:
            self._shifts.load({name: values for name, values in tensors.items() if name not in own})

    def bake(self) -> None:
        self._learned.bake()
        if self._shifts:
            self._shifts.bake()

    # Whom a row names

    def named(self, batch: Batch, stage: Stage) -> Named:
        """The subjects in each row's prompt; none in class pictures. One step further in the schedule."""
        self._enter(stage)
        self._settle()  # so that a sample shows what the split tokens have learned
        step = int(self._state[0]) - (not batch.first)
        with torch.no_grad():
            self._state[0] += batch.first
        return [[] if batch.prior[row] else self._row(batch, row, stage, step) for row in range(len(batch.captions))]

    def _row(self, batch: Batch, row: int, stage: Stage, step: int) -> list[tuple[int, str]]:
        count = len(self._subjects)
        shown = [] if batch.shown is None else batch.shown[row].nonzero().flatten().tolist()
        shown = shown or list(range(count))
        draw = generator("extract", int(batch.timesteps[row]), float(batch.noise[row].flatten()[0]).hex())
        if stage.name == "split":
            return self._split_row(shown, draw, step)
        if self.params.schedule == "passes":
            options = [[subject] for subject in shown] + ([shown] if len(shown) > 1 else [])
            chosen = options[step % len(options)]
        elif self.params.schedule == "all":
            chosen = shown
        else:
            size = 1 + int(torch.randint(len(shown), (), generator=draw))
            chosen = [shown[at] for at in torch.randperm(len(shown), generator=draw)[:size].tolist()]
        return [(subject, self._subjects[subject].token) for subject in chosen]

    def _split_row(self, shown: list[int], draw: torch.Generator, step: int) -> list[tuple[int, str]]:
        """One token alone, as published: a drawn one, or each in its turn."""
        options = [(subject, part) for part in range(self.params.split) for subject in shown]
        at = step if self.params.schedule == "passes" else int(torch.randint(len(options), (), generator=draw))
        subject, part = options[at % len(options)]
        return [(subject, _part(self._subjects[subject], part))]

    def captions(self, batch: Batch, named: Named) -> list[str]:
        """ "a photo of <a> and <b>"; class pictures keep their words."""
        rows = zip(batch.captions, named, strict=True)
        return ["a photo of " + " and ".join(word for _, word in who) if who else own for own, who in rows]

    def union(self, batch: Batch, named: Named) -> Tensor | None:
        """(rows, 1, h, w): the masks of those a row names, as one. Class pictures count whole."""
        if batch.subject_masks is None:
            return batch.masks
        rows = [
            masks[[number for number, _ in who]].amax(0, keepdim=True) if who else torch.ones_like(masks[:1])
            for masks, who in zip(batch.subject_masks, named, strict=True)
        ]
        return torch.stack(rows)

    # Attention

    def positions(self, text: TextStates, named: Named) -> list[list[int]]:
        """For each row, the position of every subject's token; 0 for those that its prompt doesn't name, or lost."""
        found = []
        for prompt, who in zip(text.prompts, named, strict=True):
            places = {span.token: covered(prompt, span.start, span.end) for span in prompt.spans}
            row = [0] * len(self._subjects)
            for number, word in who:
                row[number] = next(iter(places.get(word, [])), 0)
            found.append(row)
        return found

    def pull(self, follow: Follow, batch: Batch, named: Named) -> Tensor:
        """The distance of the named tokens' attention from their masks, summed in a row, averaged over photos."""
        maps = follow.maps()
        if batch.subject_masks is None:
            return maps.sum() * 0
        masks = on_grid(batch.subject_masks, (maps.shape[2], maps.shape[3]))
        pairs = [(row, number) for row, who in enumerate(named) for number, _ in who]
        pairs = [(row, number) for row, number in pairs if masks[row, number].max() > EMPTY]
        if not pairs:
            return maps.sum() * 0
        rows, numbers = (list(part) for part in zip(*pairs, strict=True))
        distance = emd if self.params.attention == "emd" else mse
        return distance(maps[rows, numbers], masks[rows, numbers]).sum() / sum(1 for who in named if who)

    # Split and merge

    def hold(self) -> Tensor:
        """The contrastive loss of the split tokens: those of one subject alike, those of others not."""
        groups = torch.arange(len(self._subjects), device=self._parts[0].device).repeat_interleave(self.params.split)
        return torch.stack([contrast(rows, groups) for rows in self._parts]).sum()

    def _split(self) -> tuple[nn.Parameter, ...]:
        """`split` more tokens for each subject, which training alone needs."""
        names = [token_names(subject, 1 + self.params.split, self._subjects)[1:] for subject in self._subjects]
        first = [subject.noun for subject in self._subjects for _ in range(self.params.split)]
        added = self._stack.enter_context(added_tokens(self._model, [n for group in names for n in group], first))
        for subject, group in zip(self._subjects, names, strict=True):
            for part, token in enumerate(group):
                meaning = Expansion(token, subject.noun)
                self._stack.enter_context(placeholder(self._model, _part(subject, part), meaning))
        if self.params.init == "random":
            with torch.no_grad():
                for place, rows in enumerate(added.rows):
                    rows.copy_(_random_rows(self._model, place, rows, 1))
        return added.rows

    @torch.no_grad()
    def _settle(self) -> None:
        """While tokens are split, each subject's own is their mean."""
        if self._parts and not self._state[1] and self._state[0]:
            for own, rows in zip(self._learned.parameters(), self._parts, strict=True):
                own.copy_(rows.unflatten(0, (len(self._subjects), -1)).mean(1))

    def _enter(self, stage: Stage) -> None:
        """What a stage begins with. Asked for at every step, so that a resumed run is where it was."""
        if stage.name == "split":
            return
        if self._parts and not self._state[1]:
            self._settle()
            with torch.no_grad():
                self._state[1] = 1
        if self._shifts:
            training = stage.name == "shifts"
            if training == self._shifts.group.baked:
                self._shifts.group.baked = not training
                self._shifts.group.refresh()


def _part(subject: Subject, part: int) -> str:
    return f"<{subject.token.strip('<>')}.{part + 1}>"


def _random_rows(model: Model, place: int, like: Tensor, purpose: int) -> Tensor:
    """Rows of words drawn from text encoder `place`'s own table, as many as `like` has; the same for every run."""
    table = model.text_encoders[place].get_input_embeddings().weight
    draw = torch.randint(len(table), (len(like),), generator=generator("extract init", place, purpose))
    rows: Tensor = table.detach()[draw.to(table.device)].to(like)
    return rows
