"""The one exception a person is meant to read."""

from __future__ import annotations


class StudioError(Exception):
    """Something the user can put right: the message says what happened, then what to do.

    Anything else that is raised is a bug.
    """
