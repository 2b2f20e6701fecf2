"""What every test shares: no network, one thread (results and times don't depend on the machine's cores)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

LONG = (
    "test_journey",
    "test_drawing",
    "test_resume",
    "test_cli",
    "test_claims",
    "test_accelerate",
    "test_app",
)  # few tests, but slow


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that forgets to name its workspace gets an empty one of its own."""
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "workspace"))
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first: the last one would keep one of two workers busy alone."""
    items.sort(key=lambda item: item.path.stem not in LONG)  # stable: the rest stays as it is
