"""The words that a region can belong to, as the painter offers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

import studio.parts

WORDS = Path(studio.parts.__file__).parent / "words.js"


def evaluated(browser: Browser, expression: str) -> Any:
    page = browser.new_page()
    try:
        return page.evaluate(f"() => {{ {WORDS.read_text(encoding='utf-8')}; return {expression}; }}")
    finally:
        page.close()


@pytest.mark.parametrize(
    ("prompt", "offered"),
    [
        ("a pet cat and a <my-dog> on the grass", ["<my-dog>", "pet", "cat", "pet cat", "grass"]),
        ("a cat, a small red car", ["cat", "small", "red", "car", "red car"]),
        ("a <my-dog> dog", ["<my-dog>", "dog"]),
        (
            "a pet cat and a pet cat",
            ["pet, number 1", "cat, number 1", "pet cat, number 1", "pet, number 2", "pet, every one"]
            + ["cat, number 2", "cat, every one", "pet cat, number 2", "pet cat, every one"],
        ),
        ("", []),
    ],
)
def test_pairs_follow_the_word_they_end_in(browser: Browser, prompt: str, offered: list[str]) -> None:
    found = evaluated(browser, f"choicesOf({prompt!r})")
    assert [one["title"] for one in found] == offered
    assert not any(one["likely"] for one in found if " " in one["words"])  # a new region begins with a word


def test_a_phrase_is_looked_for_in_the_whole_prompt(browser: Browser) -> None:
    prompt = "A small  Pet cat (by C++), and a <my-dog>"
    for words, occurrence, title in (
        ("small pet cat", "null", "small pet cat"),
        ("pet cat", "0", "pet cat, number 1"),
        ("pet cat", "1", "pet cat, number 2 – not in the prompt"),
        ("et cat", "null", "et cat – not in the prompt"),
        ("pet ca", "null", "pet ca – not in the prompt"),
        ("C++", "null", "C++"),
        ("<my-dog>", "null", "<my-dog>"),
        ("", "null", "choose a word"),
    ):
        assert evaluated(browser, f"titleOf({{words: {words!r}, occurrence: {occurrence}}}, {prompt!r})") == title
