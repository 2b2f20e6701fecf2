"""Names and `<tokens>` of concepts: unique in a library up to case and Unicode form, and changed together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from pipelines.concept import Concept, Subject
from pipelines.files import name_key

_LONGEST = 90  # characters of a name before its number


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
    """`concept` under another name; its token follows when it was made of the old name."""
    subjects = concept.subjects
    if len(subjects) == 1 and subjects[0].token == token_of(concept.name):
        subjects = (Subject(token_of(name), subjects[0].noun),)
    return dataclasses.replace(concept, name=name, subjects=subjects)


def token_of(name: str) -> str:
    """What stands for `name` in a prompt: one word in angle brackets."""
    word = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:_LONGEST]
    return f"<{word or 'concept'}>"
