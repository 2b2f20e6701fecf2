"""Rare words that stand for subjects where no token is learned (DreamBooth, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.concept import Subject
from pipelines.errors import StudioError


def rare_words(written: str, subjects: Sequence[Subject]) -> list[str]:
    """One word for each subject from "sks hta"; "" for each when nothing is written.

    StudioError when there are fewer words than subjects, which could not be told apart then.
    """
    words = written.split()
    if words and len(words) < len(subjects):
        raise StudioError(
            f"{len(subjects)} subjects need {len(subjects)} rare words to tell them apart, and 'rare_word' has only "
            f"'{written}'. Write one for each, with spaces between."
        )
    return words[: len(subjects)] if words else [""] * len(subjects)
