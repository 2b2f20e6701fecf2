"""Rare words that stand for subjects where no token is learned (DreamBooth, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.concept import Subject
from pipelines.errors import StudioError


def rare_words(written: str, subjects: Sequence[Subject]) -> list[str]:
    """One word for each subject from "sks hta"; "" for each when nothing is written.

    StudioError when there are fewer words than subjects, or two read alike: they could not be told apart then.
    """
    words = written.split()
    if words and len(words) < len(subjects):
        raise StudioError(
            f"{len(subjects)} subjects need {len(subjects)} rare words to tell them apart, and 'rare_word' has only "
            f"'{written}'. Write one for each, with spaces between."
        )
    chosen = words[: len(subjects)] if words else [""] * len(subjects)
    read = [f"{word} {subject.noun}".strip().casefold() for word, subject in zip(chosen, subjects, strict=True)]
    twice = next((text for text in read if read.count(text) > 1), None)
    if twice is not None:
        raise StudioError(f"Two subjects would both read '{twice}'. Give each a word of its own in 'rare_word'.")
    return chosen
