"""What comes in from a file is checked before it is believed: bounded JSON and bounded, finite tensors."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import StudioError
from pipelines.files import megabytes, printable

if TYPE_CHECKING:
    from torch import Tensor

JSON_LIMIT = 1_000_000
WEIGHTS_LIMIT = 4_000_000_000  # bytes; a whole SD 2.1 UNet in fp32 fits
_HEADER_LIMIT = 4_000_000
_TENSORS_LIMIT = 20_000
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file; StudioError when it is missing, not a plain file, or larger than `limit` bytes."""
    if path.is_symlink() or not path.is_file():
        raise StudioError(f"'{printable(path.name)}' is missing or is no plain file. Choose another file.")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise StudioError(f"Cannot read '{printable(path.name)}': {error.strerror}. Check its permissions.") from error
    if len(data) > limit:
        raise StudioError(f"'{printable(path.name)}' is larger than {megabytes(limit)}. It cannot be what it claims.")
    return data


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without the traps: doubled keys, NaN, infinite or endless numbers, bottomless nesting.

    StudioError that names `what` and the reason.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else printable(error, 120)
        raise StudioError(f"{what} is not sound JSON ({reason}). Get the file again from its source.") from error
    if not isinstance(value, dict):
        raise StudioError(f"{what} holds no JSON object. Get the file again from its source.")
    return value


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """`parse_json` of a file of at most `limit` bytes."""
    return parse_json(read_bytes(path, limit), f"'{printable(path.name)}'")


def load_tensors(path: Path, limit: int = WEIGHTS_LIMIT) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU. StudioError unless sound, finite and within limits."""
    return parse_tensors(read_bytes(path, limit), f"'{printable(path.name)}'")


def parse_tensors(data: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`load_tensors` for bytes in memory."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    header = parse_header(data, what)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _broken(what, error) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StudioError(
                f"{what} holds NaN or infinite numbers in '{printable(name)}': its training went wrong or the file is "
                "damaged. Use an earlier version."
            )
    return tensors, header.get("__metadata__", {})


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file without its tensors: name -> {"dtype", "shape", "data_offsets"}, "__metadata__".

    StudioError when it isn't one.
    """
    what, size = f"'{printable(path.name)}'", path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise _broken(what, "its header has an impossible length")
        return _check_header(parse_json(file.read(length), what), size - 8 - length, what)


def parse_header(data: bytes, what: str) -> dict[str, Any]:
    """`read_header` for bytes in memory."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_HEADER_LIMIT, len(data) - 8):
        raise _broken(what, "its header has an impossible length")
    return _check_header(parse_json(data[8 : 8 + length], what), len(data) - 8 - length, what)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def _check_header(header: dict[str, Any], size: int, what: str) -> dict[str, Any]:
    """Every entry has a known type and a shape that fits its bytes; the bytes lie end to end, no holes, no overlap."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(what, "its metadata is not text")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > _TENSORS_LIMIT:
        raise _broken(what, f"it holds {len(entries)} tensors, more than {_TENSORS_LIMIT}")
    spans = sorted(_span(name, entry, what) for name, entry in entries.items())
    end = 0
    for start, stop in spans:
        if start != end:
            raise _broken(what, "its tensors overlap or leave holes")
        end = stop
    if end != size:
        raise _broken(what, f"it should hold {end} bytes of numbers and holds {size}")
    return header


def _span(name: str, entry: Any, what: str) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(what, f"the entry '{printable(name)}' is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _broken(what, f"'{printable(name)}' has the unknown number type '{printable(dtype, 20)}'")
    if not _counts(shape) or len(shape) > 8 or not _counts(offsets) or len(offsets) != 2:
        raise _broken(what, f"'{printable(name)}' has no sound shape")
    if offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _broken(what, f"the shape of '{printable(name)}' does not fit its bytes")
    return offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _broken(what: str, reason: object) -> StudioError:
    return StudioError(
        f"{what} is not a sound safetensors file: {printable(reason, 160)}. Get it again from its source."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same key stands twice")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _short(text: str) -> int:
    if len(text) > 19:
        raise ValueError("a number is too long")
    return int(text)
