"""What `<name>` means in a prompt, which tokens words become, and tokens that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from pipelines.errors import StudioError
from pipelines.model import Model
from pipelines.text import Tokenized, tokenize
from pipelines.tokens import Expansion, added_tokens, expand, find_word, placeholder
from tests import tiny
from tests.tiny import tiny_model, tiny_tokenizer

CAT = {"<my-cat>": Expansion("sks cat", "cat")}
TOY = {"<my-toy>": Expansion("robot toy", "robot toy")}


@pytest.fixture(params=["sd1", "sdxl"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    yield tiny_model(request.param)


def read(text: str, length: int = 77, pad: str | None = None) -> Tokenized:
    tokenizer = tiny_tokenizer()
    if pad:
        tokenizer.pad_token = pad
    return tokenize(tokenizer, text, length)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a photo of <my-cat> in the snow", "a photo of sks cat in the snow"),
        ("<my-cat>", "sks cat"),
        ("a <my-cat> cat on sand", "a sks cat on sand"),
        ("a <my-cat>  CAT, sleeping", "a sks cat, sleeping"),
        ("a <my-cat>\nCat", "a sks cat"),
        ("a <my-cat> cats", "a sks cat cats"),
        ("a <my-cat> cat-like toy", "a sks cat cat-like toy"),
        ("a <my-cat> category", "a sks cat category"),
        ("a cat <my-cat>", "a cat sks cat"),
        ("<my-cat><my-cat> cat and <my-cat>", "sks cat sks cat and sks cat"),
        ("<my-cat>'s toy", "sks cat's toy"),
        ("big<my-cat>s", "big sks cat s"),
        ("'<my-cat>'", "' sks cat'"),
        ("a cat < b > c, <3 and <|endoftext|> <lora:x:1>", "a cat < b > c, <3 and <|endoftext|> <lora:x:1>"),
        ("", ""),
    ],
)
def test_a_placeholder_becomes_its_words(prompt: str, text: str) -> None:
    expanded, spans = expand(prompt, CAT)
    assert expanded == text
    assert len(spans) == prompt.count("<my-cat>")
    for span in spans:
        assert expanded[span.start : span.end] == "sks cat"
        assert expanded[slice(*span.noun)] == "cat"


def test_a_noun_of_several_words_is_not_doubled() -> None:
    assert expand("my <my-toy> Robot  Toy here", TOY)[0] == "my robot toy here"
    assert expand("my <my-toy> robot", TOY)[0] == "my robot toy robot"


def test_two_concepts_keep_their_places() -> None:
    text, spans = expand("<my-toy> beside <my-cat> cat", CAT | TOY)
    assert text == "robot toy beside sks cat"
    assert [(span.token, text[span.start : span.end]) for span in spans] == [
        ("<my-toy>", "robot toy"),
        ("<my-cat>", "sks cat"),
    ]


def test_names_and_words_are_data() -> None:
    odd = {"<c.t>": Expansion(r"\1 {0} %s c++", "c++"), "<cat>": Expansion("x", "x")}
    text, spans = expand(r"a <c.t> c++ and \g<0> {} <cat>", odd | {"<0>": Expansion("zero", "zero")})
    assert text == r"a \1 {0} %s c++ and \g zero {} x"
    assert [span.token for span in spans] == ["<c.t>", "<0>", "<cat>"]
    assert expand("<my-cat> says <my-cat>", {"<my-cat>": Expansion("<my-cat> cat", "cat")})[0] == (
        "<my-cat> cat says <my-cat> cat"
    )  # what a name became is not expanded again


def test_decomposed_letters_mean_the_same() -> None:
    """What macOS puts on the clipboard of a file's name."""
    text, spans = expand("a <cafe\u0301> and cafe\u0301", {"<café>": Expansion("sks cup", "cup")})
    assert text == "a sks cup and café" and len(spans) == 1
    assert find_word(read(text), "cafe\u0301") == find_word(read(text), "café")


def test_an_unknown_name_says_which_are_active() -> None:
    with pytest.raises(StudioError, match=r"<my-dog>.*active: <my-cat>, <my-toy>"):
        expand("a <my-dog>", CAT | TOY)
    with pytest.raises(StudioError, match="active: none"):
        expand("a <my-dog>", {})


def test_strength_and_rows_are_those_of_the_moment() -> None:
    strength, rows = [1.0], [torch.ones(1, 4)]
    active = {"<c>": Expansion("sks cat", "cat", lambda: rows[0], lambda: strength[0])}
    (span,) = expand("<c>", active)[1]
    assert torch.equal(span.expansion.rows, torch.ones(1, 4))  # type: ignore[arg-type]
    strength[0] = 0.0
    text, (span,) = expand("a <c> cat", active)
    assert text == "a cat" and span.expansion.rows is None and text[slice(*span.noun)] == "cat"


