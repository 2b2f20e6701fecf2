"""An adapter that is one change of a model's weights, low-rank or whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.fulltune import FullTune
    from pipelines.lora import Lora
    from pipelines.methods import Stage


class OneChange:
    """The adapter of a method: one change, the settings it trains with, the subjects' tokens."""

    def __init__(self, change: Lora | FullTune, params: Any, tokens: tuple[str, ...] = ()) -> None:
        self.change = change
        self.params = params
        self.tokens = tokens

    @property
    def strength(self) -> float:
        return self.change.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.change.strength = value

    def param_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """The UNet's part at `lr`, the text encoders' at `lr_text`."""
        groups = [(self.change.parameters(), self.params.lr), (self.change.text_parameters(), self.params.lr_text)]
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def tensors(self) -> dict[str, Tensor]:
        return self.change.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.change.load(tensors)

    def bake(self) -> None:
        self.change.bake()
