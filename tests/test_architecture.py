"""The house keeps its shape: what may import what, how long things get, and what never stands in the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines
from pipelines.methods import get_method, method_names

ROOT = Path(__file__).resolve().parents[1]
CODE = [ROOT / "app.py", *sorted((ROOT / "pipelines").rglob("*.py")), *sorted((ROOT / "studio").rglob("*.py"))]
EVERY = [*CODE, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / ".ci").rglob("*.py"))]
AGREED = {"app.py", "studio", "pipelines", "assets", "presets", "tests", "requirements.txt", "README.md"}
SETTINGS = {"Makefile", "pyproject.toml", ".ci", ".gitignore", ".gitattributes", ".pre-commit-config.yaml"}
PAPERS = {"LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"}
LINES, FUNCTION_LINES = 300, 60
SPEAKS = {"app.py", "pipelines/__main__.py"}
CATCHES_ALL = {"studio/jobs.py", "pipelines/formats/_jail_child.py"}  # a worker that must live; a process that ends
LIGHT = ["errors", "events", "concept", "params", "settings", "preset", "workspace", "library", "request", "__main__"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import, with relative ones resolved."""
    package = name(path).removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])]), tuple(alias.name for alias in node.names)


def test_arrows_point_down() -> None:
    for path in CODE:
        for module, names in imports(path):
            top, where = module.split(".")[0], f"{name(path)} imports {module}"
            if name(path).startswith("pipelines/"):
                assert top not in ("studio", "gradio", "app"), where
            else:
                assert not module.startswith("pipelines."), f"{where}: only what pipelines/__init__.py lists"
                assert module != "pipelines" or set(names) <= set(pipelines.__all__), where
            if name(path) in ("app.py", "studio/jobs.py", "studio/render.py"):
                assert top != "gradio", where


def test_the_public_list_is_honest() -> None:
    assert pipelines.__all__ == sorted(set(pipelines.__all__))
    for exported in pipelines.__all__:
        assert getattr(pipelines, exported) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pipelines.nothing


def test_light_modules_bring_no_heavy_library() -> None:
    modules = ", ".join(f"pipelines.{module}" for module in LIGHT)
    program = f"import sys, {modules}; print(*({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_nothing_grows_past_a_page() -> None:
    long = [name(path) for path in CODE if len(path.read_text("utf-8").splitlines()) > LINES]
    for path in EVERY:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{name(path)}: {node.name} has {lines} lines"] * (lines > FUNCTION_LINES)
    assert long == []


def test_code_keeps_its_manners() -> None:
    bad = [name(path) for path in CODE if path.stem in ("utils", "common", "helper", "helpers", "manager", "misc")]
    for path in CODE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and name(path) not in SPEAKS:
                bad.append(f"{name(path)}:{node.lineno} prints; use logging, or an event")
            if isinstance(node, ast.ExceptHandler) and name(path) not in CATCHES_ALL:
                caught = ast.unparse(node.type) if node.type else "Exception"
                bad += [f"{name(path)}:{node.lineno} catches everything"] * ("Exception" in caught.split(", "))
    assert bad == []


def test_the_top_level_is_as_agreed() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in done.stdout.splitlines()} <= AGREED | SETTINGS | PAPERS


@pytest.mark.parametrize("method", method_names())
def test_a_method_is_three_files(method: str) -> None:
    found = get_method(method)
    assert found.name == method and found.title and found.paper
    assert (ROOT / "presets" / method / "default.toml").is_file()
    assert (ROOT / "tests" / "methods" / f"test_{method}.py").is_file()
