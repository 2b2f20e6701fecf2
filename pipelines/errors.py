"""The one exception a person is meant to read."""

from __future__ import annotations


class StudioError(Exception):
    """Something the user can put right: the message says what happened, then what to do.

    Anything else that is raised is a bug.
    """


def check_python(version: tuple[int, int]) -> None:
    """End with a sentence on a Python that the libraries here weren't tried with, rather than fail somewhere inside."""
    if not (3, 11) <= version <= (3, 12):
        raise SystemExit(
            f"Attune needs Python 3.11 or 3.12; this is {version[0]}.{version[1]}. Install one of them, then make run."
        )
