"""The studio in a process of its own: `python -m tests.browser.server WORKSPACE BASE EXAMPLE PORT`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"


@contextmanager
def running(workspace: Path, base: Path | str, example: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The studio at this machine's `port`, ended with Ctrl+C as a person would end it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = workspace.parent / "server.log"
    with log.open("ab") as output:
        command = [sys.executable, "-m", "tests.browser.server", str(workspace), str(base), str(example), str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            _wait(port, process, log)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the studio did not start:\n{log.read_text(errors='replace')[-4000:]}")


if __name__ == "__main__":
    from studio.serve import Address, serve

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite started in the background hands on "ignored"
    home, model, photos, number = sys.argv[1:]
    serve(Address(port=int(number)), Path(home), model, example=Path(photos), example_base=model)
