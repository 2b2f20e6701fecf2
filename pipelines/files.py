"""Files that survive: atomic writes, folders published whole, a lock between processes, names that cannot escape.

What a person types is data and never a path: folder names come from `new_id` alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipelines.errors import StudioError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

NAME_LIMIT = 100
TEMPORARY = ".tmp"  # suffix of files and folders that are not yet what they will be
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_JOINERS = "\u200c\u200d"  # needed by Persian, Hindi and emoji; ignored when names are compared


def write_atomic(path: str | Path, data: bytes) -> None:
    """Put `data` at `path` so that a crash leaves the old file or the new one, never a mixture.

    A link at `path` is replaced, not followed. StudioError when the disk is full; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        with spare_disk(path, len(data)), _open_new(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: str | Path, data: Any) -> None:
    """`data` as indented JSON, atomically. ValueError on NaN, which is not JSON."""
    write_atomic(path, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """What `write_json` writes. Plain ASCII: names of files may hold bytes that are no Unicode."""
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`tensors` as one safetensors file, atomically. Views, shared and device tensors are copied first."""
    write_atomic(path, tensor_bytes(tensors, metadata))


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """What `save_tensors` writes."""
    from safetensors.torch import save

    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in seen else tensor  # safetensors refuses tensors that share memory
        seen.add(memory)
    return save(own, dict(metadata) if metadata is not None else None)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to fill; at the end of the block it becomes `target`, at once and whole.

    On an exception it is removed and `target` never exists. FileExistsError when `target` is already there.
    """
    staging = target.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    with spare_disk(target, 0):
        staging.mkdir()
    try:
        yield staging
        sync_folder(staging)
        if target.exists():
            raise FileExistsError(f"{target} is already there")
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(target.parent)


def sweep(folder: Path, older_than: float = 3600.0) -> None:
    """Remove what writers that were killed left in `folder`: temporary names untouched for `older_than` seconds."""
    for entry in os.scandir(folder):
        if not (entry.name.startswith(".") and entry.name.endswith(TEMPORARY)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - entry.stat(follow_symlinks=False).st_mtime < older_than:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


@contextlib.contextmanager
def spare_disk(path: Path, size: int) -> Iterator[None]:
    """Turn 'disk full' and 'not allowed' inside the block into a StudioError that says how much was needed."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StudioError(
                f"The disk is full: {path.name} needs {megabytes(size)}. What was there before is unharmed. "
                "Free some space and try again."
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise StudioError(f"{path} lies where a file is in the way. Choose another folder.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StudioError(f"Cannot write {path}: {error.strerror}. Choose a folder you may write to.") from error
        raise


def make_folder(path: Path) -> Path:
    """The folder `path`, made with those above it where it isn't there. StudioError when that can't be."""
    with spare_disk(path, 0):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def lock(path: str | Path, timeout: float = 30.0) -> Iterator[None]:
    """Hold `path` against every other process and thread. The file itself stays; its content means nothing.

    The operating system holds the lock, so it falls with its owner, however that dies: there are no stale ones.
    Not re-entrant. StudioError after `timeout` seconds of waiting.
    """
    deadline = time.monotonic() + timeout
    path = Path(path)
    with spare_disk(path, 0):
        file = open(path, "a+b")  # noqa: SIM115 - closed by the next line, outside the translation of errors
    with file:
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise StudioError(
                    f"Another Attune has been busy in {path.parent} for {timeout:.0f} s. Wait for it or stop it, "
                    "then try again."
                )
            time.sleep(
                0.01 + 0.02 * secrets.randbelow(100) / 100
            )  # uneven, so that waiting processes don't march in step
        try:
            yield
        finally:
            _unlock(file)


def is_locked(path: str | Path) -> bool:
    """Whether somebody holds `lock(path)` now. A missing file is not locked. Asking disturbs nobody who asks, too."""
    try:
        with open(path, "r+b") as file:
            free = _try_lock(file, shared=True)
            if free:
                _unlock(file)
            return not free
    except FileNotFoundError:
        return False


def clean_name(name: str, what: str = "name") -> str:
    """`name` as it is shown: NFC, outer spaces gone. Anything printable goes, for it is never used as a path.

    StudioError when empty, longer than 100 characters, or with characters that don't show (controls, line breaks,
    direction overrides).
    """
    clean = unicodedata.normalize("NFC", name[: 20 * NAME_LIMIT]).strip()
    if not clean:
        raise StudioError(f"The {what} is empty. Type one.")
    if len(clean) > NAME_LIMIT or len(name) > 20 * NAME_LIMIT:
        raise StudioError(f"The {what} has {len(name)} characters. Use at most {NAME_LIMIT}.")
    for character in clean:
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        if hidden and character not in _JOINERS:
            raise StudioError(f"The {what} has a character that does not show (U+{ord(character):04X}). Leave it out.")
    return clean


def name_key(name: str) -> str:
    """Names with equal keys are twins: they differ by case, Unicode form or invisible joiners only."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return unicodedata.normalize("NFKC", folded.translate({ord(joiner): None for joiner in _JOINERS})).strip()


def new_id(title: str) -> str:
    """A new folder name: a readable rest of `title` and 8 random hex digits; `[a-z0-9-]` only, safe on every system."""
    ascii_only = unicodedata.normalize("NFKD", title[:NAME_LIMIT]).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:40].strip("-")
    return f"{slug or 'x'}-{secrets.token_hex(4)}"


def check_id(text: str, what: str = "item") -> str:
    """`text` when it has the form that `new_id` makes, else StudioError; so an id from outside can't name a path."""
    if not isinstance(text, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text) or len(text) > 120:
        raise StudioError(f"'{printable(text)}' is not the id of any {what}. Choose one from the list.")
    return text


def printable(text: object, limit: int = 80) -> str:
    """`text` cut and without control or direction characters, fit for a message about somebody's input."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def megabytes(size: int) -> str:
    """A byte count for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 50_000 else f"{size:,} bytes"


def _open_new(path: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _try_lock(file: IO[bytes], shared: bool = False) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _unlock(file: IO[bytes]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_UN)
    else:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
