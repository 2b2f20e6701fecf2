"""Several subjects in the metadata of a file whose own form knows of none: what they are called and what they are."""

from __future__ import annotations

import json
from typing import Any

from pipelines.concept import Concept
from pipelines.errors import StudioError
from pipelines.files import clean_name
from pipelines.tokens import check_token

KEY = "attune_subjects"
_MOST = 64


def subjects_note(concept: Concept) -> dict[str, str]:
    """Metadata that names the subjects where there are several; {} for one."""
    if len(concept.subjects) < 2:
        return {}
    return {KEY: json.dumps([[subject.token, subject.noun] for subject in concept.subjects], ensure_ascii=False)}


def subjects_noted(metadata: dict[str, str]) -> dict[str, Any]:
    """The inverse: {"subjects": tokens, "nouns": nouns} or {}. StudioError for what can't name subjects."""
    if KEY not in metadata:
        return {}
    try:
        pairs = [(check_token(token), clean_name(noun, "noun")) for token, noun in json.loads(metadata[KEY])]
    except (ValueError, TypeError, RecursionError) as error:
        raise StudioError("The file's own list of its subjects is broken. Get it again from its source.") from error
    if not 1 <= len(pairs) <= _MOST or len({token for token, _ in pairs}) < len(pairs):
        raise StudioError("The file names a subject twice, or too many. Get it again from its source.")
    return {"subjects": [token for token, _ in pairs], "nouns": [noun for _, noun in pairs]}
