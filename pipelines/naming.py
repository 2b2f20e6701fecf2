"""Names and `<tokens>` of concepts: unique in a library up to case and Unicode form, and changed together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from pipelines.concept import Concept, Subject
from pipelines.errors import StudioError
from pipelines.files import clean_name, name_key
from pipelines.tokens import check_token

AND = "-and-"  # between the names of what was learned in one run
_LONGEST = 90  # characters of a name before its number


def named_subjects(nouns: Sequence[str], names: Sequence[str]) -> tuple[Subject, ...]:
    """What is to be learned, "cat" as <my-cat>. StudioError when a name is no word, is there twice, or has no noun."""
    if not names or len(nouns) != len(names):
        raise StudioError(f"There are {len(names)} names for {len(nouns)} nouns. Give each subject one of both.")
    if len({name_key(name) for name in names}) < len(names):
        raise StudioError(f"Two subjects can't share a name ({', '.join(names)}). Choose another for one of them.")
    return tuple(
        Subject(check_token(f"<{name}>"), clean_name(noun, "noun")) for noun, name in zip(nouns, names, strict=True)
    )


def unique(concept: Concept, others: Sequence[Concept]) -> Concept:
    """`concept`, with the least number that makes it free among `others` after its name, its tokens, or both."""
    by_name, by_token = _clashes(concept, others)
    number, wanted = 1, concept
    while any(_clashes(concept, others)):
        number += 1
        concept = _numbered(wanted, number, by_name, by_token)
    return concept


def taken(concept: Concept, others: Sequence[Concept]) -> bool:
    """Whether one of `others` has this name or one of these tokens, or a twin of it."""
    return any(_clashes(concept, others))


def _clashes(concept: Concept, others: Sequence[Concept]) -> tuple[bool, bool]:
    names = {name_key(other.name) for other in others}
    tokens = {name_key(subject.token) for other in others for subject in other.subjects}
    return name_key(concept.name) in names, any(name_key(subject.token) in tokens for subject in concept.subjects)


def _numbered(concept: Concept, number: int, name: bool, tokens: bool) -> Concept:
    if name:
        concept = dataclasses.replace(concept, name=f"{concept.name[:_LONGEST].strip()}-{number}")
    if tokens:
        subjects = tuple(Subject(f"{item.token[:-1][:_LONGEST]}-{number}>", item.noun) for item in concept.subjects)
        concept = dataclasses.replace(concept, subjects=subjects)
    return concept


def renamed(concept: Concept, name: str) -> Concept:
    """`concept` under another name; its token follows when it was made of the old name.

    Several tokens follow when the new name has a word for each, as a run's name has: tom-and-rex for <tom> and <rex>.
    """
    subjects = concept.subjects
    if len(subjects) == 1 and re.fullmatch(re.escape(token_of(concept.name)[:-1]) + r"(-\d+)?>", subjects[0].token):
        subjects = (Subject(token_of(name), subjects[0].noun),)
    words = [word for word in name.split(AND) if token_of(word) == f"<{word}>"]
    if len(subjects) > 1 and len({name_key(word) for word in words}) == len(subjects) == name.count(AND) + 1:
        subjects = tuple(Subject(f"<{word}>", item.noun) for word, item in zip(words, subjects, strict=True))
    return dataclasses.replace(concept, name=name, subjects=subjects)


def token_of(name: str) -> str:
    """What stands for `name` in a prompt: one word in angle brackets."""
    word = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:_LONGEST]
    return f"<{word or 'concept'}>"
