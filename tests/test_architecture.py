"""The house rules, held by the source itself: arrows, sizes, honest lists, forbidden calls, version floors."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import pipelines

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "studio").rglob("*.py"), ROOT / "app.py"])
JAIL = "pipelines/formats/_jail_child.py"  # the one place that may unpickle, in a process of its own
FLOORS = {
    "torch": "2.10",
    "transformers": "5.3",
    "diffusers": "0.40",
    "gradio": "6.20",
    "pillow": "12.3",
    "safetensors": "0.8",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def for_every_source(check: Callable[[Path], None]) -> Callable[[], None]:
    """One test of all files: seven hundred small ones would take longer to count than to run."""

    def test() -> None:
        for path in SOURCES:
            check(path)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name(path))


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every import in a file: the module, and the names taken from it (none for a plain import)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield node.module or "", [alias.name for alias in node.names]


def called(node: ast.Call) -> str:
    """The dotted name of what is called: "torch.load"; ".eval" for a method of some expression."""
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join([target.id if isinstance(target, ast.Name) else "", *reversed(parts)])


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 40 and JAIL in map(name, SOURCES)


@for_every_source
def test_arrows_point_down(path: Path) -> None:
    inside = name(path).split("/")[0]
    for module, names in imports(path):
        top = module.split(".")[0]
        if inside == "pipelines":
            assert top not in ("studio", "gradio", "app", "tests"), f"{name(path)} imports {module}"
        elif top == "pipelines":
            assert module == "pipelines", f"{name(path)} imports {module}: only names of pipelines/__init__.py"
            unknown = set(names) - set(pipelines.__all__)
            assert not unknown, f"{name(path)} takes {unknown}, which pipelines/__init__.py does not list"
        assert top != "tests"


def test_the_job_side_of_the_studio_knows_no_gradio() -> None:
    for file in ("jobs", "job", "kept", "render"):
        assert not [module for module, _ in imports(ROOT / "studio" / f"{file}.py") if module.startswith("gradio")]


@for_every_source
def test_files_and_functions_stay_small_and_typed(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= (40 if name(path) == "app.py" else 300), f"{name(path)} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{name(path)}: {node.name} has {length} lines"
            assert node.returns is not None, f"{name(path)}: {node.name} does not say what it returns"


@for_every_source
def test_nothing_forbidden_is_called(path: Path) -> None:
    if name(path) == JAIL:
        return
    for module, _ in imports(path):
        assert module.split(".")[0] not in ("pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "yaml"), module
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            where, what = f"{name(path)}:{node.lineno}", called(node)
            assert what not in ("eval", "exec", "__import__", "torch.load", "os.system", "os.popen"), f"{where}: {what}"
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                forbidden = ("allow_pickle", "shell", "trust_remote_code")
                assert not (keyword.arg in forbidden and on), f"{where}: {keyword.arg}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "unsafe_load", f"{name(path)}:{node.lineno}"


@for_every_source
def test_no_handler_swallows_everything(path: Path) -> None:
    allowed = {"studio/jobs.py": 1, JAIL: 1}
    found = 0
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in kinds)
            reraises = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in node.body)
            found += broad and not reraises
        if isinstance(node, ast.Call) and called(node).split(".")[-1] == "suppress":
            assert not {getattr(argument, "id", "") for argument in node.args} & {"Exception", "BaseException"}
    assert found <= allowed.get(name(path), 0), name(path)


@for_every_source
def test_only_programs_print(path: Path) -> None:
    if name(path) in ("app.py", "pipelines/__main__.py", JAIL) or name(path).startswith("pipelines/commands/"):
        return
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.Call) and called(node) == "print"), f"{name(path)}:{node.lineno} prints"


def test_no_file_is_a_drawer_and_nothing_is_left_undone() -> None:
    for path in SOURCES:
        assert path.stem not in ("utils", "util", "common", "helpers", "helper", "manager", "misc"), name(path)
        text = path.read_text(encoding="utf-8")
        found = re.search(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError", text)
        assert not found, f"{name(path)}: {found}"


def test_every_listed_name_is_there() -> None:
    assert pipelines.__all__ == sorted(set(pipelines.__all__))
    for listed in pipelines.__all__:
        assert getattr(pipelines, listed) is not None, listed
    with pytest.raises(AttributeError):
        _ = pipelines.nothing
    for path in SOURCES:
        module = (
            importlib.import_module(name(path)[:-3].replace("/", ".").removesuffix(".__init__"))
            if has_all(path)
            else None
        )
        for listed in getattr(module, "__all__", ()):
            assert hasattr(module, listed), f"{name(path)} lists {listed}"


def has_all(path: Path) -> bool:
    return any(
        isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
        for node in tree(path).body
    )


def test_versions_are_above_the_known_holes() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = {need.name: need for need in map(Requirement, (x for x in lines if x.strip() and not x.startswith("#")))}
    for package, floor in FLOORS.items():
        lowest = [Version(part.version) for part in wanted[package].specifier if part.operator in (">=", "==", "~=")]
        assert lowest and min(lowest) >= Version(floor), f"{package} must be at least {floor}"


def test_a_method_is_three_files() -> None:
    methods = pipelines.method_names()
    assert methods
    for method in methods:
        assert (ROOT / "presets" / method / "default.toml").is_file(), f"{method} has no preset"
        assert (ROOT / "tests" / "methods" / f"test_{method}.py").is_file(), f"{method} has no test"
    others = [path for path in SOURCES if "/methods/" not in name(path) and "/formats/" not in name(path)]
    for path in others:
        for module, _ in imports(path):
            assert not module.startswith("pipelines.methods."), f"{name(path)} knows a method by name: {module}"
    assert {path.name for path in (ROOT / "presets").iterdir()} == set(methods)


def test_tracked_files_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    hint = re.compile(
        rb"/(?:work|root|home)/[a-z][\w.-]*/|/Users/[a-z]\w*/|https?://(?:10|127|192\.168)\.\d+\.\d+\.\d+(?!\S*7860)"
    )
    for tracked in listed.stdout.decode().split("\0"):
        path = ROOT / tracked
        if (
            tracked
            and path.is_file()
            and path.stat().st_size < 1_000_000
            and path.suffix not in (".png", ".safetensors")
        ):
            found = hint.search(path.read_bytes())
            assert not found, f"{tracked}: {found}"
