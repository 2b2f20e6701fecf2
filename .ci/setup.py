"""Makes the environment that `make run` and `make test` use: only what is missing, and saying what it does.

    python .ci/setup.py VENV [--dev]

A stamp in the environment holds a digest of the requirement files, so that a second start takes no time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

CI = Path(__file__).resolve().parent
APP, DEV, CONSTRAINTS = CI.parent / "requirements.txt", CI / "requirements-dev.txt", CI / "constraints.txt"


def say(text: str) -> None:
    print(f"attune: {text}", flush=True)


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def version_of(python: Path) -> str | None:
    """The version of an environment's Python, None when it is missing, broken or unsupported."""
    code = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    number = found.stdout.strip()
    return number if found.returncode == 0 and number.startswith(("3.11.", "3.12.")) else None


def digest(files: list[Path], version: str) -> str:
    return hashlib.sha256(b"\0".join([version.encode(), *(file.read_bytes() for file in files)])).hexdigest()


def make(folder: Path) -> str:
    """The environment's Python version, after making the environment where there is none that works."""
    version = version_of(interpreter(folder))
    if version is None:
        number = ".".join(map(str, sys.version_info[:3]))
        say(f"making {folder} with Python {number} ({sys.executable})")
        venv.EnvBuilder(clear=folder.exists(), with_pip=True, symlinks=os.name != "nt").create(folder)
        version = version_of(interpreter(folder))
    if version is None:
        sys.exit(f"attune: {folder} was made but its Python doesn't run. Delete {folder} and try again.")
    return version


def install(folder: Path, dev: bool, version: str) -> None:
    """Run pip unless the stamp says that exactly these requirements are there already."""
    app, everything = digest([APP, CONSTRAINTS], version), digest([APP, CONSTRAINTS, DEV], version)
    stamp = folder / "attune-installed"
    done = stamp.read_text().split() if stamp.is_file() else []
    if everything in done or (not dev and app in done):
        return
    stamp.unlink(missing_ok=True)
    say("installing what it needs into the environment (the first time about 3 GB are downloaded)")
    started = time.monotonic()
    pip = [str(interpreter(folder)), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    code = subprocess.run([*pip, "-r", str(DEV if dev else APP)]).returncode
    if code:
        sys.exit("attune: pip could not install everything; its last lines say why. Run the same command to go on.")
    stamp.write_text(f"{app}\n{everything}\n" if dev else f"{app}\n")
    say(f"installed in {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the environment that Attune runs in.")
    parser.add_argument("folder", type=Path, help="where the environment is or shall be")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    options = parser.parse_args()
    install(options.folder, options.dev, make(options.folder))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nattune: interrupted; run the same command to go on.")
