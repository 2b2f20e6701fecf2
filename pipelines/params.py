"""The settings every method shares. Bounds and help stand here once; forms and checks are drawn from them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

BASIC: JsonDict = {"basic": True}  # a form shows the field at once; the others wait under "Advanced"


class TrainParams(BaseModel):
    """Fields that the training loop itself reads. A method's `Params` adds its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(500, ge=1, le=100_000, description="Training steps", json_schema_extra=BASIC)
    batch_size: int = Field(1, ge=1, le=256, description="Photos a step (all processes together)")
    micro_batch: int = Field(
        0,
        ge=0,
        le=256,
        description="Photos at a time, for less memory (0 = all; a batch's sums are then of each part)",
    )
    lr: float = Field(1e-3, gt=0, le=1, description="Learning rate", json_schema_extra=BASIC)
    weight_decay: float = Field(1e-2, ge=0, le=1, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping (0 = off)")
    resolution: int = Field(0, ge=0, le=4096, description="Short side in pixels (0 = the base's own)")
    random_crop: bool = Field(True, description="Crop at random places rather than in the centre")
    flip: bool = Field(False, description="Mirror photos at random")
    masked_loss: bool = Field(
        False, description="Count the loss inside the photos' masks only", json_schema_extra=BASIC
    )
    background_weight: float = Field(0.05, ge=0, le=1, description="Weight of the loss outside the mask")
    prior_weight: float = Field(0.0, ge=0, le=10, description="Prior preservation weight (0 = off)")
    prior_count: int = Field(200, ge=1, le=5000, description="Class pictures for prior preservation")
    sample_every: int = Field(50, ge=0, description="Steps between sample pictures (0 = never)")
    checkpoint_every: int = Field(100, ge=0, description="Steps between checkpoints (0 = only at a stop)")
