"""Hostile names and files through every door: refused with a sentence or kept as data, and never outside."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.events import Finished
from pipelines.intake import JSON_LIMIT, parse_json, parse_tensors, read_bytes, read_header
from pipelines.library import Library
from pipelines.workspace import Workspace
from studio.jobs import JobRunner
from tests.concepts import trained

NAMES = [
    "", " ", ".", "..", "...", "../x", "../../../../tmp/x", "/etc/passwd", "\\\\host\\share", "..\\x", "C:\\x", "C:x",
    "a/b", "a\\b", "a\0b", "\0", "CON", "NUL.txt", "con", "aux.", "COM1", "x.", "x ", " x", "-rf", "--help", "~",
    "~root", "$HOME", "`id`", "$(id)", "; rm -rf *", "|", "*", "?", "<", ">", '"', "'", "%n%s", "{0.__class__}", "{}",
    "%00", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\x1b[31mred\x1b[0m", "\x07",
    "\r\nSet-Cookie: x", "\u202egnp.exe", "\u2066x", "\u200b", "\ufeff", "\ud800", "e\u0301", "\u00e9", "Cat", "cat",
    "CAT", "ＣＡＴ", "猫", "🐈", "👩\u200d👧", "İ", "ß", "ſ", ".hidden", ".git", ".lock", "concept.json", "__proto__",
    "constructor", "a" * 100, "a" * 101, "a" * 255, "é" * 100, "x" * 10_000, "\n", "a\nb", "a\tb", "\u2028", "null",
    "None", "0", "1e999", "my cat", "__init__",
]  # fmt: skip


def snapshot(root: Path, without: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below `root` but those below `without`, with its size and time of change."""
    found = {}
    for path in root.rglob("*"):
        if not path.is_relative_to(without):
            state = path.lstat()
            found[str(path)] = (state.st_size, state.st_mtime_ns)
    return found


@pytest.fixture
def library(tmp_path: Path) -> Library:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "concept.json").write_text("{}")
    return Library(Workspace(tmp_path / "a" / "b" / "workspace"))


@pytest.fixture
def untouched(tmp_path: Path, library: Library) -> Iterator[None]:
    root = library.workspace.root
    before = snapshot(tmp_path, root)
    yield
    assert snapshot(tmp_path, root) == before
    for parent in (library.workspace.concepts, library.workspace.runs, library.workspace.trash / "concepts"):
        for path in parent.iterdir():
            assert path.name.isascii() and path.name.replace("-", "").replace(".", "").isalnum(), path.name


def attempt(action: Callable[[], object]) -> object | None:
    """The result, or None when it was refused the proper way."""
    try:
        return action()
    except StudioError as error:
        assert str(error).replace("\N{REPLACEMENT CHARACTER}", "").isprintable() and len(str(error)) < 1000
        return None


def test_names_as_concepts_are_refused_or_data(library: Library, untouched: None) -> None:
    kept: list[Concept] = []
    for name in NAMES:
        concept = attempt(lambda name=name: library.save(trained(name, token="<x>")))
        if isinstance(concept, Concept):
            kept.append(concept)
            assert torch.equal(library.load(concept.name).tensors["layer.0"], trained().tensors["layer.0"])
    assert 40 < len(kept) < len(NAMES) and not library.broken()
    keys = [concept.name for concept in library.concepts()]
    assert len(set(keys)) == len(kept) == len(keys)  # no twin has overwritten another


def test_names_in_every_other_door(library: Library, untouched: None) -> None:
    library.save(trained())
    doors: list[Callable[[str], object]] = [
        library.find, library.load, library.log, library.restore, library.delete, library.empty_trash,
        lambda text: library.rename("my-cat", text), lambda text: library.rename(text, "new name"),
        lambda text: library.set_base("my-cat", {"id": text, "fingerprint": text}), library.concepts,
        lambda text: library.workspace.folder(library.workspace.runs, text),
        lambda text: library.save(trained(token=text)), lambda text: library.save(trained(noun=text)),
        lambda text: library.save(Trained(replace(trained().concept, method=text), {})),
    ]  # fmt: skip
    for text in NAMES:
        for door in doors:
            if door == library.empty_trash and not text:
                continue  # "" means all
            attempt(lambda door=door, text=text: door(text))
            if not library.concepts():
                library.save(trained())
            elif "my-cat" not in (names := [concept.name for concept in library.concepts()]):
                library.rename(names[0], "my-cat")
        for concept in library.concepts():
            if concept.name != "my-cat":
                library.delete(concept.name)
    assert not library.broken()


