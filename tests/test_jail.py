"""Pickled files: plain tensors come through, everything else is refused and nothing of it runs here."""

from __future__ import annotations

import ast
import io
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from pipelines.errors import StudioError
from pipelines.formats import jail


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def test_a_bare_tensor_comes_back_bitwise(tmp_path: Path) -> None:
    rows = torch.randn(1, 1024, requires_grad=True)
    back = jail.read_tensors(saved(tmp_path / "residual.pt", rows))
    assert isinstance(back, torch.Tensor) and torch.equal(back, rows.detach()) and not back.requires_grad


def test_dictionaries_come_back_with_joined_keys(tmp_path: Path) -> None:
    table = torch.randn(3, 4)
    value = OrderedDict(
        {"a": table, "view": table[:2].T, "string_to_param": {"*": torch.ones(2, dtype=torch.bfloat16)}, "step": 5}
    )
    back = jail.read_tensors(saved(tmp_path / "x.bin", value))
    assert isinstance(back, dict) and set(back) == {"a", "view", "string_to_param/*"}
    assert torch.equal(back["view"], table[:2].T) and back["string_to_param/*"].dtype == torch.bfloat16


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, (f"open({str(self.canary)!r}, 'w').write('ran')",))  # test data: what an attacker would send


def evil_zip(path: Path, canary: Path, **changes: object) -> Path:
    """A torch zip whose data.pkl runs code."""
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            data = pickle.dumps(Evil(canary)) if entry.filename.endswith("data.pkl") else source.read(entry)
            target.writestr(entry.filename, data)
    return path


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    legacy = tmp_path / "legacy.pt"
    legacy.write_bytes(pickle.dumps(Evil(canary)))
    for path in (evil_zip(tmp_path / "new.pt", canary), legacy):
        with pytest.raises(StudioError, match="not taken: it cannot be read as plain tensors"):
            jail.read_tensors(path)
    assert not canary.exists()


def test_an_expanded_tensor_of_terabytes_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "bomb.pt", torch.zeros(1).expand(10**6, 10**6))
    assert path.stat().st_size < 2000
    began = time.monotonic()
    with pytest.raises(StudioError, match="far more than its size"):
        jail.read_tensors(path)
    assert time.monotonic() - began < 30  # importing torch on a busy machine; reading takes milliseconds


def test_many_expanded_tensors_are_counted_together(tmp_path: Path) -> None:
    one = torch.zeros(1)
    path = saved(tmp_path / "bomb.pt", {str(i): one.expand(900_000) for i in range(50)})
    with pytest.raises(StudioError, match="far more than its size"):
        jail.read_tensors(path)


def refused_without_a_child(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(jail.subprocess, "Popen", None)  # calling it would be a TypeError
    with pytest.raises(StudioError) as caught:
        jail.read_tensors(path)
    return str(caught.value)


def test_a_swelling_zip_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "swell.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", b"\0" * 50_000_000)
    assert "would not have packed" in refused_without_a_child(path, monkeypatch)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF\3\0\0\0",
        b"\x89HDF\r\n\x1a\n",
        b"PK\x03\x04" + b"\0" * 60,
        b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
        b"hello",
    ],
    ids=["empty", "gguf", "hdf5", "cut zip", "png", "text"],
)
def test_other_kinds_of_files_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    assert "not taken" in refused_without_a_child(tmp_path / "x.pt", monkeypatch)


def test_doubled_entries_and_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.pt", torch.ones(2))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    assert "packed it like that" in refused_without_a_child(path, monkeypatch)
    monkeypatch.undo()
    with pytest.raises(StudioError, match="more than 10 bytes"):
        jail.read_tensors(saved(tmp_path / "y.pt", torch.ones(2)), size_limit=10)
    with pytest.raises(StudioError, match="Cannot read 'none.pt'"):
        jail.read_tensors(tmp_path / "none.pt")


def test_not_a_number_and_odd_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="NaN"):
        jail.read_tensors(saved(tmp_path / "nan.pt", torch.tensor([1.0, float("nan")])))
    with pytest.raises(StudioError, match="no plain tensor"):
        jail.read_tensors(saved(tmp_path / "sparse.pt", torch.eye(3).to_sparse()))
    with pytest.raises(StudioError, match="no tensors"):
        jail.read_tensors(saved(tmp_path / "none.pt", {"a": 1}))


def test_the_child_may_not_write_connect_or_start_programs() -> None:
    """The hook itself, since no file gets far enough to try."""
    from pipelines.formats import _jail_child

    for event, arguments in [
        ("open", ("/x", "w", 0o101)), ("socket.connect", ()), ("subprocess.Popen", ()), ("os.system", ()),
        ("os.remove", ("x",)), ("os.fork", ()), ("shutil.rmtree", ()),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match="not allowed"):
            _jail_child._forbid(event, arguments)
    _jail_child._forbid("open", ("/x", "r", 0))


def test_this_process_has_no_word_for_unpickling() -> None:
    tree = ast.parse(Path(jail.__file__).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert not names & {"pickle", "torch", "marshal"}
