"""MuDI's data folders: photos and masks with `metadata.jsonl`, class pictures with `class_metadata.jsonl`.

    {"id": {"a": "olis blue drink can", "b": "hta red monster plush"}}
    {"id": "a", "file_name": "a00.jpg", "mask_path": "mask_a00.jpg", "text": "A photo of a olis blue drink can ..."}

The first line names the subjects: a rare word and what it is (class pictures: only what it is). Every other line is one
picture; `text` may be a list, of which each step draws one. Blank lines are skipped and a broken one is told by its
number, where the original silently forgets it and all that follow. This is data, not a concept: it has no `detect`.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.files import NAME_LIMIT, make_folder, name_key, printable, write_atomic
from pipelines.formats.numbered import numbered_lines
from pipelines.photos import Photo, load_photo
from pipelines.sources import ClassPicture
from pipelines.tokens import check_token

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE, CLASS_FILE = "metadata.jsonl", "class_metadata.jsonl"
MAX_NAME = 200  # of a file: file systems allow 255 bytes
KEYS = ("id", "file_name", "mask_path", "text")


@dataclass(frozen=True)
class Row:
    """One picture of a subject, and where it is written."""

    id: str
    picture: Path
    mask: Path
    texts: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Dataset:
    """What a metadata file says. `phrases` are the subjects' words by id, in the file's order."""

    file: Path
    phrases: dict[str, str]
    rows: tuple[Row, ...]
    first: int = 1  # the line that names the subjects

    def where(self, line: int) -> str:
        """How a message names a line."""
        return f"{self.file.name}, line {line}"


def is_dataset(folder: Path) -> bool:
    """Whether the folder holds photos in MuDI's form."""
    return (folder / FILE).is_file()


def read_dataset(folder: Path, name: str = FILE) -> Dataset:
    """What the metadata file says, all checked but the pictures' content.

    StudioError, with file and line, for what is no JSON, for fields that are missing, ids that the first line doesn't
    have or has twice, and files that aren't there.
    """
    file = folder / name
    lines = numbered_lines(file)
    first = next(lines, None)
    if first is None:
        raise StudioError(f"{name} is empty. Its first line names the subjects, every other one a picture.")
    phrases = _phrases(f"{name}, line {first[0]}", first[1], twins=name == CLASS_FILE)
    rows = tuple(_row(f"{name}, line {number}", number, content, folder, phrases) for number, content in lines)
    missing = [id for id in phrases if not any(row.id == id for row in rows)]
    if missing:
        raise StudioError(
            f"{name}, line {first[0]}: no other line has a picture of {', '.join(map(repr, missing))}. Add one, or "
            "take the id out."
        )
    return Dataset(file, phrases, rows, first[0])


def read_phrases(file: Path) -> tuple[dict[str, str], str]:
    """The subjects' words by id, from the first line alone, and where they stand ("metadata.jsonl, line 1").

    StudioError, with file and line, when it names none.
    """
    number, content = next(numbered_lines(file), (1, {}))
    where = f"{file.name}, line {number}"
    return _phrases(where, content, twins=False), where


def subjects_of(dataset: Dataset, names: Mapping[str, str] | None = None) -> tuple[tuple[Subject, ...], str]:
    """The subjects and their rare words, as a method's `rare_word` takes them: (Subject("<a>", "blue drink can"), ...)
    and "olis hta". `names` gives an id another name than itself.

    The first word of a phrase is the rare one, as the format has it; a phrase of one word has none, and then nobody.
    StudioError, with file and line, when two have the same.
    """
    where = dataset.where(dataset.first)
    subjects, rare = words_of(dataset.phrases, where, names)
    words = rare.casefold().split()
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice:
        raise StudioError(f"{where}: two subjects begin with '{printable(twice)}'. Give each a rare word of its own.")
    return subjects, rare