def test_real_positions_with_punctuation_and_repeated_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt of a published layout. CLIP's own vocabulary gives the same; the layout's file is off by one."""
    monkeypatch.setattr("tests.tiny.WORDS", ["pet", "near", "forest", *tiny.WORDS])
    prompt = read("A dog, a pet cat and a dog near a forest.")
    assert " ".join(prompt.words[1:14]) == "A dog , a pet cat and a dog near a forest ."
    assert find_word(prompt, "dog") == [2, 9]
    assert find_word(prompt, "dog", 0) == [2]
    assert find_word(prompt, "dog", 1) == [9]
    assert find_word(prompt, ",") == [3]
    assert find_word(prompt, "pet  Cat") == [5, 6]
    assert find_word(prompt, "dog,") == [2, 3]
    assert find_word(prompt, "forest.") == [12, 13]


def test_sub_words_unicode_and_spaces_keep_their_characters() -> None:
    prompt = read("A  Mushroom\tand İ naïve\u00a0cat 🐈 Café")
    for word in ("mushroom", "naïve", "cat", "🐈", "café"):
        found = find_word(prompt, word)
        assert "".join(dict.fromkeys(prompt.words[at] for at in found)).lower() in word
        assert found == list(range(found[0], found[-1] + 1))
    assert len(find_word(prompt, "mushroom")) > 1
    with pytest.raises(StudioError, match="not in the prompt"):
        find_word(prompt, "room")  # only a piece of a word


@pytest.mark.parametrize("pad", [None, "!"])
def test_padding_is_never_found(pad: str | None) -> None:
    prompt = read("a cat!", pad=pad)
    assert len(prompt.ids) == 77
    assert [at for at, (start, end) in enumerate(prompt.offsets) if end > start] == [1, 2, 3]
    assert find_word(prompt, "!") == [3]


def test_a_whole_expansion_is_found_by_its_name() -> None:
    model = tiny_model("sd1")
    with placeholder(model, "<my-cat>", Expansion("sks cat", "cat")):
        prompt = model.tokenize("a <my-cat> and a cat and <my-cat>")
    assert find_word(prompt, "<my-cat>") == [2, 3, 8, 9]
    assert find_word(prompt, "<my-cat>", 1) == [8, 9]
    assert find_word(prompt, "cat") == [3, 6, 9]


def test_words_that_are_missing_or_cut_are_told_apart() -> None:
    prompt = read("a cat and " + "a dog " * 40 + "on the beach")
    assert prompt.truncated.endswith("on the beach")
    with pytest.raises(StudioError, match="Choose a word it has: a, cat, and, dog, on, the, beach"):
        find_word(prompt, "fish")
    with pytest.raises(StudioError, match="cut off"):
        find_word(prompt, "beach")
    with pytest.raises(StudioError, match="is in the prompt 1 times"):
        find_word(prompt, "cat", 1)
    with pytest.raises(StudioError, match="cut off"):
        find_word(prompt, "dog", 39)
    assert max(find_word(prompt, "dog")) <= 75
    with pytest.raises(StudioError, match="not in the prompt"):
        find_word(prompt, " ")


def test_a_word_cut_in_the_middle_is_cut() -> None:
    prompt = read("cat " * 73 + "zebra")
    assert prompt.truncated and prompt.offsets[75][1] > prompt.text.index("zebra")
    with pytest.raises(StudioError, match="cut off"):
        find_word(prompt, "zebra")


@pytest.mark.parametrize("token", ["my-cat", "<my cat>", "<>", "<a|b>", "<<a>>", "<-a>", ""])
def test_a_name_that_could_be_other_text_is_refused(token: str) -> None:
    model = tiny_model("sd1")
    with pytest.raises(StudioError, match="can't name a concept"), placeholder(model, token, CAT["<my-cat>"]):
        pass
    assert model.placeholders == {}


def test_a_name_is_taken_once_and_given_back_after_an_error() -> None:
    model = tiny_model("sd1")
    with (
        pytest.raises(StudioError, match="Two concepts answer to <c>"),
        placeholder(model, "<c>", CAT["<my-cat>"]),
        placeholder(model, "<c>", TOY["<my-toy>"]),
    ):
        pass
    assert model.placeholders == {}


class _Before:
    """What must be the same, to the object and the bit, once learned tokens are gone."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokenizers = model.tokenizers
        self.tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
        self.weights = [table.weight for table in self.tables]
        self.values = [weight.clone() for weight in self.weights]
        self.sizes = [(len(t), e.config.vocab_size) for t, e in zip(model.tokenizers, model.text_encoders, strict=True)]
        self.ends = [self._ends(encoder) for encoder in model.text_encoders]
        self.states = model.encode(["a cat on sand"])

    @staticmethod
    def _ends(encoder: Any) -> list[dict[str, Any]]:
        return [{k: v for k, v in vars(m).items() if "eos" in k or "attune" in k} for m in encoder.modules()]

    def check(self) -> None:
        model = self.model
        assert model.tokenizers is self.tokenizers
        for encoder, table, weight, values in zip(
            model.text_encoders, self.tables, self.weights, self.values, strict=True
        ):
            assert encoder.get_input_embeddings() is table and table.weight is weight
            assert torch.equal(weight, values) and weight.grad is None
        pairs = zip(model.tokenizers, model.text_encoders, strict=True)
        assert [(len(t), e.config.vocab_size) for t, e in pairs] == self.sizes
        assert all("<c-0>" not in tokenizer.get_vocab() for tokenizer in model.tokenizers)
        assert [self._ends(encoder) for encoder in model.text_encoders] == self.ends
        assert torch.equal(model.encode(["a cat on sand"]).states, self.states.states)


