"""Concepts that come from elsewhere: our own zips and weights files, and other tools' original files and folders, also
zipped."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipelines import concept_folder as folders
from pipelines import files
from pipelines.archive import looks_like_zip, packed_folder, read_zip, unpack_folder
from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.intake import load_tensors, parse_json, parse_tensors
from pipelines.naming import renamed, token_of

UNKNOWN_BASE = {"id": "", "fingerprint": ""}


def read_any(
    path: Path, *, name: str = "", noun: str = "", base: Mapping[str, str] | None = None
) -> tuple[Concept, dict[str, bytes]]:
    """A concept and its files (without concept.json) from whatever `path` is; StudioError says why not."""
    if not path.exists():
        raise StudioError(f"There is no file {files.printable(path)}. Check the path.")
    if path.is_file() and looks_like_zip(path):
        concept, content = read_own_zip(path)
        return _adjusted(concept, name, base), content
    if path.is_file() and packed_folder(path):
        # a format may look for files in the folders above, and must not find any that aren't of the zip
        with tempfile.TemporaryDirectory(prefix="attune-import-") as temporary:
            target = Path(temporary, "a", "b", "c", "d", path.stem)
            unpack_folder(path, target)
            return _read_other(_content(target), name, noun, base)
    return _read_other(path, name, noun, base)


def _read_other(path: Path, name: str, noun: str, base: Mapping[str, str] | None) -> tuple[Concept, dict[str, bytes]]:
    """A lone weights file of ours, or another tool's file or folder."""
    concept_or_none = folders.own_concept(path) if path.is_file() and path.suffix == ".safetensors" else None
    if concept_or_none is None:
        trained = import_original(path, name=name, noun=noun, base=base)
    else:
        _check_method(concept_or_none)
        trained = Trained(_adjusted(concept_or_none, name, base), load_tensors(path)[0])
    return trained.concept, folders.pack(trained)


def _content(folder: Path) -> Path:
    """What a zip is about: its folder, or the only thing in it where somebody packed that one."""
    from pipelines import formats

    inside = list(folder.iterdir()) if folder.is_dir() else []
    if len(inside) != 1 or any(form.detect(folder) for form in formats.formats().values()):
        return folder
    return _content(inside[0])


def read_own_zip(path: Path) -> tuple[Concept, dict[str, bytes]]:
    """A zip that the library exported: everything in it checked against its concept.json."""
    from pipelines.eventlog import parse_log

    content = read_zip(path)
    concept, _, listed = folders.check_record(parse_json(content.pop(folders.RECORD), "concept.json"))
    if set(listed) != set(content):
        raise StudioError("This zip is not taken: its files are not those that concept.json names. Export it again.")
    for item, data in content.items():
        folders.check_file(item, data, listed[item])
    parse_tensors(content[folders.WEIGHTS], folders.WEIGHTS)
    if folders.PREVIEW in content:
        folders.check_preview(content[folders.PREVIEW])
    parse_log(content.get(folders.LOG, b""))
    _check_method(concept)
    return concept, content


def import_original(path: Path, *, name: str, noun: str, base: Mapping[str, str] | None = None) -> Trained:
    """Another tool's file as a concept, not yet in the library. Empty `name` or `noun`: the file's own, if it says.

    Original files don't name their base: without `base` it stays unknown, which `check_base` warns about.
    StudioError when no format knows the file, the noun is missing, or its settings don't fit our method.
    """
    from pipelines import formats
    from pipelines.methods import get_method
    from pipelines.settings import validated

    found = formats.read(path)
    name = files.clean_name(name or found.get("name", "") or path.stem)
    tokens = found.get("subjects", [token_of(name)])
    nouns = found.get("nouns", [noun or found.get("noun", "")] * len(tokens))
    nouns = [files.clean_name(one, "noun (the ordinary word for it, such as cat)") for one in nouns]
    params = validated(get_method(found["method"]).Params, found.get("params", {}))
    return Trained(
        Concept(
            name=name,
            subjects=tuple(Subject(token, one) for token, one in zip(tokens, nouns, strict=True)),
            method=found["method"],
            base_model=dict(base or found.get("base") or UNKNOWN_BASE),
            params=params.model_dump(mode="json"),
            recipe={
                "imported": files.printable(path.name),
                "format": found["format"],
                "notes": list(found.get("notes", ())),
            },
        ),
        found["tensors"],
    )


def _adjusted(concept: Concept, name: str, base: Mapping[str, str] | None) -> Concept:
    concept = renamed(concept, files.clean_name(name)) if name else concept
    return dataclasses.replace(concept, base_model=dict(base)) if base else concept


def _check_method(concept: Concept) -> None:
    from pipelines.methods import method_names

    if concept.method not in method_names():
        raise StudioError(
            f"'{files.printable(concept.name)}' needs the method '{concept.method}', which this Attune doesn't have. "
            "Update Attune, then import it again."
        )
