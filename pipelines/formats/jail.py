"""Pickled weights (.pt, .bin, .ckpt) without trusting them: a throwaway process turns them into plain tensors.

Python's pickle can run code, and `weights_only` is a narrow gate, not a wall. So the file is unpickled in a child that
has no network where the system allows it, bounded memory, processor time and output, and no way to open files for
writing; it gets the file as its standard input and answers on its standard output. What comes back is read like any
stranger's safetensors file. This process never unpickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickletools
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.files import megabytes, printable
from pipelines.intake import parse_tensors

if TYPE_CHECKING:
    from torch import Tensor

SIZE_LIMIT = 500_000_000  # bytes of a pickled file; concepts are far smaller
_CHILD = Path(__file__).with_name("_jail_child.py")
_SECONDS = 60.0  # most of it for importing torch on a busy machine
_ENTRIES_LIMIT = 100_000
_DIRECTORY_LIMIT = 20_000_000
_END = struct.Struct("<4s4H2LH")  # end of a zip's central directory


def read_tensors(path: Path, size_limit: int = SIZE_LIMIT) -> dict[str, Tensor] | Tensor:
    """The tensors of a .pt or .bin file, on the CPU: a bare tensor, or a dictionary (nested keys joined by "/").

    Values that are no tensors are left out. StudioError with the reason when the file is too large, no pickle, asks
    for anything but plain tensors, unfolds to more numbers than its bytes can hold, or takes too long.
    """
    what = f"'{printable(path.name)}'"
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the next line
    except OSError as error:
        raise StudioError(f"Cannot read {what}: {error.strerror}. Check the path.") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > size_limit:
            raise _refused(what, f"it has {megabytes(size)}, more than {megabytes(size_limit)}")
        _look(file, size, what)
        file.seek(0)
        tensors, metadata = parse_tensors(_convert(file, size, what), what)
    return tensors["tensor"] if metadata.get("bare") and set(tensors) == {"tensor"} else tensors


def pickle_codes(file: Path, limit: int) -> list[tuple[str, Any]]:
    """The pickle of a torch.save file as (name, argument) of its codes, which are read and never run.

    [] for anything else, and where the pickle is larger than `limit` bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.split("/")[-1] == "data.pkl"]
            if len(entries) != 1 or entries[0].file_size > limit or entries[0].compress_type != zipfile.ZIP_STORED:
                return []
            return [(code.name, argument) for code, argument, _ in pickletools.genops(archive.read(entries[0]))]
    except (OSError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile):
        return []


def _look(file: IO[bytes], size: int, what: str) -> None:
    """Refuse at once what torch.save never writes: other kinds of files, and zips that swell when unpacked."""
    start = file.read(4)
    if start[:1] == b"\x80":  # the form before torch 1.6
        return
    if start != b"PK\x03\x04":
        raise _refused(what, "it is no file of PyTorch's")
    file.seek(max(0, size - _END.size))
    end = file.read()
    if len(end) < _END.size or end[:4] != b"PK\x05\x06" or _END.unpack(end)[5] > _DIRECTORY_LIMIT:
        raise _refused(what, "it is cut off or was changed")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise _refused(what, "it is cut off or was changed") from error
    names = {entry.filename for entry in entries}
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or len(names) != len(entries) or len(entries) > _ENTRIES_LIMIT:
        raise _refused(what, "PyTorch would not have packed it like that")
    if sum(entry.file_size for entry in entries) > size:
        raise _refused(what, "it claims to hold more than its size")


def _convert(file: IO[bytes], size: int, what: str) -> bytes:
    """The child's answer, within `size` and a little more: plain tensors take no more room than pickled ones."""
    output_limit, count_limit = 2 * size + 1_000_000, size + 1_000_000
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as reasons:
        command = [sys.executable, "-P", "-s", str(_CHILD), str(output_limit), str(count_limit)]
        with tempfile.TemporaryDirectory(prefix="attune-jail-") as empty:
            child = subprocess.Popen(
                command, stdin=file, stdout=answer, stderr=reasons, cwd=empty, env=_environment(empty),
                close_fds=True, start_new_session=True,
            )  # fmt: skip
            with child:
                try:
                    status = child.wait(_SECONDS)
                except subprocess.TimeoutExpired as error:
                    raise _refused(what, f"reading it took longer than {_SECONDS:.0f} s") from error
                finally:
                    child.kill()
        answer.seek(0)
        data = answer.read(output_limit + 16_000_001)
        if status != 0:
            raise _refused(what, _reason(reasons))
    return data


def _environment(home: str) -> dict[str, str]:
    """Nothing of ours: no tokens, no proxies. Where libraries lie is kept, or torch might not start."""
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return kept | {
        "HOME": home,
        "TMPDIR": home,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(installed),
    }


def _reason(reasons: IO[bytes]) -> str:
    """What the child said, if it said something sensible. It is shown, so it is cut and cleaned."""
    reasons.seek(0)
    lines = reasons.read(4000).splitlines()
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, RecursionError):
        return printable(json.loads(lines[-1])["reason"], 200)
    return "it asked for more memory or time than it may have, or is broken"


def _refused(what: str, reason: str) -> StudioError:
    return StudioError(f"{what} is not taken: {reason}. Ask its maker for a .safetensors file.")
