"""Decompositions: exact, with fixed signs, and kept no longer than they are true."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipelines import spectral
from pipelines.weights import changed
from tests.one_layer import bench, shifts


def test_factors_are_exact_and_signed() -> None:
    torch.manual_seed(0)
    for shape in ((16, 4, 3, 3), (12, 30), (30, 12), (20, 20), (1, 9), (9,), (40, 2, 3, 3)):
        weight = torch.randn(shape)
        factors = spectral.factorize(weight)
        far = factors.long_side(weight)
        torch.testing.assert_close((factors.near * factors.values) @ far, _short(weight), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(far @ far.T, torch.eye(len(far)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(factors.values, torch.linalg.svdvals(spectral.as_matrix(weight)))
        top = factors.near.gather(0, factors.near.abs().argmax(0, keepdim=True))
        assert (top > 0).all()


def _short(weight: Tensor) -> Tensor:
    matrix = spectral.as_matrix(weight)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


@pytest.mark.parametrize(
    "weight", [torch.zeros(6, 6), torch.ones(6, 9), torch.diag(torch.logspace(0, -7, 8)), torch.zeros(5)]
)
def test_ill_conditioned_layers(weight: Tensor) -> None:
    """Where dividing by S is no good, both sides are kept, and a live layer still follows the formula."""
    factors = spectral.factorize(weight)
    assert factors.far is not None and factors.far.isfinite().all()
    torch.testing.assert_close((factors.near * factors.values) @ factors.far, _short(weight))
    if weight.ndim == 2:
        module = nn.Linear(weight.shape[1], len(weight)).requires_grad_(False)
        module.weight.copy_(weight)
        change, x = shifts(module), torch.randn(4, weight.shape[1])
        with changed(bench(module), {"unet.layer": change}) as group:
            live = module(x)
            live.sum().backward()
            group.bake()
            torch.testing.assert_close(live, module(x), rtol=1e-4, atol=1e-5)
        assert change.shifts.grad is not None and change.shifts.grad.isfinite().all()


def test_factors_are_kept_until_the_weight_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = spectral.factorize
    monkeypatch.setattr(spectral, "factorize", lambda weight: made.append(weight.shape) or real(weight))
    weight = nn.Parameter(torch.randn(6, 6))
    assert spectral.factors_of(weight, weight.data) is spectral.factors_of(weight, weight.data)
    with torch.no_grad():
        weight.mul_(2)
    spectral.factors_of(weight, weight.data)
    assert len(made) == 2
    monkeypatch.setattr(spectral, "MEMORY_BUDGET", 1)
    other = nn.Parameter(torch.randn(5, 5))
    spectral.factors_of(other, other.data)
    assert weight not in spectral._memory and other in spectral._memory
    del other
    gc.collect()
    assert not len(spectral._memory)


def test_factors_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    monkeypatch.setattr(spectral, "WORTH_A_FILE", 4)
    data = torch.randn(6, 10)
    first = spectral._from_disk_or_new(data)
    [file] = (tmp_path / "spectral").iterdir()
    monkeypatch.setattr(spectral, "factorize", lambda weight: pytest.fail("it is on disk"))
    again = spectral._from_disk_or_new(data)
    assert torch.equal(first.near, again.near) and torch.equal(first.values, again.values) and again.tall is first.tall
    monkeypatch.undo()
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    monkeypatch.setattr(spectral, "WORTH_A_FILE", 4)
    file.write_bytes(b"half a file")
    assert torch.equal(spectral._from_disk_or_new(data).near, first.near)
    assert spectral._read(file, data) is not None  # written anew
    monkeypatch.setenv("STUDIO_CACHE", "")
    assert spectral.cache_folder() is None


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "spectral").write_text("in the way")
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    monkeypatch.setattr(spectral, "WORTH_A_FILE", 4)
    assert spectral._from_disk_or_new(torch.randn(6, 10)).near.shape == (6, 6)
