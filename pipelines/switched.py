"""Changes of weights that wait until they are needed: a stage of training that has not begun costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pipelines.weights import ChangeSet, changed, usable_strength

if TYPE_CHECKING:
    from pipelines.changes import Change
    from pipelines.model import Model


class SwitchedChanges:
    """A set of changes that goes on at `switch_on`, and off with the stack it was given."""

    def __init__(self, model: Model, changes: Mapping[str, Change], stack: ExitStack) -> None:
        self.changes = dict(changes)
        self.group: ChangeSet | None = None  # while it is on
        self._model = model
        self._stack = stack
        self._strength, self._baked = 1.0, False

    @property
    def strength(self) -> float:
        """0 is the base, bit for bit."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        value = usable_strength(value)
        self._strength = value
        if self.group is not None:
            self.group.strength = value

    def switch_on(self) -> bool:
        """Let the changes take part from now on; whether they didn't before."""
        if self.group is not None:
            return False
        self.group = self._stack.enter_context(changed(self._model, self.changes))
        self.group.strength = self._strength
        if self._baked:
            self.group.bake()
        return True

    def refresh(self) -> None:
        """To be called after the changes' numbers were replaced."""
        if self.group is not None:
            self.group.refresh()

    def bake(self) -> None:
        """Fold the changes into the weights, for generation."""
        self._baked = True
        if self.group is not None:
            self.group.bake()