def words_of(
    phrases: Mapping[str, str], where: str, names: Mapping[str, str] | None = None
) -> tuple[tuple[Subject, ...], str]:
    """`subjects_of` for the phrases alone; `where` they stand is for messages."""
    parts = {id: phrase.split(maxsplit=1) for id, phrase in phrases.items()}
    rare = all(len(part) == 2 for part in parts.values())
    found = []
    for id, phrase in phrases.items():
        found.append(Subject(_token(where, id, names), parts[id][1] if rare else phrase))
    return tuple(found), " ".join(part[0] for part in parts.values()) if rare else ""


def photos_of(dataset: Dataset, *, short_side: int = 0, names: Mapping[str, str] | None = None) -> list[Photo]:
    """The photos, each with its subject's mask and with `<name>` in its caption where the phrase stands.

    StudioError, with file and line, for a picture or a mask that is broken, empty or of another size, and for a text
    that doesn't say the phrase.
    """
    photos = []
    for row in dataset.rows:
        token = _token(dataset.where(dataset.first), row.id, names)
        name = token.strip("<>")
        words = r"\s+".join(map(re.escape, dataset.phrases[row.id].split()))
        phrase = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
        said = [phrase.subn(lambda _, token=token: token, text) for text in row.texts]  # type: ignore[misc]
        silent = [text for text, (_, count) in zip(row.texts, said, strict=True) if not count]
        if silent:
            raise StudioError(
                f"{dataset.where(row.line)}: the text '{printable(silent[0])}' doesn't say "
                f"'{printable(dataset.phrases[row.id])}', so nothing ties it to '{printable(row.id)}'. Write it there."
            )
        captions = "\n".join(text for text, _ in said)
        photos.append(replace(_photo(dataset, row, name, short_side), caption=captions, shows=(name,)))
    return photos


def class_pictures_of(
    dataset: Dataset, *, short_side: int = 0, names: Mapping[str, str] | None = None
) -> list[ClassPicture]:
    """Class pictures with their texts and masks, as `prepare(prior=...)` takes them. StudioError as `photos_of`."""
    pictures = []
    for row in dataset.rows:
        photo = _photo(dataset, row, row.id, short_side)
        token = _token(dataset.where(dataset.first), row.id, names)
        pictures.append(ClassPicture(photo.image, "\n".join(row.texts), token, photo.masks[row.id]))
    return pictures


def write_dataset(folder: Path, phrases: Mapping[str, str], photos: Sequence[Photo], name: str = FILE) -> Path:
    """Photos with their masks (PNG) and the metadata file that names them; the file written.

    `phrases` are the subjects' words by name: "olis blue drink can", and "drink can" for class pictures. A caption's
    `<name>` becomes the phrase. StudioError for a photo that shows not exactly one of them, or has no mask of it.
    """
    if (folder / name).exists():
        raise StudioError(f"{folder / name} is already there. Choose another folder.")
    make_folder(folder)
    prefix = "" if name == FILE else "img_"
    plain = all(re.fullmatch(r"\w+", subject, re.ASCII) for subject in phrases)
    lines: list[dict[str, Any]] = [{"id": dict(phrases)}]
    counts = dict.fromkeys(phrases, 0)
    for photo in photos:
        subject, mask = _only(photo, phrases)
        stem = f"{subject if plain else list(phrases).index(subject)}_{counts[subject]:02d}"
        counts[subject] += 1
        row = {"id": subject, "file_name": f"{prefix}{stem}.png", "mask_path": f"mask_{prefix}{stem}.png"}
        texts = (photo.caption or f"A photo of a <{subject}>").replace(f"<{subject}>", phrases[subject]).splitlines()
        lines.append(row | {"text": texts if len(texts) > 1 else texts[0]})
        write_atomic(folder / row["file_name"], png(photo.image))
        write_atomic(folder / row["mask_path"], png(mask))
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(folder / name, content.encode())
    return folder / name


def _only(photo: Photo, phrases: Mapping[str, str]) -> tuple[str, NDArray[Any]]:
    """The subject that a photo shows, and its mask."""
    shown = [name for name in (photo.shows or tuple(phrases)) if name in phrases]
    if len(shown) != 1:
        raise StudioError(f"{photo.path.name} must show one subject alone, not {len(shown)}. Leave it out.")
    mask = photo.masks.get(shown[0], photo.masks.get(""))
    if mask is None:
        raise StudioError(f"{photo.path.name} has no mask of {shown[0]}. Make one first.")
    return shown[0], mask


