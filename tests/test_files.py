"""Writes that survive a crash and a full disk, locks that fall with their owner, names that cannot escape."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import files
from pipelines.errors import StudioError

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A child process with this checkout's code."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, b"old")
    files.write_json(path, {"ü": 1})
    assert json.loads(path.read_text()) == {"ü": 1} and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(ValueError):
        files.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"ü": 1}
    files.write_json(path, "\ud800")
    assert json.loads(path.read_text()) == "\ud800"


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("safe")
    (tmp_path / "link").symlink_to(outside)
    files.write_atomic(tmp_path / "link", b"new")
    assert outside.read_text() == "safe" and not (tmp_path / "link").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_kill_in_the_middle_of_writing_leaves_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "x"
    code = """
        import sys
        from pipelines.files import write_atomic
        n = 0
        while True:
            write_atomic(sys.argv[1], bytes([n % 256]) * 2_000_000)
            n += 1
            if n == 2: print("up", flush=True)
    """
    for wait in (0.0, 0.013, 0.029, 0.05):
        with python(code, str(path)) as child:
            assert child.stdout is not None and child.stdout.readline()
            time.sleep(wait)
            child.send_signal(signal.SIGKILL)
        data = path.read_bytes()
        assert len(data) == 2_000_000 and len(set(data)) == 1
    files.sweep(tmp_path, older_than=-1)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE")
def test_a_full_disk_keeps_the_old_file_and_says_what_was_needed(tmp_path: Path) -> None:
    code = """
        import os, resource, sys
        from pipelines import files
        from pipelines.errors import StudioError
        path = sys.argv[1] + "/x"
        files.write_atomic(path, b"old")
        for limit in (0, 1, 50_000, 99_999):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                files.write_atomic(path, b"n" * 100_000)
            except StudioError as error:
                assert "0.1 MB" in str(error) and "full" in str(error), error
            else:
                raise SystemExit("it should not fit")
            assert open(path, "rb").read() == b"old" and os.listdir(sys.argv[1]) == ["x"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        files.write_atomic(path, b"new")
    """
    with python(code, str(tmp_path)) as child:
        assert child.wait(30) == 0
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "concept"
    with pytest.raises(RuntimeError), files.publish_folder(target) as staging:
        (staging / "a").write_text("x")
        raise RuntimeError("in the middle")
    assert os.listdir(tmp_path) == []
    with files.publish_folder(target) as staging:
        (staging / "a").write_text("x")
        assert not target.exists()
    assert (target / "a").read_text() == "x" and os.listdir(tmp_path) == ["concept"]
    with pytest.raises(FileExistsError), files.publish_folder(target):
        pass
    assert os.listdir(tmp_path) == ["concept"]


def test_sweep_takes_old_leftovers_only(tmp_path: Path) -> None:
    (tmp_path / ".1.tmp").mkdir()
    (tmp_path / ".1.tmp" / "x").write_text("x")
    (tmp_path / ".2.tmp").write_text("x")
    (tmp_path / "kept.tmp").write_text("x")
    files.sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 3
    os.utime(tmp_path / ".1.tmp", (0, 0))
    os.utime(tmp_path / ".2.tmp", (0, 0))
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["kept.tmp"]


def test_tensors_that_share_memory_or_are_views_are_saved(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"whole": table, "same": table, "part": table[1:], "turned": table.T}
    files.save_tensors(tmp_path / "x.safetensors", tensors, {"note": "ü"})
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], tensor.detach()) for name, tensor in tensors.items())


def test_a_lock_keeps_threads_and_processes_apart(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with files.lock(path):
        assert files.is_locked(path)
        with pytest.raises(StudioError, match="busy"), files.lock(path, timeout=0.1):
            pass
    assert not files.is_locked(path) and not files.is_locked(tmp_path / "none")
    with open(path, "r+b") as asking:
        assert files._try_lock(asking, shared=True) and not files.is_locked(path)
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(10):
            with files.lock(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_killed_owner_lets_go(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = """
        import sys, time
        from pipelines.files import lock
        with lock(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
    """
    with python(code, str(path)) as child:
        assert child.stdout is not None and child.stdout.readline()
        assert files.is_locked(path)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    with files.lock(path, timeout=5):
        pass


def test_names_are_data() -> None:
    assert files.clean_name("  my cat ") == "my cat"
    assert files.clean_name("Ame\u0301lie") == "Am\u00e9lie"
    for name in (
        "../../etc",
        "/root",
        "a\\b",
        "CON",
        "x.",
        "<script>",
        "{0.__class__}",
        "-rf",
        "%n",
        "猫",
        "👩\u200d👧",
    ):
        assert files.clean_name(name) == unicodedata.normalize("NFC", name)
    for name in ("", "  ", "a\0b", "a\nb", "\u202eabc", "\x1b[31mred", "x" * 101, "x" * 10_000, "\ud800", "a\u2028b"):
        with pytest.raises(StudioError):
            files.clean_name(name)


def test_twins_have_the_same_key() -> None:
    assert files.name_key("Cat") == files.name_key("cat") == files.name_key(" ＣＡＴ")
    assert files.name_key("e\u0301") == files.name_key("\u00e9") and files.name_key("a\u200db") == files.name_key("ab")
    assert files.name_key("cat") != files.name_key("cats")


def test_ids_are_ours() -> None:
    for title in ("My Cat!", "../..", "", "猫", "CON", "a" * 10_000, "\0", "é" * 300, "...", "-rf"):
        made = files.new_id(title)
        assert files.check_id(made) == made and len(made) < 60 and made == made.lower()
    assert files.new_id("My Cat!").startswith("my-cat-") and files.new_id("a") != files.new_id("a")
    for foreign in ("..", "a/b", "a\\b", "", ".", "-a", "a-", "A", "a\n", "x" * 121, "a--b", "\0"):
        with pytest.raises(StudioError):
            files.check_id(foreign)


def test_messages_show_input_harmlessly() -> None:
    shown = files.printable("\x1b[31m\u202e" + "x" * 10_000)
    assert len(shown) == 80 and shown.isprintable()
