"""The inside of the jail: reads a pickled weights file on stdin, writes plain safetensors to stdout. Run as a script.

It is started for one file and thrown away. It imports nothing of ours, gives up every right it can before it looks at
the file, and says why it refuses as one JSON line on stderr. Nothing it says is believed by its parent.

The only place in Attune where `torch.load` may stand.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

REFUSED = 3  # exit status
_MEMORY = 1 << 30  # bytes on top of what torch itself takes, plus a multiple of the file
_CPU_SECONDS = 20
_DEPTH = 6  # dictionaries within dictionaries
_FORBIDDEN = ("socket.", "subprocess.", "shutil.", "ctypes.", "urllib.", "ftplib.", "winreg.", "mmap.")
_CHANGES = "system exec fork posix_spawn spawn remove rename rmdir mkdir chmod chown link symlink truncate kill putenv"
_FORBIDDEN_OS = tuple(f"os.{name}" for name in _CHANGES.split())


def main(output_limit: int, count_limit: int) -> None:
    """Convert stdin to stdout within `output_limit` bytes and `count_limit` numbers."""
    _leave_network()
    import safetensors.torch
    import torch

    _set_limits(output_limit)
    sys.addaudithook(_forbid)
    try:
        loaded = torch.load(sys.stdin.buffer, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file brings up ends here, in a process that ends as well
        _refuse(f"it cannot be read as plain tensors ({type(error).__name__})")
    tensors: dict[str, torch.Tensor] = {}
    _collect(loaded, "", tensors, _DEPTH)
    if not tensors:
        _refuse("it holds no tensors")
    numbers = sum(_checked(tensor, name, count_limit).numel() for name, tensor in tensors.items())
    if (
        numbers > count_limit
        or sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > output_limit
    ):
        _refuse(f"it unfolds to {numbers:,} numbers, far more than its size")
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    bare = {"bare": "1"} if isinstance(loaded, torch.Tensor) else None
    sys.stdout.buffer.write(safetensors.torch.save(plain, bare))
    sys.stdout.buffer.flush()


def _collect(value: Any, name: str, into: dict[str, Any], depth: int) -> None:
    """Tensors of nested dictionaries and lists under their keys joined by "/"; other values are left out."""
    import torch

    if isinstance(value, torch.Tensor):
        into[name or "tensor"] = value
        return
    if not isinstance(value, dict | list | tuple):
        return
    if depth == 0 or len(value) > 100_000:
        _refuse("it is nested too deep or has too many entries")
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        _collect(item, f"{name}/{key}" if name else str(key), into, depth - 1)


def _checked(tensor: Any, name: str, count_limit: int) -> Any:
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool)  # fmt: skip
    if not plain or tensor.device.type != "cpu" or tensor.dtype not in known:
        _refuse(f"'{name[:60]}' is no plain tensor")
    if tensor.numel() > count_limit:
        _refuse(f"'{name[:60]}' unfolds to {tensor.numel():,} numbers, far more than its size")
    return tensor


def _leave_network() -> None:
    """A network namespace of our own, with nothing in it, where the system lets us; before any thread starts."""
    if sys.platform != "linux":
        return
    new_user, new_net, no_new_privileges = 0x10000000, 0x40000000, 38
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    if libc.unshare(new_net) != 0:
        libc.unshare(new_user | new_net)


def _set_limits(output_limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit and the checks below remain
        return
    size = os.fstat(sys.stdin.fileno()).st_size
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else open(os.devnull) as file:
        pages = file.read().split()
    if pages:
        present = int(pages[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, present + _MEMORY + 6 * size)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + _CPU_SECONDS)
    _limit(resource.RLIMIT_FSIZE, output_limit + 16_000_000)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, value: int) -> None:
    import resource

    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: from here on this process reads files of Python's own at most. It can't be taken off again."""
    writing = event == "open" and len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & 0o3103
    if writing or event.startswith(_FORBIDDEN) or event.startswith(_FORBIDDEN_OS):
        raise RuntimeError(f"not allowed: {event}")


def _refuse(reason: str) -> None:
    sys.stderr.write(json.dumps({"reason": reason}) + "\n")
    sys.stderr.flush()
    os._exit(REFUSED)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