def _phrases(where: str, content: dict[str, Any], *, twins: bool) -> dict[str, str]:
    """The subjects of the first line. Two of one class (`twins`) may share a phrase, two subjects may not."""
    named = content.get("id")
    if not isinstance(named, dict) or not named:
        raise StudioError(f'{where} must name the subjects first, as {{"id": {{"a": "olis drink can"}}}}.')
    for id, phrase in named.items():
        if len(id) > NAME_LIMIT:
            raise StudioError(f"{where}: the name '{printable(id)}' is too long. Use at most {NAME_LIMIT} characters.")
        if not isinstance(phrase, str) or not phrase.strip():
            raise StudioError(f"{where}: '{printable(id)}' needs a phrase, such as \"olis drink can\".")
    keys = [name_key(id) for id in named]
    alike = [id for id, key in zip(named, keys, strict=True) if keys.count(key) > 1]
    if alike:
        raise StudioError(f"{where}: {' and '.join(map(repr, alike))} are too much alike. Give each its own name.")
    said = [" ".join(phrase.casefold().split()) for phrase in named.values()]
    twice = next((phrase for phrase in said if said.count(phrase) > 1), None)
    if twice and not twins:
        raise StudioError(f"{where} calls two subjects '{printable(twice)}'. Give each a rare word of its own.")
    return {id: " ".join(phrase.split()) for id, phrase in named.items()}


def _row(where: str, number: int, content: dict[str, Any], folder: Path, phrases: Mapping[str, str]) -> Row:
    for key in KEYS:
        if key not in content:
            close = difflib.get_close_matches(key, set(content) - set(KEYS), n=1, cutoff=0.5)
            hint = f"It has '{printable(close[0])}': is that it?" if close else f"Every line has {', '.join(KEYS)}."
            raise StudioError(f"{where} has no '{key}'. {hint}")
    id = content["id"]
    if not isinstance(id, str) or id not in phrases:
        raise StudioError(f"{where} is about '{printable(id)}', but the first line names {', '.join(phrases)}.")
    texts = content["text"] if isinstance(content["text"], list) else [content["text"]]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise StudioError(f"{where}: 'text' must be the picture's caption, or a list of them.")
    picture, mask = (_path(where, key, content[key], folder) for key in ("file_name", "mask_path"))
    return Row(id, picture, mask, tuple(" ".join(text.split()) for text in texts), number)


def _path(where: str, key: str, name: Any, folder: Path) -> Path:
    """A file in the folder, never outside it."""
    if not isinstance(name, str) or not name or "\0" in name or len(name) > MAX_NAME:
        raise StudioError(f"{where}: '{key}' must be the name of a file in the folder.")
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise StudioError(f"{where}: '{printable(name)}' lies outside the folder. Copy it into the folder.")
    if not path.is_file():
        what = "mask" if key == "mask_path" else "picture"
        raise StudioError(f"{where}: there is no {what} '{printable(name)}'. Put it there, or take the line out.")
    return path


def _photo(dataset: Dataset, row: Row, name: str, short_side: int) -> Photo:
    try:
        return load_photo(row.picture, {name: row.mask}, short_side=short_side)
    except StudioError as error:
        raise StudioError(f"{dataset.where(row.line)}: {error}") from error


def _token(where: str, id: str, names: Mapping[str, str] | None) -> str:
    if names and names.get(id, id) != id:
        return check_token(f"<{names[id]}>")  # a person's own word, not the file's
    try:
        return check_token(f"<{id}>")
    except StudioError as error:
        raise StudioError(f"{where}: {error}") from error


def png(picture: NDArray[Any]) -> bytes:
    """A picture or a mask as a PNG file's content. Packed quickly: a fifth of the time for a fifth more room."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
