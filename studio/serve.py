"""From arguments to a running page: address, login, log file, and what Gradio may and may not do."""

from __future__ import annotations

import getpass
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import StudioError, Workspace

if TYPE_CHECKING:
    from studio.session import Studio

LOG = "attune.log"
PORTS_TRIED = 50
MAX_FILE = "512mb"  # one upload: concepts and zips; photos have a lower limit of their own
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Where the page is served, and to whom. `auth` is "user:password"."""

    host: str = "127.0.0.1"
    port: int = 7860
    auth: str | None = None
    inbrowser: bool = False


def serve(address: Address, workspace: Path | None, base: str, **options: Any) -> None:
    """Serve until Ctrl+C, then stop the running job cleanly; `options` go to the Studio.

    StudioError for what the person can put right.
    """
    prepare_environment()
    auth = credentials(address)
    port = free_port(address.host, address.port)
    home = Workspace(workspace)
    log_to(home)
    if port != address.port:
        say(f"Port {address.port} is taken; using {port}.")
    say("Starting Attune …")
    from studio import build_ui
    from studio.session import Studio

    studio = Studio(home, base, **options)
    try:
        blocks = build_ui(studio)
        where = {"server_name": address.host, "server_port": port, "auth": auth, "inbrowser": address.inbrowser}
        blocks.launch(**launch_options(studio), **where, prevent_thread_lock=True, quiet=True)
        say(f"Attune is at http://{shown_host(address.host)}:{port}   (workspace: {home.root}; Ctrl+C ends it)")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, the running job is kept
        blocks.block_thread()
    finally:
        if studio.jobs.active():
            say("Stopping; what was done so far is kept …")
        studio.close()


def say(text: str) -> None:
    """One line for whoever started the program."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def prepare_environment() -> None:
    """Before Gradio is imported: no telemetry, and its cache in a private temporary folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="attune-gradio-"))


def launch_options(studio: Studio) -> dict[str, Any]:
    """What `Blocks.launch` gets at any address: nothing of the workspace is served, nothing leaves the machine."""
    from studio.theme import css, head, theme

    return {
        "theme": theme(),
        "css": css(),
        "head": head(),
        "allowed_paths": [],
        "blocked_paths": [str(studio.workspace.root)],
        "max_file_size": MAX_FILE,
        "strict_cors": True,
        "share": False,
        "run_history": False,
        "ssr_mode": False,
        "footer_links": ["settings"],
        "show_error": False,
        "enable_monitoring": False,
        "pwa": False,
        "mcp_server": False,
    }


def credentials(address: Address) -> tuple[str, str] | None:
    """The login, needed wherever others could reach the page: --auth, else $ATTUNE_AUTH, else asked for."""
    given = address.auth or os.environ.get("ATTUNE_AUTH")
    if given is None:
        if _is_local(address.host):
            return None
        if not sys.stdin.isatty():
            raise StudioError(
                "Serving the network needs a login. Give --auth user:password, or set ATTUNE_AUTH=user:password."
            )
        user = input("User name for the studio: ").strip()
        given = f"{user}:{getpass.getpass('Password: ')}"
    user, colon, password = given.partition(":")
    if not (user and colon and len(password) >= 6):
        raise StudioError("The login must be user:password with a password of at least 6 characters. Give another.")
    return user, password


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def shown_host(host: str) -> str:
    """The host to write into the address a person opens."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def free_port(host: str, wanted: int) -> int:
    """`wanted`, or the next port nobody listens at. StudioError when none of the next ones is free either."""
    if not 1 <= wanted <= 65535:
        raise StudioError(f"{wanted} is no port. Choose one from 1024 to 65535.")
    reason = ""
    for port in range(wanted, min(wanted + PORTS_TRIED, 65536)):
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return port
        except (OSError, OverflowError) as error:
            reason = str(error.strerror if isinstance(error, OSError) else error)
    raise StudioError(f"No port from {wanted} on is free at {host} ({reason}). Choose another with --port.")


def log_to(workspace: Workspace) -> None:
    """Warnings and errors of the whole program go into the workspace's attune.log."""
    handler = RotatingFileHandler(workspace.root / LOG, maxBytes=2_000_000, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in ("pipelines", "studio"):
        logging.getLogger(name).setLevel(logging.INFO)
