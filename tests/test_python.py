"""A Python that isn't supported is refused with a sentence, before anything else can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import check_python

HOUSE = Path(__file__).parents[1]


@pytest.mark.parametrize("version", [(3, 10), (3, 13), (4, 0)])
def test_another_python_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or 3\.12"):
        check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 12)])
def test_these_are_supported(version: tuple[int, int]) -> None:
    check_python(version)


@pytest.mark.parametrize("program", [["app.py"], ["-m", "pipelines", "list"]])
def test_both_programs_ask_first(program: list[str], tmp_path: Path) -> None:
    pretend = f"import sys, runpy; sys.version_info = (3, 10, 0); sys.path.insert(0, {str(HOUSE)!r}); "
    run = "runpy.run_path('app.py', run_name='__main__')" if program == ["app.py"] else "import pipelines.__main__"
    ended = subprocess.run([sys.executable, "-c", pretend + run], cwd=HOUSE, capture_output=True, text=True)
    assert ended.returncode == 1 and "needs Python 3.11 or 3.12; this is 3.10" in ended.stderr
    assert "Traceback" not in ended.stderr
