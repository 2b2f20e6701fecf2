"""Small concepts for tests of the library; no model is needed."""

from __future__ import annotations

import torch

from pipelines.concept import Concept, Subject, Trained

BASE = {"id": "toybox", "fingerprint": "0123456789abcdef"}


def trained(name: str = "my-cat", token: str = "", noun: str = "cat", seed: int = 0) -> Trained:
    """A concept of the method svdiff with three small tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}": torch.randn(4 + i, generator=generator) for i in range(3)}
    subject = Subject(token or f"<{name}>", noun)
    params = {"steps": 140, "lr": 1e-3}
    return Trained(Concept(name, (subject,), "svdiff", dict(BASE), params, seed=seed, created=1.7e9 + seed), tensors)
