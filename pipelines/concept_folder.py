"""One concept on disk: concept.json + weights.safetensors + preview.png + run.jsonl, checked before it's believed.

concept.json holds the fields of `Concept`, a `version` that every edit raises, and `files` with the size and SHA-256 of
the others. The weights also carry the concept in their own metadata (ours and modelspec 1.0.1), so that a lone
weights file can find its way back.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import intake
from pipelines.concept import Concept, Trained
from pipelines.errors import StudioError
from pipelines.files import clean_name, megabytes, printable, tensor_bytes

if TYPE_CHECKING:
    from pipelines.events import Picture

RECORD, WEIGHTS, PREVIEW, LOG = "concept.json", "weights.safetensors", "preview.png", "run.jsonl"
LIMITS = {RECORD: intake.JSON_LIMIT, WEIGHTS: intake.WEIGHTS_LIMIT, PREVIEW: 4_000_000, LOG: 64_000_000}  # bytes
MINE = "attune.concept"  # metadata key of the concept's JSON
_PREVIEW_SIDE = 512
_PREVIEW_LIMIT = 2048  # px a side of somebody else's preview
_TOKEN = re.compile(r"<\w[\w.-]{0,98}>")
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}


@dataclass(frozen=True)
class Entry:
    """A concept in the library without its tensors. Everything but `concept` is the library's own."""

    id: str  # the folder's name, made by us
    concept: Concept
    version: int
    folder: Path
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}

    @property
    def preview(self) -> Path | None:
        """The thumbnail, when there is one."""
        return self.folder / PREVIEW if PREVIEW in self.files else None

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(item["bytes"] for item in self.files.values())


def pack(trained: Trained, preview: bytes = b"", log: bytes = b"") -> dict[str, bytes]:
    """The files of a concept apart from concept.json. StudioError when a tensor isn't finite."""
    import torch

    for name, tensor in trained.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StudioError(
                f"'{trained.concept.name}' was not saved: '{name}' holds NaN or infinite numbers. "
                "Train again with a lower learning rate."
            )
    data = tensor_bytes(trained.tensors, _metadata(trained))
    return {WEIGHTS: data} | ({PREVIEW: preview} if preview else {}) | ({LOG: log} if log else {})


def record(concept: Concept, files: Mapping[str, Mapping[str, Any]], version: int) -> dict[str, Any]:
    """concept.json as data; StudioError when the concept breaks the schema, so that what is written can be read."""
    for name, item in files.items():
        if item["bytes"] > LIMITS[name]:
            raise StudioError(
                f"{name} has {megabytes(item['bytes'])}, more than {megabytes(LIMITS[name])} can be kept."
            )
    data = json.loads(json.dumps(concept.to_json(), allow_nan=False))
    data |= {"version": version, "files": {name: dict(item) for name, item in files.items()}}
    check_record(data)
    return data