def test_names_as_jobs(library: Library, untouched: None) -> None:
    runner = JobRunner(library.workspace)
    try:
        for text in NAMES:
            runner.submit(text, lambda: iter([Finished(None)]), meta={"name": text})
            if text:
                attempt(lambda text=text: runner.submit("x", lambda: iter([Finished(None)]), job_id=text))
            runner.cancel(text)
        assert all(job.wait(10) for job in runner.jobs())
        assert len(runner.history()) >= len(NAMES)
    finally:
        runner.close()


def weights() -> bytes:
    return save(trained().tensors, {"note": "x"})


def test_mutated_safetensors_are_refused_or_sound() -> None:
    dice, sound = random.Random(1), weights()
    began = time.process_time()
    for turn in range(1500):
        data = bytearray(sound)
        for _ in range(dice.choice([1, 1, 2, 8])):
            kind, position = dice.randrange(4), dice.randrange(len(data))
            if kind == 0:
                data[position] ^= 1 << dice.randrange(8)
            elif kind == 1:
                data[: min(8, len(data))] = dice.randbytes(min(8, len(data)))
            elif kind == 2:
                data = data[:position] or data
            else:
                data[position:position] = dice.randbytes(dice.randrange(1, 9))
        with contextlib.suppress(StudioError):
            tensors, metadata = parse_tensors(bytes(data), f"case {turn}")
            assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
            assert all(isinstance(value, str) for value in metadata.values())
    assert time.process_time() - began < 60


def headed(header: object, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


F8 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 8, b"\xff" * 8, headed({}, b"x"), headed(b"[]"), headed(b"{" * 100_000), headed({"a": 1}),
        headed({"a": F8}), headed({"a": F8, "b": F8}, b"\0" * 8), headed({"a": F8 | {"dtype": "F8_E8M0"}}, b"\0" * 8),
        headed({"a": F8 | {"shape": [2**62, 2**62]}}, b"\0" * 8), headed({"a": F8 | {"shape": [-2]}}, b"\0" * 8),
        headed({"a": F8 | {"shape": [True, 2]}}, b"\0" * 8), headed({"a": F8 | {"shape": [1] * 9 + [2]}}, b"\0" * 8),
        headed({"a": F8 | {"data_offsets": [8, 0]}}, b"\0" * 8),
        headed({"a": F8 | {"data_offsets": [4, 12]}}, b"\0" * 12),
        headed(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', b"\0" * 8),
        headed({"a": F8, "__metadata__": {"x": 1}}, b"\0" * 8), headed({"a": F8}, b"\0\0\xc0\x7f" * 2),
        headed({str(i): F8 | {"shape": [0], "data_offsets": [0, 0]} for i in range(21_000)}),
    ],
)  # fmt: skip
def test_crafted_headers_are_refused(data: bytes, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(StudioError, match="x"):
        parse_tensors(data, "x")
    (tmp_path / "x").write_bytes(data)
    with contextlib.suppress(StudioError):  # a header alone doesn't know that the numbers are none
        read_header(tmp_path / "x")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[1]", b'"x"', b"1", b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}',
        b'{"a": ' + b"1" * 400 + b"}", b'{"a": 1, "a": 1}', b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_json_traps_are_refused(data: bytes) -> None:
    with pytest.raises(StudioError, match="the thing"):
        parse_json(data, "the thing")


def test_reading_stops_at_the_limit_and_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * (JSON_LIMIT + 1))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for name, limit in (("x", JSON_LIMIT), ("link", 2 * JSON_LIMIT), ("none", 5), (".", 5)):
        with pytest.raises(StudioError):
            read_bytes(tmp_path / name, limit)
    assert len(read_bytes(tmp_path / "x", 2 * JSON_LIMIT)) == JSON_LIMIT + 1


def test_a_linked_concept_or_file_is_not_followed(library: Library, tmp_path: Path) -> None:
    library.save(trained())
    folder = library.find("my-cat").folder
    (library.workspace.concepts / "linked-00000000").symlink_to(tmp_path / "private")
    assert [concept.name for concept in library.concepts()] == ["my-cat"]
    (folder / "weights.safetensors").rename(tmp_path / "private" / "w")
    (folder / "weights.safetensors").symlink_to(tmp_path / "private" / "w")
    with pytest.raises(StudioError, match="no plain file"):
        library.load("my-cat")


def test_a_subject_token_is_one_word_in_brackets(library: Library) -> None:
    for token in ("x", "<x", "<a b>", "<a><b>", "<>", "<.x>", "<a\0>", f"<{'x' * 200}>"):
        with pytest.raises(StudioError):
            library.save(Trained(replace(trained().concept, subjects=(Subject(token, "cat"),)), trained().tensors))
    assert library.concepts() == []