def test_learned_tokens_start_at_a_word_and_alone_learn(model: Model) -> None:
    before = _Before(model)
    with added_tokens(model, ["<c-0>", "<c-1>"], ["cat", "red toy"]) as added:
        assert [tuple(rows.shape) for rows in added.rows] == [(2, len(values[0])) for values in before.values]
        with placeholder(model, "<c>", Expansion("<c-0> toy", "toy")):
            learned, plain = model.encode(["a <c> toy on sand"]), model.encode(["a cat toy on sand"])
        assert torch.equal(learned.states, plain.states)
        if learned.pooled is not None:
            assert torch.equal(learned.pooled, plain.pooled)
        assert learned.prompts[0].words[:4] == ("", "a", "<c-0>", "toy")
        learned.states[:, :4].square().sum().backward()
        assert all(rows.grad is not None and rows.grad[0].abs().sum() > 0 for rows in added.rows)
        assert all(rows.grad is not None and rows.grad[1].abs().sum() == 0 for rows in added.rows)
        assert not any(p.requires_grad for table in before.tables for p in table.parameters())
        assert torch.equal(model.encode(["a cat on sand"]).states, before.states.states)
    before.check()


def test_sets_of_learned_tokens_go_in_any_order() -> None:
    model = tiny_model("sd1")
    before = _Before(model)
    one, two = added_tokens(model, ["<c-0>"], ["cat"]), added_tokens(model, ["<d-0>", "<d-1>"], ["dog", "car"])
    one.__enter__()
    two.__enter__()
    with placeholder(model, "<d>", Expansion("<d-1> ball", "ball")):
        both = model.encode(["the <d>"]).states
        one.__exit__(None, None, None)
        assert torch.equal(model.encode(["the <d>"]).states, both)
        assert torch.equal(both, model.encode(["the car ball"]).states)
    two.__exit__(None, None, None)
    before.check()


def test_pooled_text_of_an_old_config_stays_at_the_end_token() -> None:
    """eos_token_id 2 in a config means "pool at the highest id", and a new token's id is higher than the end's."""
    model = tiny_model("sdxl")
    for module in model.text_encoders[1].modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    before = _Before(model)
    with added_tokens(model, ["<c-0>"], ["cat"]), placeholder(model, "<c>", Expansion("<c-0>", "")):
        assert torch.equal(model.encode(["a <c> on sand"]).pooled, before.states.pooled)  # type: ignore[arg-type]
    before.check()


def test_learned_tokens_are_taken_back_after_an_error_and_refused_twice() -> None:
    model = tiny_model("sd1")
    before = _Before(model)
    with (
        pytest.raises(StudioError, match="already knows '<c-0>'"),
        added_tokens(model, ["<c-0>"], ["cat"]),
        added_tokens(model, ["<c-0>"], ["dog"]),
    ):
        pass
    with pytest.raises(StudioError, match="a word to start from"), added_tokens(model, ["<c-0>"], [" "]):
        pass
    with pytest.raises(StudioError, match="can't name"), added_tokens(model, ["cat"], ["cat"]):
        pass
    before.check()


def test_a_table_larger_than_the_tokenizer_is_not_read_behind_its_words() -> None:
    """Some bases pad their token table; a new id must not fall on a spare row."""
    model = tiny_model("sd1")
    encoder, old = model.text_encoders[0], model.text_encoders[0].get_input_embeddings()
    table = torch.nn.Embedding(old.num_embeddings + 8, old.embedding_dim).requires_grad_(False)
    table.weight[: old.num_embeddings] = old.weight
    encoder.set_input_embeddings(table)
    with added_tokens(model, ["<c-0>"], ["cat"]), placeholder(model, "<c>", Expansion("<c-0>", "")):
        learned = model.encode(["a <c> here"]).states
    assert torch.equal(learned, model.encode(["a cat here"]).states)
    assert encoder.get_input_embeddings() is table


def test_tiny_tokenizer_pads_with_the_end() -> None:
    """What the tests above rely on: SD 1.x pads with EOS."""
    tokenizer: CLIPTokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
