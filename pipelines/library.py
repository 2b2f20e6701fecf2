"""The concepts on disk. Several processes may use one library: writers take turns, readers never see half a change.

A concept's name is data; its folder's name is made by us. Names and `<tokens>` are unique in the library up to case
and Unicode form, and nothing is ever overwritten: a second "my-cat" becomes "my-cat-2", written <my-cat-2>.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import concept_folder as folders
from pipelines import files
from pipelines.archive import write_zip
from pipelines.concept import Concept, Trained
from pipelines.concept_folder import Entry
from pipelines.errors import StudioError
from pipelines.incoming import read_any
from pipelines.naming import renamed, taken, unique
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.events import Event, Picture
    from pipelines.model import Model

_PATIENCE = 120.0  # seconds to wait for another process that is saving
logger = logging.getLogger(__name__)


class Library:
    """The concepts of one workspace. `name` in every method is a concept's name, its `<token>` or its id."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._trash = workspace.trash / "concepts"
        self._trash.mkdir(exist_ok=True)

    def concepts(self, search: str = "") -> list[Concept]:
        """The concepts in which every word of `search` occurs, sorted by name."""
        return [entry.concept for entry in self.entries(search)]

    def named_in(self, prompt: str) -> list[Concept]:
        """The concepts that have a subject whose token is in a prompt."""
        known = self.concepts() if "<" in prompt else []
        return [one for one in known if any(subject.token in prompt for subject in one.subjects)]

    def entries(self, search: str = "") -> list[Entry]:
        """The same with ids, versions, sizes and previews. Broken ones are left out; see `broken`."""
        words = files.name_key(search).split()
        found = [entry for entry, _ in self._read_all() if entry and all(word in _text(entry) for word in words)]
        return sorted(found, key=lambda entry: (files.name_key(entry.concept.name), entry.id))

    def broken(self) -> dict[str, str]:
        """Folders that hold no sound concept: id -> the reason."""
        return {reason[0]: reason[1] for _, reason in self._read_all() if reason}

    def find(self, name: str) -> Entry:
        """One concept; StudioError with the known names when there is none."""
        key, entries = files.name_key(name), self.entries()
        for entry in entries:
            if key in (files.name_key(entry.concept.name), entry.id):
                return entry
        for entry in entries:
            if key in [files.name_key(subject.token) for subject in entry.concept.subjects]:
                return entry
        known = ", ".join(files.printable(entry.concept.name, 40) for entry in entries[:20])
        raise StudioError(
            f"There is no concept '{files.printable(name)}'. "
            + (f"The library has: {known}." if known else "The library is empty: train a concept or import one.")
        )

    def load(self, name: str) -> Trained:
        """A concept with its tensors (CPU). StudioError when it is missing, damaged or not finite."""
        return folders.read_trained(self.find(name))

    def log(self, name: str) -> list[Event]:
        """Curves and notes of its training; empty when there is no log."""
        from pipelines.eventlog import parse_log

        entry = self.find(name)
        return parse_log(folders.read_file(entry, folders.LOG)) if folders.LOG in entry.files else []

    def save(
        self, trained: Trained, preview: Picture | None = None, log: Path | Sequence[Event] | None = None
    ) -> Concept:
        """Add a trained concept; what comes back has the name and tokens under which it is kept.

        `preview` is a picture (height, width, 3), uint8; `log` the events of its training or the run's folder.
        StudioError when a tensor isn't finite, the schema is broken or the disk is full; the library is then as before.
        """
        from pipelines.eventlog import read_events, training_log

        events = read_events(log) if isinstance(log, Path) else iter(log or ())
        clean = dataclasses.replace(trained.concept, name=files.clean_name(trained.concept.name))
        concept = unique(folders.check_concept(clean.to_json()), self.concepts())
        image = folders.preview_bytes(preview) if preview is not None else b""
        return self._publish(clean, folders.pack(Trained(concept, trained.tensors), image, training_log(events)))

    def rename(self, name: str, new: str, version: int | None = None) -> Concept:
        """Call it `new`; `<old>` becomes `<new>` where that was the token (see `renamed` for several).

        StudioError when `new` is taken or malformed, or when the concept is no longer at `version` (someone edited it).
        """
        new = files.clean_name(new)

        def change(entry: Entry) -> Concept:
            concept = renamed(entry.concept, new)
            others = [other.concept for other in self.entries() if other.id != entry.id]
            if taken(concept, others):
                raise StudioError(
                    f"'{files.printable(new)}' or its word is already in the library. Choose another name."
                )
            return concept

        return self._edit(name, change, version)

    def set_base(self, name: str, base: Mapping[str, str], version: int | None = None) -> Concept:
        """Say which base a concept belongs to: {"id", "fingerprint"} (and "kind")."""
        return self._edit(name, lambda entry: dataclasses.replace(entry.concept, base_model=dict(base)), version)

    def delete(self, name: str) -> str:
        """Move a concept to the trash; the id under which `restore` finds it."""
        with self._writing():
            entry = self.find(name)
            trash_id = f"{entry.id}-{int(time.time()):08x}{secrets.token_hex(2)}"
            os.rename(entry.folder, self._trash / trash_id)
        files.sync_folder(self._trash)
        files.sync_folder(self.workspace.concepts)
        return trash_id

    def trashed(self) -> list[Entry]:
        """What is in the trash, the last deleted first; `id` is the trash id."""
        found = [entry for entry, _ in self._read_all(self._trash) if entry]
        return sorted(found, key=lambda entry: entry.id[-12:], reverse=True)

    def restore(self, trash_id: str) -> Concept:
        """Bring a concept back; with a number after its name when that was taken meanwhile."""
        with self._writing():
            entry = folders.read_entry(self.workspace.folder(self._trash, trash_id, "concept in the trash"))
            concept = unique(entry.concept, self.concepts())
            target = self.workspace.concepts / trash_id[:-13]
            if target.exists():
                target = self.workspace.concepts / files.new_id(concept.name)
            if concept != entry.concept:
                self._write_record(dataclasses.replace(entry, concept=concept))
            os.rename(entry.folder, target)
        files.sync_folder(self.workspace.concepts)
        return concept

    def empty_trash(self, trash_id: str | None = None) -> None:
        """Delete one concept in the trash, or all, for good."""
        with self._writing():
            chosen = [self.workspace.folder(self._trash, trash_id, "concept in the trash")] if trash_id else None
            for folder in chosen or list(self._trash.iterdir()):
                shutil.rmtree(folder)

    def export(self, name: str, path: str | Path) -> Path:
        """Write a concept into one zip at `path`, or into the folder `path`. StudioError when the file is there."""
        entry, path = self.find(name), Path(path)
        path = path / f"{entry.id}.zip" if path.is_dir() else path
        if path.exists():
            raise StudioError(f"{path} is already there. Choose another name.")
        if not path.parent.is_dir():
            raise StudioError(f"There is no folder {path.parent}. Make it first.")
        record = folders.record(entry.concept, entry.files, entry.version)
        write_zip(path, {folders.RECORD: files.json_bytes(record)} | folders.read_files(entry))
        return path

    def export_original(self, name: str, folder: str | Path, base: str = "", form: str = "") -> list[Path]:
        """Write it into `folder` the way its method's own authors do, or in another tool's `form` ("a1111", "peft");
        the files written.

        `base` says where the base lies, for forms that hold all of its weights, where its name alone doesn't.
        """
        from pipelines import formats

        trained = self.load(name)
        if base:
            where = trained.concept.base_model | {"id": base}
            trained = dataclasses.replace(trained, concept=dataclasses.replace(trained.concept, base_model=where))
        return formats.write(trained, Path(folder), form)

    def add(
        self, path: str | Path, *, name: str = "", noun: str = "", base: Mapping[str, str] | None = None
    ) -> Concept:
        """Add a concept from a zip of ours, a lone weights file of ours, or another tool's file or folder, zipped or
        not.

        `name`, `noun` and `base` are for original files, which don't say; a `name` also renames ours.
        StudioError with the reason when the file is refused; nothing has then changed.
        """
        return self._publish(*read_any(Path(path), name=name, noun=noun, base=base))

    def _publish(self, concept: Concept, content: Mapping[str, bytes]) -> Concept:
        """The one place where a concept comes into being: staged, flushed, renamed into place under the lock."""
        self.workspace.need(sum(map(len, content.values())), "the concept")
        with self._writing():
            concept = unique(concept, self.concepts())
            record = folders.record(concept, folders.manifest(content), 1)
            with files.publish_folder(self.workspace.concepts / files.new_id(concept.name)) as staging:
                for name, data in content.items():
                    files.write_atomic(staging / name, data)
                files.write_atomic(staging / folders.RECORD, files.json_bytes(record))
        return concept

    def _edit(self, name: str, change: Callable[[Entry], Concept], version: int | None) -> Concept:
        with self._writing():
            entry = self.find(name)
            if version is not None and entry.version != version:
                raise StudioError(f"'{entry.concept.name}' was changed meanwhile. Reload the list and try again.")
            concept = change(entry)
            self._write_record(dataclasses.replace(entry, concept=concept))
        return concept

    def _write_record(self, entry: Entry) -> None:
        data = folders.record(entry.concept, entry.files, entry.version + 1)
        files.write_atomic(entry.folder / folders.RECORD, files.json_bytes(data))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with files.lock(self.workspace.concepts / ".lock", _PATIENCE):
            yield

    def _read_all(self, parent: Path | None = None) -> Iterator[tuple[Entry | None, tuple[str, str] | None]]:
        parent = parent or self.workspace.concepts
        for folder in parent.iterdir():
            if folder.name.startswith(".") or folder.is_symlink() or not folder.is_dir():
                continue
            try:
                yield folders.read_entry(folder), None
            except StudioError as error:
                if folder.exists():  # else it was deleted while we looked
                    yield None, (folder.name, str(error))


def check_base(concept: Concept, model: Model) -> str:
    """ "" when `concept` was trained on `model`, a warning when its base is unknown (also logged).

    StudioError naming both bases when it belongs to another one.
    """
    mine, theirs = concept.base_model.get("fingerprint", ""), model.fingerprint
    if not mine:
        warning = f"'{concept.name}' does not say for which base it was made; it may not work on {model.id}."
        logger.warning(warning)
        return warning
    if mine != theirs:
        raise StudioError(
            f"'{concept.name}' was trained on {concept.base_model.get('id') or 'another base'} ({mine[:8]}), and "
            f"{model.id} ({theirs[:8]}) is loaded. Load that base, or train the concept again on this one."
        )
    return ""


def _text(entry: Entry) -> str:
    concept = entry.concept
    subjects = (f"{subject.token} {subject.noun}" for subject in concept.subjects)
    return files.name_key(" ".join([concept.name, *subjects, concept.method, concept.base_model["id"]]))
