"""Concepts as zips and as other tools' files, in both directions; what is not sound stays outside."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines import archive, formats
from pipelines.errors import StudioError
from pipelines.events import Note
from pipelines.files import save_tensors
from pipelines.intake import sha256
from pipelines.library import Library
from pipelines.workspace import Workspace
from tests.concepts import trained

Files = dict[str, bytes]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(Workspace(tmp_path / "one"))


@pytest.fixture
def exported(library: Library, tmp_path: Path) -> Path:
    library.save(trained(), np.full((20, 30, 3), 90, np.uint8), [Note("x")])
    return library.export("my-cat", tmp_path / "cat.zip")


def content(path: Path) -> Files:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def signed(files: Files) -> Files:
    """`files` with a record that names them as they are now: an attacker can do that, too."""
    record = json.loads(files["concept.json"])
    others = {name: data for name, data in files.items() if name != "concept.json"}
    record["files"] = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in others.items()}
    return others | {"concept.json": json.dumps(record).encode()}


def packed(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def refused(library: Library, path: Path, reason: str) -> None:
    before = sorted(os.walk(library.workspace.root))
    with pytest.raises(StudioError, match=reason):
        library.add(path)
    assert sorted(os.walk(library.workspace.root)) == before


def test_a_zip_makes_the_round_trip_byte_for_byte(library: Library, exported: Path, tmp_path: Path) -> None:
    other = Library(Workspace(tmp_path / "two"))
    assert other.add(exported) == trained().concept
    assert torch.equal(other.load("my-cat").tensors["layer.2"], trained().tensors["layer.2"])
    assert other.log("my-cat") == [Note("x")] and other.find("my-cat").preview is not None
    again = other.export("my-cat", tmp_path / "again.zip")
    assert again.read_bytes() == exported.read_bytes()
    with pytest.raises(StudioError, match="already there"):
        library.export("my-cat", exported)
    assert other.export("my-cat", tmp_path).parent == tmp_path


def test_adding_twice_gives_a_second_one_and_a_name_can_be_chosen(library: Library, exported: Path) -> None:
    assert library.add(exported).name == "my-cat-2"
    chosen = library.add(exported, name="Tom", base={"id": "b", "fingerprint": "f"})
    assert (chosen.name, chosen.subjects[0].token, chosen.base_model["id"]) == ("Tom", "<Tom>", "b")


def test_a_lone_weights_file_of_ours_finds_its_way_back(library: Library, exported: Path, tmp_path: Path) -> None:
    other = Library(Workspace(tmp_path / "two"))
    assert other.add(library.find("my-cat").folder / "weights.safetensors") == trained().concept


HOSTILE: dict[str, tuple[Callable[[Files], Files], str]] = {
    "slip": (lambda f: f | {"../evil": b"x"}, "belongs to no concept"),
    "absolute": (lambda f: f | {"/tmp/evil": b"x"}, "belongs to no concept"),
    "backslash": (lambda f: f | {"..\\evil": b"x"}, "belongs to no concept"),
    "folder": (lambda f: {f"cat/{name}": data for name, data in f.items()}, "no concept"),
    "unknown": (lambda f: f | {"install.py": b"x"}, "install.py"),
    "no weights": (lambda f: {k: v for k, v in f.items() if "weights" not in k}, "weights.safetensors is missing"),
    "unlisted": (lambda f: {k: v for k, v in f.items() if k != "preview.png"}, "not those that concept.json names"),
    "changed": (lambda f: f | {"run.jsonl": b"{}"}, "run.jsonl is damaged"),
    "pickle": (lambda f: signed(f | {"weights.safetensors": b"\x80\x04N."}), "not a sound safetensors"),
    "no png": (lambda f: signed(f | {"preview.png": b"GIF89a"}), "no sound PNG"),
    "wide png": (lambda f: signed(f | {"preview.png": png(3000, 2)}), "larger than 2048"),
    "cut png": (lambda f: signed(f | {"preview.png": png(64, 64)[:-40]}), "no sound PNG"),
    "log": (lambda f: signed(f | {"run.jsonl": b'{"event": "Snapshot", "kind": "x", "bad": 1}\n'}), "training log"),
    "json": (lambda f: f | {"concept.json": b"{"}, "not sound JSON"),
    "doubled keys": (lambda f: f | {"concept.json": b'{"a": 1, "a": 2}'}, "stands twice"),
    "deep json": (lambda f: f | {"concept.json": b"[" * 100_000}, "nested too deep"),
    "long number": (lambda f: f | {"concept.json": b'{"a": ' + b"9" * 400 + b"}"}, "too long"),
    "nan": (lambda f: f | {"concept.json": b'{"a": NaN}'}, "NaN"),
    "future": (lambda f: edited(f, format=2), "newer Attune"),
    "field": (lambda f: edited(f, on_load="rm"), "on_load"),
    "method": (lambda f: edited(f, method="nope"), "method 'nope'"),
    "method path": (lambda f: edited(f, method="../../x"), "method"),
    "name": (lambda f: edited(f, name="a\u202eb"), "does not show"),
    "long name": (lambda f: edited(f, name="x" * 10_000), "at most 100"),
    "token": (lambda f: edited(f, subjects=[{"token": "<a b>", "noun": "x"}]), "malformed"),
    "subjects": (lambda f: edited(f, subjects="x"), "broken"),
    "file entry": (lambda f: edited(f, files={"../x": {"bytes": 1, "sha256": ""}}), "weights"),
    "file path": (lambda f: edited(f, files=listed(f) | {"../x": {"bytes": 1, "sha256": ""}}), "unknown file"),
}  # fmt: skip


def edited(content: Files, **changes: object) -> Files:
    return content | {"concept.json": json.dumps(json.loads(content["concept.json"]) | changes).encode()}


def listed(files: Files) -> dict[str, object]:
    found: dict[str, object] = json.loads(files["concept.json"])["files"]
    return found


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_zip_is_refused_with_its_reason(library: Library, exported: Path, tmp_path: Path, case: str) -> None:
    change, reason = HOSTILE[case]
    refused(library, packed(tmp_path / "bad.zip", change(content(exported))), reason)


def test_not_finite_or_wrongly_shaped_weights_are_refused(library: Library, exported: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "nan", {"a": torch.tensor([1.0, float("nan")])})
    bad = signed(content(exported) | {"weights.safetensors": (tmp_path / "nan").read_bytes()})
    refused(library, packed(tmp_path / "bad.zip", bad), "NaN")


def test_doubled_linked_swelling_and_cut_zips_are_refused(library: Library, exported: Path, tmp_path: Path) -> None:
    files, path = content(exported), tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for name in (*files, "concept.json"):
            file.writestr(name, files[name])
    refused(library, path, "concept.json twice")
    with zipfile.ZipFile(path, "w") as file:
        link = zipfile.ZipInfo("weights.safetensors")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        file.writestr("concept.json", files["concept.json"])
        file.writestr(link, "/etc/passwd")
    refused(library, path, "is a link")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("concept.json", files["concept.json"])
        file.writestr("weights.safetensors", b"\0" * 30_000_000)
    refused(library, path, "swells")
    whole = exported.read_bytes()
    for data in (whole[:-1], whole[:-200], whole + b"x", whole[: len(whole) // 2]):
        path.write_bytes(data)
        refused(library, path, "cut off")


def test_a_zip_with_countless_entries_is_refused_unread(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(5000):
            file.writestr(f"{i}", b"")
    refused(library, path, "too many entries")
    data = bytearray(path.read_bytes())
    data[-12:-8] = struct.pack("<I", 100)  # lie about the directory's size
    path.write_bytes(data)
    with pytest.raises(StudioError):
        library.add(path)


def test_a_zip_that_lies_about_sizes_is_refused(library: Library, exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    start = whole.index(b"PK\x01\x02")
    for offset in (20, 24):  # packed and unpacked size in the directory's first entry
        for size in (0, 1, 2**31, 2**32 - 2):
            data = bytearray(whole)
            data[start + offset : start + offset + 4] = struct.pack("<I", size)
            (tmp_path / "bad.zip").write_bytes(data)
            refused(library, tmp_path / "bad.zip", "not taken|damaged|JSON")


def test_any_flipped_byte_is_refused_or_harmless(library: Library, exported: Path, tmp_path: Path) -> None:
    whole, path = exported.read_bytes(), tmp_path / "flip.zip"
    for position in range(0, len(whole), 29):
        data = bytearray(whole)
        data[position] ^= 0x55
        path.write_bytes(data)
        try:
            concept = library.add(path)
        except StudioError:
            continue
        assert torch.equal(library.load(concept.name).tensors["layer.0"], trained().tensors["layer.0"])


def test_foreign_files_are_told_apart(library: Library, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    save_file({"what.ever": torch.ones(2)}, tmp_path / "x.safetensors")
    for name in ("x.txt", "x.safetensors"):
        refused(library, tmp_path / name, "no concept that Attune knows")
    refused(library, tmp_path / "none.zip", "There is no file")


def test_a_folder_of_several_tokens_makes_the_round_trip_as_a_zip(library: Library, tmp_path: Path) -> None:
    words = {"<tom>": torch.randn(768), "<rex>": torch.randn(768)}
    (tmp_path / "pets").mkdir()
    save_file(words, tmp_path / "pets" / "learned_embeds.safetensors")
    save_file({"conv_in.delta": torch.randn(4)}, tmp_path / "pets" / "spectral_shifts.safetensors")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        file.writestr("__MACOSX/pets/._x", b"clutter")
        for path in (tmp_path / "pets").iterdir():
            file.write(path, f"pets/{path.name}")
    concept = library.add(tmp_path / "pets.zip", noun="pet")
    assert (concept.name, concept.method) == ("pets", "extract")
    assert {subject.token for subject in concept.subjects} == set(words)
    (tmp_path / "out").mkdir()
    library.export_original("pets", tmp_path / "out")
    again = library.add(shutil.make_archive(str(tmp_path / "again"), "zip", tmp_path / "out"), name="two", noun="pet")
    one, other = library.load("pets").tensors, library.load(again.name).tensors
    assert one.keys() == other.keys() and any(name.endswith(".delta") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["../evil.bin"], "no place"),
        (["/evil.bin"], "no place"),
        (["a/../../evil.bin"], "no place"),
        (["C:\\evil.bin"], "no place"),
        (["a/b/c/d/e/f/g/h/i.bin"], "no place"),
        (["x.bin", "X.bin"], "two files of one name"),
        (["x", "x/y.bin"], "two files of one name"),
        ([f"{number}.bin" for number in range(501)], "too much"),
        (["inner.zip"], "no concept that Attune knows"),
    ],
)
def test_a_hostile_folder_is_refused(library: Library, tmp_path: Path, names: list[str], reason: str) -> None:
    (tmp_path / "in").mkdir()
    refused(library, packed(tmp_path / "in" / "evil.zip", {name: b"x" for name in names}), reason)
    assert not list(tmp_path.rglob("evil.bin")) and not Path("/evil.bin").exists()


def test_links_and_swelling_files_in_a_folder_are_refused(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as file:
        link = zipfile.ZipInfo("unet/diffusion_pytorch_model.safetensors")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    refused(library, path, "is a link")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("learned_embeds.safetensors", b"\0" * 30_000_000)
    refused(library, path, "swells")


def test_every_format_has_what_it_takes() -> None:
    for name, form in formats.formats().items():
        assert form.title and form.method and callable(form.detect) and callable(form.read), name
        assert callable(form.write), name
    assert set(formats.formats()) >= {"svdiff", "cones"}


def test_writing_is_deterministic(tmp_path: Path) -> None:
    archive.write_zip(tmp_path / "a", {"b": b"1", "a": b"2"})
    archive.write_zip(tmp_path / "b", {"a": b"2", "b": b"1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_original_files_come_in_and_go_out(library: Library, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shifts = {"conv_in.delta": torch.randn(4), "down.0.to_q.delta": torch.randn(8)}
    save_file(shifts, tmp_path / "in" / "spectral_shifts.safetensors")
    with pytest.raises(StudioError, match="noun"):
        library.add(tmp_path / "in" / "spectral_shifts.safetensors")
    concept = library.add(tmp_path / "in" / "spectral_shifts.safetensors", name="old dog", noun="dog")
    assert (concept.method, concept.subjects[0].token, concept.subjects[0].noun) == ("svdiff", "<old-dog>", "dog")
    assert concept.base_model["fingerprint"] == "" and concept.recipe["format"] == "svdiff"
    (tmp_path / "out").mkdir()
    (written,) = library.export_original("old dog", tmp_path / "out")
    back = load_file(written)
    assert all(torch.equal(back[name], shift) for name, shift in shifts.items())


def test_a_pickled_residual_comes_in_through_the_jail(library: Library, tmp_path: Path) -> None:
    rows = torch.randn(1, 1024)
    torch.save(rows, tmp_path / "residual.pt")
    concept = library.add(tmp_path / "residual.pt", name="mug", noun="mug", base={"id": "sd-2.1", "fingerprint": "ab"})
    assert concept.method == "residual" and concept.base_model == {"id": "sd-2.1", "fingerprint": "ab"}
    assert torch.equal(library.load("mug").tensors["residual"], rows)
