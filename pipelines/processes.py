"""Several processes, one run: who am I, and the averages that keep all of them the same.

`accelerate launch` and `torchrun` describe the group in the same environment variables.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Share:
    """This process's part of the work: number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.index == 0


def join() -> Share:
    """This process's share; joins the group on the first call when a launcher started several."""
    dist = torch.distributed
    if not dist.is_available() or any(name not in os.environ for name in _GROUP) or os.environ["WORLD_SIZE"] == "1":
        return Share()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return Share(dist.get_rank(), dist.get_world_size())


def average_gradients(parameters: Iterable[Tensor], share: Share) -> None:
    """Replace every gradient by its mean over the processes, wherever its parameter lives in the model.

    A parameter that only some processes used counts as zero in the others; one that nobody used keeps no gradient, as
    in a single process.
    """
    if share.count == 1:
        return
    trained = list(parameters)
    used = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    torch.distributed.all_reduce(used)
    for parameter, users in zip(trained, used.tolist(), strict=True):
        if users:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(gradient)
            parameter.grad = gradient.div_(share.count)


def average(values: dict[str, float], share: Share) -> dict[str, float]:
    """The mean of each value over the processes; every process names the same ones."""
    if share.count == 1:
        return values
    numbers = torch.tensor(list(values.values()), dtype=torch.float64)
    torch.distributed.all_reduce(numbers)
    return dict(zip(values, (numbers / share.count).tolist(), strict=True))


def agree(text: str, share: Share) -> str:
    """What the main process says, in all of them."""
    if share.count == 1:
        return text
    said = [text]
    torch.distributed.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    return said[0]


def wait(share: Share) -> None:
    """Go on when every process has come here."""
    if share.count > 1:
        agree("", share)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
