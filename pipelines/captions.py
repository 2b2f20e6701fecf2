"""What a photo is called while training: the caption a person would type to get it, with `<name>` for the noun."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.concept import Subject
from pipelines.errors import StudioError

_NAME = re.compile(r"<[^<>\s]+>")
MAX_CAPTION = 10_000  # bytes of a file


def caption(text: str | None, subjects: Sequence[Subject], file: str = "photo") -> str:
    """The caption to train with; "a photo of <my-cat>" where none was written.

    In a written one, each subject's noun becomes its `<name>` where it is first said (subjects that share a noun take
    its places one after the other); a `<name>` that stands there already is left alone. Another `<name>`, where only
    one subject is meant and nothing else names it, is what the subject was called before. StudioError when the text
    names none of the subjects, since nothing would tie the photo to the concept then.
    """
    if not text:
        return "a photo of " + " and ".join(subject.token for subject in subjects)
    named = False
    for subject in subjects:
        if subject.token in text:
            named = True
            continue
        replaced = _noun(subject.noun).sub(lambda _, token=subject.token: token, text, count=1)  # type: ignore[misc]
        named |= replaced != text
        text = replaced
    earlier = set(_NAME.findall(text))
    if not named and len(subjects) == len(earlier) == 1:
        return text.replace(earlier.pop(), subjects[0].token)
    if not named:
        words = " or ".join(f"'{subject.noun}'" for subject in subjects)
        raise StudioError(
            f"The caption of {file}, '{text[:80]}', does not name {words}. Write the noun into the caption, choose a "
            "noun that the captions use, or delete the caption file."
        )
    return text


def captions_in(text: str) -> str:
    """What a caption file says, a line for each caption: an empty line stands between two, and one may be wrapped."""
    parts = re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n"))
    return "\n".join(line for part in parts if (line := " ".join(part.split())))


def caption_file(captions: str) -> str:
    """The inverse of `captions_in`."""
    return "\n\n".join(captions.splitlines()) + "\n"


def caption_bytes(captions: str, where: str) -> bytes:
    """The content of a caption file; StudioError, beginning with `where`, for more than would be read again."""
    content = caption_file(captions).encode()
    if len(content) > MAX_CAPTION:
        raise StudioError(
            f"{where}: the captions are {len(content):,} bytes long, and {MAX_CAPTION:,} are read at most. Shorten "
            "them, or take some out."
        )
    return content


def class_prompt(subject: Subject) -> str:
    """The prompt for pictures of the subject's whole kind (DreamBooth, section 3.3)."""
    return f"a photo of {article(subject.noun)} {subject.noun}"


def article(noun: str) -> str:
    """ "a" or "an"."""
    return "an" if noun[:1].lower() in "aeiou" else "a"


def _noun(noun: str) -> re.Pattern[str]:
    """The noun as whole words in any case, not inside a `<name>` and not part of a hyphenated word."""
    words = r"\s+".join(re.escape(word) for word in noun.split())
    return re.compile(rf"(?<![\w<-]){words}(?![\w>-])", re.IGNORECASE)
