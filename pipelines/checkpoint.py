"""Checkpoints: one file each, whole or absent, checked before use, the last two kept.

A file holds what is needed to go on as if nothing had happened: the raw trained values, the optimizer's state and the
place (stage, step). Random numbers need no state, they follow from (seed, step, sample). It also holds the adapter's
own tensors, so that what was learned so far can be kept without a model at hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.files import megabytes, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2
_PATTERN = "checkpoint-*.safetensors"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A place in a run and the tensors there: "trainable/0", "optimizer/0/exp_avg", "adapter/<name>"."""

    stage: int  # index of the stage under way
    step: int  # steps done in it
    done: int  # steps done in all
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under `name`/, without that prefix."""
        return {
            key.removeprefix(f"{name}/"): value for key, value in self.tensors.items() if key.startswith(f"{name}/")
        }


class Checkpoints:
    """The checkpoints of one run in `folder`. `config` is a hash of everything the run's result depends on."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, point: Checkpoint) -> Path:
        """Publish `point`, then delete all but the newest two. StudioError on NaN or a full disk; nothing is lost."""
        import torch

        for name, tensor in point.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise StudioError(f"'{name}' holds NaN or infinity, so nothing was saved. Lower lr and train again.")
        place = {"stage": str(point.stage), "step": str(point.step), "done": str(point.done), "config": self.config}
        path = self.folder / f"checkpoint-{point.done:08d}.safetensors"
        save_tensors(path, point.tensors, place | {"sha256": _digest(point.tensors, place)})
        for old in self._newest_first()[KEEP:]:
            old.unlink(missing_ok=True)
        return path

    def latest(self, notes: list[str]) -> Checkpoint | None:
        """The newest sound checkpoint. Damaged ones are set aside with a sentence in `notes`.

        StudioError when it belongs to other settings, photos or another base.
        """
        for path in self._newest_first():
            found = _read(path)
            if found is None:
                with contextlib.suppress(FileNotFoundError):  # another process did it
                    path.replace(path.with_suffix(".damaged"))
                notes.append(f"{path.name} is damaged and was set aside; the one before it is used.")
                continue
            point, config = found
            if config != self.config:
                raise StudioError(
                    "This run was started with other settings, photos or another base. "
                    "Put them back to go on with it, or start a new run."
                )
            return point
        return None

    def need(self, size: int) -> None:
        """StudioError unless the disk has room for the checkpoints of `size` bytes that exist at the same time."""
        free = shutil.disk_usage(self.folder).free
        if (KEEP + 1) * size > free:
            raise StudioError(
                f"The checkpoints need {megabytes((KEEP + 1) * size)}, but only {megabytes(free)} are free. "
                "Free some space, or set checkpoint_every to 0."
            )

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN), reverse=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint in `folder`, whatever run it belongs to; nothing is moved."""
    found = (_read(path) for path in sorted(folder.glob(_PATTERN), reverse=True))
    return next((point for point, _ in filter(None, found)), None)


def config_hash(facts: Any) -> str:
    """A hash of JSON data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[Checkpoint, str] | None:
    """The checkpoint and its config hash, or None when the file is not exactly what was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        digest = said.pop("sha256")
        if digest != _digest(tensors, said):
            raise ValueError("the content does not match its sha256")
        point = Checkpoint(int(said["stage"]), int(said["step"]), int(said["done"]), tensors)
        return point, said["config"]
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        logger.warning("%s: %s", path, error)
        return None


def _digest(tensors: dict[str, Tensor], place: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(place, sort_keys=True).encode())
    for part in _bytes(tensors):
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    import torch

    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
