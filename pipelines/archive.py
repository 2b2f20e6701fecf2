"""A concept as one zip: exactly its files, flat, stored. What others send is read with every suspicion.

Our zips are byte-equal for equal concepts: no dates, no extra fields. On reading, names outside the known four,
doubled names, links, encryption, zip64 and trailing data are refused before anything is unpacked, and nothing of them
is unpacked to disk: the bytes are read up to each file's limit and checked against concept.json.

Zips of other tools' folders are held to the same, but for the names: they are unpacked, below one folder.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from pipelines.concept_folder import LIMITS, RECORD, WEIGHTS
from pipelines.errors import StudioError
from pipelines.files import printable, spare_disk, write_atomic

_END = struct.Struct("<4s4H2LH")  # end of central directory: signature, disks, entries, size, offset, comment length
_DIRECTORY_LIMIT = 64_000  # bytes; four entries need 300
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ZIP_LIMIT = sum(LIMITS.values())
_MOST_FILES = 500  # in somebody else's folder
_PIECE = 1 << 20  # bytes that are unpacked at a time
_CLUTTER = ("__MACOSX", ".DS_Store", "Thumbs.db")  # what file managers add


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    """`files` as a zip at `path`, atomically. The order of `files` doesn't matter."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[name])
    write_atomic(path, buffer.getvalue())


def looks_like_zip(path: Path) -> bool:
    """Whether `path` is a zip with a concept.json in it (a .pt file is a zip, too, but has none)."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with _open(path) as archive:
            return RECORD in archive.namelist()
    except StudioError:
        return path.suffix.lower() == ".zip"


def read_zip(path: Path) -> dict[str, bytes]:
    """The files of a concept's zip by name. StudioError with the reason when it is anything else."""
    with _open(path) as archive:
        entries = archive.infolist()
        _check_entries([entry.filename for entry in entries])
        files = {entry.filename: _read(archive, entry) for entry in entries}
    for name in (RECORD, WEIGHTS):
        if name not in files:
            raise _refused(f"{name} is missing")
    return files


def _open(path: Path) -> zipfile.ZipFile:
    """The zip with its directory read, after a look at the directory's size; zipfile itself would read any amount."""
    size = path.stat().st_size
    if size > _ZIP_LIMIT:
        raise _refused("it is too large")
    with open(path, "rb") as file:
        file.seek(max(0, size - _END.size - 20))
        tail = file.read()
    if len(tail) < _END.size:
        raise _refused("it is too short to be a zip")
    signature, _, _, _, _, directory, _, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\x05\x06" or comment:
        raise _refused("it is cut off, or something stands behind its end")
    if tail.startswith(b"PK\x06\x07") or directory > _DIRECTORY_LIMIT:
        raise _refused("it has too many entries")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _refused(printable(error)) from error


def _check_entries(names: list[str]) -> None:
    for name in names:
        if name not in LIMITS:
            raise _refused(f"it contains '{printable(name)}', which belongs to no concept")
        if names.count(name) > 1:
            raise _refused(f"it contains {name} twice")


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    buffer = io.BytesIO()
    _copy(archive, entry, LIMITS[entry.filename], buffer)
    return buffer.getvalue()


def _copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int, into: IO[bytes]) -> None:
    """One plain file of at most `limit` bytes, and no more of it than the directory says."""
    name = printable(entry.filename)
    kind = entry.external_attr >> 28  # the Unix file type; 0 when not written on Unix, 8 a plain file
    if kind not in (0, 8) or entry.flag_bits & 1:
        raise _refused(f"{name} is a link or encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.file_size > limit:
        raise _refused(f"{name} is too large or packed in an unknown way")
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise _refused(f"{entry.filename} is not as large as it says")
    if entry.file_size > 20 * entry.compress_size + 1_000_000:  # weights are noise, which no packing shrinks
        raise _refused(f"{name} swells beyond reason when unpacked")
    left = entry.file_size
    for piece in _pieces(archive, entry):
        left -= len(piece)
        if left < 0:
            break
        into.write(piece)
    if left:
        raise _refused(f"{name} is not as large as it says")


def _pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(entry) as file:
            while piece := file.read(_PIECE):
                yield piece
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise _refused(f"{printable(entry.filename)} is damaged") from error


def packed_folder(path: Path) -> bool:
    """Whether `path` is a zip of something else than a concept of ours; a .pt, a zip as well, is none by its name."""
    return path.suffix.lower() == ".zip" and zipfile.is_zipfile(path) and not looks_like_zip(path)


def unpack_folder(path: Path, target: Path) -> None:
    """The files of a zipped folder below the new folder `target`. StudioError with the reason when it isn't sound;
    what was unpacked until then is left for the caller to remove."""
    with _open(path) as archive:
        entries = [entry for entry in archive.infolist() if not set(_CLUTTER) & set(entry.filename.split("/"))]
        wanted = {_place(entry.filename): entry for entry in entries if not entry.is_dir()}
        folded = {str(place).casefold() for place in wanted}
        if len(wanted) > _MOST_FILES or sum(entry.file_size for entry in wanted.values()) > _ZIP_LIMIT:
            raise _refused("it holds too much")
        above = {str(folder).casefold() for place in wanted for folder in place.parents}
        if len(folded) < sum(not entry.is_dir() for entry in entries) or folded & above:
            raise _refused("it contains two files of one name")
        for place, entry in wanted.items():
            file = target / place
            with spare_disk(file, entry.file_size):
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as into:
                    _copy(archive, entry, _ZIP_LIMIT, into)


def _place(name: str) -> PurePosixPath:
    """Where a file goes, which is never outside the folder it is unpacked into."""
    place = PurePosixPath(name)
    plain = name.isprintable() and not any(sign in name for sign in '\\:*?"<>|') and len(name) <= 240
    if place.is_absolute() or not plain or ".." in place.parts or not 1 <= len(place.parts) <= 8:
        raise _refused(f"'{printable(name)}' is no place for a file")
    return place


def _refused(reason: str) -> StudioError:
    return StudioError(f"This zip is not taken: {reason}. Export or pack it again and send it as it is.")
