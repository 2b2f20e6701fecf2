"""Toybox's vocabulary: byte-level BPE as CLIP's, so any word tokenises; 77 tokens; a few nouns take two."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from pipelines.toybox.words import BACKGROUNDS, CATEGORIES, COLORS, FRAMES, NUMBERS, PATTERNS, RARE_WORDS

LENGTH = 77
END = "</w>"
# These nouns are learned in two pieces, so that several-token nouns are tried everywhere.
IN_TWO = {"mushroom": ("mush", "room" + END), "robot": ("ro", "bot" + END)}
_OTHERS = (
    "objects : , . ' and on in the left right a an of with next to photo picture painting drawing full body "
    "playing together floating standing sitting wearing s 's 1 2 3 4 5 6 7 8 9 0 one two three four "
    "beside behind front under toy thing object animals animal small big large beautiful room bot"
)


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _words() -> list[str]:
    text = " ".join([*FRAMES, *BACKGROUNDS.values(), *COLORS, *PATTERNS, *RARE_WORDS, *NUMBERS.values(), _OTHERS])
    return sorted(set(text.replace("{}", " ").replace(",", " , ").split()) | set(CATEGORIES) - set(IN_TWO))


def learn_merges() -> list[tuple[str, str]]:
    """Merges until every word of the world is one token (and each of IN_TWO's pieces is)."""
    corpus = [[*word[:-1], word[-1] + END] for word in _words()]
    for first, second in IN_TWO.values():
        stem = second.removesuffix(END)
        corpus += [list(first), [*stem[:-1], stem[-1] + END]]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in corpus for pair in zip(word, word[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in corpus:
            for i in range(len(word) - 2, -1, -1):
                if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes vocab.json and merges.txt into `folder` and returns the tokenizer made of them."""
    symbols = _byte_symbols()
    merges = learn_merges()
    tokens = dict.fromkeys([*symbols, *(s + END for s in symbols), *("".join(m) for m in merges)])
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    pairs: Any = merges  # its annotation knows only lists of strings; the tokenizer wants pairs
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=LENGTH)
