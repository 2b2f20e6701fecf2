"""A Chromium for the browser test: Playwright's own, one on the PATH, or one installed here.

python tests/browser/chromium.py     finds or installs one and prints its path
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "The browser test needs Chromium and found none. "
    "Install one with '.venv/bin/playwright install --with-deps chromium' or 'apt install chromium', then try again."
)
Say = Callable[[str], None]


def find_chromium() -> Path | None:
    """The first Chromium that really starts, or None."""
    return next((path for path in _candidates() if _starts(path)), None)


def ensure_chromium(say: Say) -> Path:
    """A Chromium that starts, installed where there is none yet; without one the program ends with a sentence."""
    for prepare in (lambda say: True, _with_apt, _with_playwright):
        if prepare(say) and (found := find_chromium()):
            return found
    sys.exit(MISSING)


def _candidates() -> Iterator[Path]:
    yield from _playwrights_own()
    yield from (Path(path) for name in NAMES if (path := shutil.which(name)))


def _playwrights_own() -> list[Path]:
    """Where Playwright would start its browsers from; the files need not be there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        full = Path(playwright.chromium.executable_path)
    # <cache>/chromium-1234/chrome-linux/chrome; the headless one lies beside it under a name of its own.
    shells = full.parents[2].glob("chromium_headless_shell-*/*/*headless*shell*")
    return [full, *(path for path in sorted(shells, reverse=True) if path.suffix in ("", ".exe"))]


def _starts(path: Path) -> bool:
    try:
        done = subprocess.run([str(path), "--version"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _with_apt(say: Say) -> bool:
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    say("no Chromium here: installing Debian's (about 60 MB)")
    if not _run(["apt-get", "update", "-qq"]):
        return False
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    return _run([*install, "chromium-headless-shell"]) or _run([*install, "chromium"])


def _with_playwright(say: Say) -> bool:
    say("no Chromium here: downloading Playwright's")
    return _run([sys.executable, "-m", "playwright", "install", "chromium"])


def _run(command: Sequence[str]) -> bool:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode == 0


if __name__ == "__main__":
    print(f"attune: Chromium is {ensure_chromium(lambda text: print(f'attune: {text}', file=sys.stderr))}")
