"""Other tools' files. A module of this folder that has `detect` is a format, found by looking; none is listed by hand.

A format module has these names (see `Format`):

    method: str                              which of our methods its tensors belong to
    title: str                               for people: "SVDiff spectral shifts"
    detect(path) -> bool                     cheap and without unpickling: by file names and safetensors headers
    read(path) -> dict                       "tensors": what the method's Adapter.load takes; "params": settings it
                                             implies, may be {}; also "noun", "name", "base" if known, and for
                                             several subjects "subjects", their tokens, and "nouns"
    write(path, trained) -> list[Path]       the files written into the folder `path`, in the other tool's form

A module may offer further forms to write, for concepts of any method: `forms`, {name: a function like `write`}.
Pickled files (.pt, .bin) are read through `jail.read_tensors` only.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any, Protocol, cast

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import printable


class Format(Protocol):
    """What a module here has when it is a format."""

    method: str
    title: str

    def detect(self, path: Path) -> bool:
        """Whether `path` (a file or a folder) looks like this format. Never raises on foreign files."""
        ...

    def read(self, path: Path) -> dict[str, Any]:
        """Its content in our terms; StudioError when it is broken."""
        ...

    def write(self, path: Path, trained: Trained) -> list[Path]:
        """Write `trained` into the folder `path`; the files written."""
        ...


def formats() -> dict[str, Format]:
    """Every format in this folder by module name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: cast(Format, module) for name, module in modules.items() if hasattr(module, "detect")}


def detect(path: Path) -> str:
    """The name of the first format that recognises `path`; StudioError when none does."""
    known = formats()
    for name, form in known.items():
        if form.detect(path):
            return name
    titles = ", ".join(form.title for form in known.values())
    raise StudioError(
        f"'{printable(path.name)}' is no concept that Attune knows. It reads its own .zip files and: {titles}."
    )


def read(path: Path) -> dict[str, Any]:
    """The content of an original file, with "method" and "format" added; StudioError when unknown or broken."""
    name = detect(path)
    form = formats()[name]
    return {"method": form.method, "format": name} | form.read(path)


def write(trained: Trained, folder: Path, form_name: str = "") -> list[Path]:
    """Write a concept the way its method's own authors do, or in one of the further forms.

    StudioError when no format belongs to the method, there is no such form, or it can't hold the concept.
    """
    if form_name:
        known = {name: write for form in formats().values() for name, write in getattr(form, "forms", {}).items()}
        if form_name not in known:
            raise StudioError(f"There is no form '{printable(form_name)}'. Choose {' or '.join(sorted(known))}.")
        return cast(list[Path], known[form_name](folder, trained))
    for form in formats().values():
        if form.method == trained.concept.method:
            return form.write(folder, trained)
    raise StudioError(f"Nobody else has a file form for '{trained.concept.method}'. Export the concept as a zip.")
