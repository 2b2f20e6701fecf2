"""The two commands' own set-up: which Python is taken, what is installed and when, which browser."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.browser import chromium

ROOT = Path(__file__).resolve().parents[1]
RENAMED = {"cv2": "opencv-python-headless", "PIL": "pillow", "segment_anything": "segment-anything"}
OPTIONAL = {"dreamsim"}  # asked for by name, and told how to install
COME_ALONG = {"annotated_types", "huggingface_hub", "tokenizers"}  # of pydantic, diffusers and transformers


def _requirements(path: Path) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def _fake_python(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def _find(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": f"{path}:/usr/bin:/bin" if environment.pop("system", "") else str(path), **environment}
    return subprocess.run(["/bin/sh", ROOT / ".ci/find-python"], env=variables, capture_output=True, text=True)


def test_requirements_admit_the_torch_of_hosts_and_of_today() -> None:
    torch = next(item for item in _requirements(ROOT / "requirements.txt") if item.name == "torch")
    assert all(torch.specifier.contains(version) for version in ("2.11.0", "2.14.1"))
    assert not torch.specifier.contains("2.9.1")


def test_tested_versions_lie_in_the_ranges() -> None:
    pins = {item.name.lower(): item for item in _requirements(ROOT / ".ci/constraints.txt")}
    for file in ("requirements.txt", ".ci/requirements-dev.txt"):
        for item in _requirements(ROOT / file):
            pin = next(iter(pins[item.name.lower()].specifier))
            assert pin.operator == "==" and item.specifier.contains(pin.version), item.name


def test_everything_imported_is_required() -> None:
    named = {item.name for item in _requirements(ROOT / "requirements.txt")}
    files = [ROOT / "app.py", *(ROOT / "pipelines").rglob("*.py"), *(ROOT / "studio").rglob("*.py")]
    imported = {name for file in files if file.exists() for name in _imports(file)}
    foreign = imported - set(sys.stdlib_module_names) - {"pipelines", "studio", "__future__"} - COME_ALONG
    assert {RENAMED.get(name, name) for name in foreign - OPTIONAL} <= named


def _imports(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module.split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


def test_an_unsupported_python_is_refused_with_a_sentence(tmp_path: Path) -> None:
    _fake_python(tmp_path, "python3", 'case "$2" in *print*) echo 3.10.4;; *) exit 1;; esac')
    found = _find(tmp_path, VENV=str(tmp_path / "none"))
    assert found.returncode == 1 and not found.stdout
    assert "needs Python 3.11 or 3.12" in found.stderr and "python3 is 3.10.4" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_name_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    _fake_python(tmp_path, "python3.12", 'echo "shim: no such version" >&2; exit 127')
    works = _fake_python(tmp_path, "python3.11", f'exec {sys.executable} "$@"')
    found = _find(tmp_path, VENV=str(tmp_path / "none"))
    assert (found.returncode, found.stdout.strip()) == (0, str(works))


def test_the_python_a_person_names_is_taken_or_refused_never_replaced(tmp_path: Path) -> None:
    _fake_python(tmp_path, "python3.11", f'exec {sys.executable} "$@"')
    old = _fake_python(tmp_path / "old", "python", 'case "$2" in *print*) echo 3.9.2;; *) exit 1;; esac')
    found = _find(tmp_path, PYTHON=str(old))
    assert found.returncode == 1 and "is 3.9.2" in found.stderr


def test_a_python_that_cannot_make_environments_says_what_to_install(tmp_path: Path) -> None:
    _fake_python(tmp_path, "python3", 'case "$2" in *venv*) exit 1;; *print*) echo 3.11.2;; esac')
    found = _find(tmp_path, VENV=str(tmp_path / "none"))
    assert found.returncode == 1 and "apt install python3.11-venv" in found.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_run_stops_before_making_anything(tmp_path: Path) -> None:
    old = _fake_python(tmp_path, "python", 'case "$2" in *print*) echo 3.13.0;; *) exit 1;; esac')
    environment = tmp_path / "environment"
    done = subprocess.run(
        ["make", "-C", ROOT, "run", f"PYTHON={old}", f"VENV={environment}"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "needs Python 3.11 or 3.12" in done.stderr
    assert not environment.exists()


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attune_setup", ROOT / ".ci/setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pip_runs_only_when_requirements_changed(tmp_path: Path, setup: ModuleType) -> None:
    calls = tmp_path / "calls"
    _fake_python(tmp_path / "env/bin", "python", f'echo "$@" >> {calls}')
    setup.install(tmp_path / "env", False, "3.11.7")
    setup.install(tmp_path / "env", False, "3.11.7")
    assert len(calls.read_text().splitlines()) == 1
    setup.install(tmp_path / "env", True, "3.11.7")  # the tests need more
    setup.install(tmp_path / "env", False, "3.11.7")  # which holds what the app needs
    assert len(calls.read_text().splitlines()) == 2
    setup.install(tmp_path / "env", False, "3.12.1")
    assert len(calls.read_text().splitlines()) == 3


def test_a_failed_install_is_not_taken_for_done(tmp_path: Path, setup: ModuleType) -> None:
    calls = tmp_path / "calls"
    _fake_python(tmp_path / "env/bin", "python", f'echo "$@" >> {calls}; exit 1')
    for _ in range(2):
        with pytest.raises(SystemExit, match="Run the same command to go on"):
            setup.install(tmp_path / "env", False, "3.11.7")
    assert len(calls.read_text().splitlines()) == 2


def test_a_broken_environment_counts_as_none(tmp_path: Path, setup: ModuleType) -> None:
    assert setup.version_of(tmp_path / "bin/python") is None
    assert setup.version_of(_fake_python(tmp_path, "old", "echo 3.9.1")) is None
    assert setup.version_of(_fake_python(tmp_path, "new", "echo 3.12.4")) == "3.12.4"


def test_ci_runs_make_test() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert re.search(r"^exec make test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_a_chromium_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find_chromium() is None
    _fake_python(tmp_path, "chromium-headless-shell", "exit 1")  # there, but broken
    works = _fake_python(tmp_path, "google-chrome", "exec /bin/echo 150.0")
    assert chromium.find_chromium() == works


def test_without_a_chromium_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(chromium, "_run", lambda command: False)  # no network
    with pytest.raises(SystemExit, match="Install one with"):
        chromium.ensure_chromium(lambda text: None)


def test_the_map_of_the_house_names_what_is_there() -> None:
    named = set(re.findall(r"\b\w+\.py\b", (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("```")[1]))
    there = {path.name for folder in ("pipelines", "studio", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert len(named) > 40 and named - there - {"app.py"} == set()
