"""The Library tab: original files that hold the whole base find it where it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import Concept, StudioError, Subject, Trained, Workspace
from studio.session import Studio
from studio.tabs.library import originals
from studio.work import start_warming
from tests.tiny import tiny_folder


def test_a_whole_unet_is_exported_from_the_loaded_base(tmp_path: Path) -> None:
    """The base is a folder, which the concept knows by its name alone."""
    studio = Studio(Workspace(tmp_path / "w"), str(tiny_folder(tmp_path / "tiny")))
    try:
        start_warming(studio)
        assert studio.jobs.jobs()[-1].wait(120) and studio.base.model is not None
        name, value = next(iter(studio.base.model.unet.state_dict().items()))
        tensors = {f"unet.{name}": torch.zeros_like(value, dtype=torch.float32)}
        concept = Concept(
            "cat", (Subject("<cat>", "cat"),), "dreambooth", studio.base.identity(), {"tune": "full"}, recipe={}
        )
        studio.library.save(Trained(concept, tensors))
        other = replace(concept, name="dog", base_model={"id": "elsewhere", "fingerprint": "0123456789"})
        studio.library.save(Trained(replace(other, subjects=(Subject("<dog>", "dog"),)), tensors))
        cat, dog = (studio.library.find(each) for each in ("cat", "dog"))
        written = originals(studio, cat, tmp_path / "out")
        assert any(path.parent.name == "unet" for path in written)
        with pytest.raises(StudioError, match=r"Load 'elsewhere' \(01234567\) at the top of the page") as told:
            originals(studio, dog, tmp_path / "other")
        assert "--base" not in str(told.value) and not (tmp_path / "other" / "unet").exists()
    finally:
        studio.close()
