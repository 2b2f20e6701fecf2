"""Singular value decompositions of weights, computed once and kept.

A weight is read as a matrix W (its rows: outputs; its columns: everything else) and split into W = U diag(S) Vᵀ with S
descending. Only the singular vectors on W's *short* side are always kept (`near`); those on the long side (`far`)
follow from them and W: far = diag(1/S) · nearᵀ · W. For a 3x3 convolution that is a ninth of the numbers.

The eigenvectors of W·Wᵀ in float64 give the same factors as an SVD several times faster, as long as W is not too
ill-conditioned (squaring it costs half of the digits); else a true SVD is taken and both sides are kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pipelines.errors import StudioError
from pipelines.files import save_tensors

logger = logging.getLogger(__name__)

CONDITION_LIMIT = 1e3  # S[0] / S[-1]; beyond it `far` is kept too, since dividing by S would cost too many digits
MEMORY_BUDGET = 1 << 30  # bytes of factors kept in this process
WORTH_A_FILE = 512  # short side from which a decomposition takes longer than reading it from disk
_VERSION = b"attune-spectral-1"


@dataclass(frozen=True, eq=False)
class Factors:
    """W = near · diag(values) · far where W is wide, and the transpose of that where it is `tall`."""

    near: Tensor  # (r, r): column k is singular vector k on the short side
    values: Tensor  # (r,), descending, >= 0
    far: Tensor | None  # (r, long): row k is singular vector k on the long side; None: take `long_side`
    tall: bool  # more rows than columns

    @cached_property
    def condition(self) -> float:
        """S[0] / S[-1]; infinite for a singular weight. Read off the device once."""
        largest, smallest = float(self.values[0]), float(self.values[-1])
        return largest / smallest if smallest > 0 else float("inf")

    def long_side(self, weight: Tensor) -> Tensor:
        """`far`, computed from the weight where it is not kept: (r, long), fp32."""
        if self.far is not None:
            return self.far
        return (self.near.T @ short_first(weight).to(self.near)) / self.values[:, None]

    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in (self.near, self.values, self.far) if tensor is not None)


def rank(weight: Tensor) -> int:
    """How many singular values a weight has; 1 for a vector."""
    return min(as_matrix(weight).shape)


def as_matrix(weight: Tensor) -> Tensor:
    """(rows, columns): outputs by everything else; a vector is one row (as in the published SVDiff code)."""
    return weight.reshape(1, -1) if weight.ndim == 1 else weight.reshape(len(weight), -1)


def short_first(weight: Tensor) -> Tensor:
    """The matrix, or its transpose when that has fewer rows: (short, long)."""
    matrix = as_matrix(weight)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def factors_of(weight: Tensor, data: Tensor) -> Factors:
    """The factors of `data`, the base values of the parameter `weight`: from memory, from disk, or computed.

    They are kept for as long as `weight` lives and nobody writes to it, at most `MEMORY_BUDGET` bytes in all.
    """
    stamp = (data.data_ptr(), data.dtype, weight._version)
    known = _memory.get(weight)
    if known is not None and known[0] == stamp:
        return known[1]
    factors = _from_disk_or_new(data)
    _memory[weight] = (stamp, factors)
    total = sum(kept.size() for _, kept in _memory.values())
    for oldest in list(_memory):
        if total <= MEMORY_BUDGET or oldest is weight:
            break
        total -= _memory.pop(oldest)[1].size()
    return factors


_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (stamp, Factors), oldest first


@torch.no_grad()
def factorize(weight: Tensor) -> Factors:
    """Decompose a weight in float64; the factors are fp32 on its device (float64 for a float64 weight).

    The signs are fixed: the largest entry of every short singular vector is positive.
    """
    matrix = short_first(weight.detach())
    tall = weight.ndim > 1 and len(weight) > matrix.shape[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    exact = matrix.cpu().double() if weight.device.type == "mps" else matrix.double()  # MPS has no float64
    near, values, far = _vector(exact) if len(exact) == 1 else _by_eigenvectors(exact)
    flip = torch.where(near.gather(0, near.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    near = near * flip
    far = None if far is None else (far * flip.T).to(weight.device, dtype).contiguous()
    return Factors(near.to(weight.device, dtype).contiguous(), values.to(weight.device, dtype), far, tall)


def _vector(row: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """One row: its norm and its direction (zero for a row of zeros, which no gain can change)."""
    norm = row.norm()
    return torch.ones_like(row[:, :1]), norm[None], row / norm.clamp(min=torch.finfo(row.dtype).tiny)


def _by_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    if squares[0] > squares[-1] / CONDITION_LIMIT**2:
        return vectors.flip(1), squares.flip(0).sqrt(), None
    return torch.linalg.svd(matrix, full_matrices=False)


def cache_folder() -> Path | None:
    """Where factors of big weights stay between starts: $STUDIO_CACHE ("" = nowhere), else the user's cache folder."""
    if "STUDIO_CACHE" in os.environ:
        chosen = os.environ["STUDIO_CACHE"]
        return Path(chosen).expanduser() / "spectral" if chosen else None
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "attune" / "spectral"


def _from_disk_or_new(data: Tensor) -> Factors:
    folder = cache_folder()
    if folder is None or rank(data) < WORTH_A_FILE:
        return factorize(data)
    path = folder / f"{_digest(data)}.safetensors"
    factors = _read(path, data)
    if factors is None:
        factors = factorize(data)
        _write(path, factors)
    return factors


def _digest(data: Tensor) -> str:
    """A name for these very values: another base, or the same one stored more coarsely, gets another file."""
    digest = hashlib.blake2b(_VERSION + f"{tuple(data.shape)}{data.dtype}".encode(), digest_size=16)
    digest.update(data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, data: Tensor) -> Factors | None:
    """The factors in a file; None when there is none or it is no good, so that they are computed anew."""
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return None
    rows, columns = as_matrix(data).shape
    r, long = sorted((rows, columns))
    expected = {"near": (r, r), "values": (r,)} | ({"far": (r, long)} if "far" in kept else {})
    if {name: tuple(tensor.shape) for name, tensor in kept.items()} != expected:
        return None
    far = kept["far"].to(data.device) if "far" in kept else None
    return Factors(kept["near"].to(data.device), kept["values"].to(data.device), far, rows > columns)


def _write(path: Path, factors: Factors) -> None:
    """Keep the factors; several processes may write the same file, each puts a whole one in place."""
    tensors = {"near": factors.near, "values": factors.values} | ({} if factors.far is None else {"far": factors.far})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors)
    except (OSError, StudioError) as error:
        logger.warning("The decomposition of a weight could not be kept (%s); it is computed again next time.", error)