def manifest(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, by name, so that equal concepts have equal records."""
    return {name: {"bytes": len(data), "sha256": intake.sha256(data)} for name, data in sorted(files.items())}


def read_entry(folder: Path) -> Entry:
    """concept.json alone, checked. Quick, without torch. StudioError when it is missing or broken."""
    data = intake.read_json(folder / RECORD, LIMITS[RECORD])
    concept, version, files = check_record(data)
    return Entry(folder.name, concept, version, folder, files)


def read_files(entry: Entry) -> dict[str, bytes]:
    """Every file the record names, as it was written. StudioError when one is damaged."""
    return {name: read_file(entry, name) for name in entry.files}


def read_file(entry: Entry, name: str) -> bytes:
    """One file, compared with the record's size and checksum."""
    data = intake.read_bytes(entry.folder / name, LIMITS[name])
    return check_file(name, data, entry.files[name])


def read_trained(entry: Entry) -> Trained:
    """The concept with its tensors; StudioError when the weights are damaged or not finite."""
    tensors, _ = intake.parse_tensors(read_file(entry, WEIGHTS), f"The weights of '{entry.concept.name}'")
    return Trained(entry.concept, tensors)


def check_file(name: str, data: bytes, item: Mapping[str, Any]) -> bytes:
    """`data` when it is what the manifest says, else StudioError."""
    if len(data) != item["bytes"] or intake.sha256(data) != item["sha256"]:
        raise StudioError(f"{name} is damaged: it is not what was saved. Import the concept again or train it anew.")
    return data


def check_record(data: dict[str, Any]) -> tuple[Concept, int, dict[str, dict[str, Any]]]:
    """The parts of a concept.json; StudioError with the reason when it breaks the schema."""
    data = dict(data)
    version, files = data.pop("version", None), data.pop("files", None)
    _need(type(version) is int and version >= 1, "its version is no number")
    _need(isinstance(files, dict) and WEIGHTS in files, "it names no weights")
    for name, item in files.items() if isinstance(files, dict) else ():
        _need(name in LIMITS and name != RECORD, f"it names the unknown file '{printable(name)}'")
        _need(isinstance(item, dict) and set(item) == {"bytes", "sha256"}, f"the entry of {name} is malformed")
        sound = type(item["bytes"]) is int and 0 <= item["bytes"] <= LIMITS[name]
        _need(sound and isinstance(item["sha256"], str), f"the entry of {name} is malformed")
    return check_concept(data), int(version or 0), files or {}


def check_concept(data: dict[str, Any]) -> Concept:
    """`data` (JSON) as a Concept; StudioError unless every field is present, known and sound."""
    known = {field.name for field in dataclasses.fields(Concept)}
    _need(data.get("format") == 1, "it was written by a newer Attune, or by something else")
    _need(set(data) <= known, f"it has the unknown field '{printable(min(set(data) - known, default=''))}'")
    try:
        concept = Concept.from_json(data)
    except (KeyError, TypeError) as error:
        raise StudioError(f"concept.json is broken: {printable(error)}. Get it again from its source.") from error
    _need(isinstance(concept.name, str) and clean_name(concept.name) == concept.name, "its name is not clean")
    _need(bool(re.fullmatch(r"[a-z][a-z0-9_]{0,40}", str(concept.method))), "its method has no sound name")
    _need(type(concept.seed) is int and 0 <= concept.seed < 2**63, "its seed is no number")
    stamp = concept.created
    _need(isinstance(stamp, int | float) and not isinstance(stamp, bool) and 0 <= stamp < 1e11, "its date is no date")
    _need(isinstance(concept.params, dict) and isinstance(concept.recipe, dict), "its settings are no table")
    _check_base(concept.base_model)
    _need(1 <= len(concept.subjects) <= 64, "it has no subject, or too many")
    for subject in concept.subjects:
        _need(
            isinstance(subject.token, str) and bool(_TOKEN.fullmatch(subject.token)), "a subject's <name> is malformed"
        )
        _need(isinstance(subject.noun, str) and clean_name(subject.noun, "noun") == subject.noun, "a noun is not clean")
    tokens = [subject.token for subject in concept.subjects]
    _need(len(set(tokens)) == len(tokens), "two subjects have the same <name>")
    return concept


def preview_bytes(image: Picture) -> bytes:
    """A picture (height, width, 3), uint8, as a PNG of at most 512 px a side."""
    from PIL import Image

    small = Image.fromarray(image)
    small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def check_preview(data: bytes) -> bytes:
    """A stranger's preview.png, when it is a PNG of a sound size that decodes; else StudioError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if max(image.size) > _PREVIEW_LIMIT:  # from the header: nothing is decoded yet
                raise StudioError(f"preview.png is larger than {_PREVIEW_LIMIT} px. Take it out of the zip.")
            image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise StudioError("preview.png is no sound PNG. Take it out of the zip, or get the file again.") from error
    return data


def own_concept(path: Path) -> Concept | None:
    """The concept that a lone weights file of ours carries; None when it is not ours."""
    text = intake.read_header(path).get("__metadata__", {}).get(MINE)
    return check_concept(intake.parse_json(text.encode(), "The file's description")) if text else None


def _metadata(trained: Trained) -> dict[str, str]:
    """Strings only: our own description, and modelspec's for other programs."""
    concept = trained.concept
    numbers = tensor_bytes(trained.tensors)
    tokens = " ".join(subject.token for subject in concept.subjects)
    base = concept.base_model
    family = _ARCHITECTURES.get(base.get("kind", ""), base.get("kind") or "unknown")
    moment = datetime.datetime.fromtimestamp(concept.created, datetime.UTC)
    return {
        MINE: json.dumps(concept.to_json(), allow_nan=False),
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/{concept.method}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": concept.name,
        "modelspec.description": f"{concept.method} concept for {base.get('id') or 'an unknown base'}",
        "modelspec.date": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.trigger_phrase": tokens,
        "modelspec.hash_sha256": "0x" + intake.sha256(numbers[8 + int.from_bytes(numbers[:8], "little") :]),
    }


def _check_base(base: Any) -> None:
    sound = isinstance(base, dict) and {"id", "fingerprint"} <= set(base) <= {"id", "fingerprint", "kind"}
    sound = sound and all(
        isinstance(value, str) and len(value) <= 1000 and value.isprintable() for value in base.values()
    )
    _need(sound, "its base model is malformed")
    _need(bool(re.fullmatch(r"[0-9a-zA-Z:-]{0,128}", base["fingerprint"])), "its base's fingerprint is malformed")


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise StudioError(f"concept.json is broken: {reason}. Get it again from its source.")
