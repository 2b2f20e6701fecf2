"""The usual samplers, by the short names a person types."""

from __future__ import annotations

import inspect
from typing import Any

from pipelines.errors import StudioError

SCHEDULERS = {  # name -> (the title other tools use, diffusers' class)
    "ddim": ("DDIM", "DDIMScheduler"),  # Song et al. 2020, eta = 0
    "euler": ("Euler", "EulerDiscreteScheduler"),  # Karras et al. 2022, algorithm 2 without churn
    "euler_a": ("Euler a", "EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": ("DPM++ 2M", "DPMSolverMultistepScheduler"),  # Lu et al. 2022
    "lms": ("LMS", "LMSDiscreteScheduler"),
    "unipc": ("UniPC", "UniPCMultistepScheduler"),  # Zhao et al. 2023
}


def scheduler_title(name: str) -> str:
    """What people call the scheduler; StudioError for an unknown name."""
    if name not in SCHEDULERS:
        raise StudioError(f"There is no scheduler '{name}'. Choose one of: {', '.join(SCHEDULERS)}.")
    return SCHEDULERS[name][0]


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """A new scheduler with the base's own noise schedule and prediction type; StudioError for an unknown name."""
    scheduler_title(name)
    import diffusers

    return getattr(diffusers, SCHEDULERS[name][1]).from_config(config)


def step_options(scheduler: Any, generators: list[Any]) -> dict[str, Any]:
    """What this scheduler's `step` takes beside the prediction: eta 0 and the pictures' own generators."""
    known = inspect.signature(scheduler.step).parameters
    return {key: value for key, value in {"eta": 0.0, "generator": generators}.items() if key in known}
