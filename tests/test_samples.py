"""What a look at a concept under way paints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.events import Snapshot
from pipelines.methods import get_method
from pipelines.photos import Photo
from pipelines.samples import look, sample_prompt
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "dog")


@pytest.mark.parametrize(
    ("method", "settings", "subjects", "prompt"),
    [
        ("attndreambooth", {}, [CAT], "a photo of a <my-cat>"),
        ("attndreambooth", {"prompt": "a red {} on the sand"}, [CAT], "a red <my-cat> on the sand"),
        ("attndreambooth", {"prompt": ""}, [CAT], "a photo of <my-cat>"),
        ("textual_inversion", {}, [CAT, DOG], "a photo of <my-cat> and <my-dog>"),
    ],
)
def test_a_sample_says_what_the_method_trains_on(
    method: str, settings: dict[str, str], subjects: list[Subject], prompt: str
) -> None:
    model, found = tiny_model("sd1"), get_method(method)
    params = found.Params(prior_weight=0.0, resolution=64, **settings)
    shown = Photo(Path("a.png"), np.full((64, 64, 3), 90, np.uint8), {"": np.full((64, 64), 255, np.uint8)})
    data = prepare(model, [shown], params, subjects, seed=0)
    assert sample_prompt(data) == prompt
    with found.attach(model, params, subjects):
        (sample,) = [event for event in look(model, data, 3) if isinstance(event, Snapshot)]
    assert sample.info["prompt"] == prompt and "inside" in sample.info
