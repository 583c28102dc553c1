"""Text from tokens: the pieces are the text, and a token costs the same at the end as at the beginning."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("fastapi")
tokenizers = pytest.importorskip("tokenizers")

from agentkd.serve.pieces import Pieces  # noqa: E402
from agentkd.serve.request import ChatRequest  # noqa: E402

TEXTS = [
    "Plain words, and\n\n  white   space at the end.  \n",
    "Thought: größer als 3 €? 日本語のテキスト 👩‍👩‍👧 and back",
    "a\ufffdb \u0301combined n\u0303 \x00\x01 end",
    "",
    "   ",
]


def byte_level() -> Any:
    """Every byte is a token: characters come in up to four."""
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {
                letter: place
                for place, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
            },
            [],
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return made


def word_pieces() -> Any:
    """As Llama has it: a word knows of the space before it, and the first one loses it."""
    vocabulary = {"<unk>": 0, "▁": 1}
    for text in TEXTS:
        for letter in text.replace(" ", "▁"):
            vocabulary.setdefault(letter, len(vocabulary))
    for word in ("▁words", "▁white", "▁and", "▁als", "▁end"):
        vocabulary.setdefault(word, len(vocabulary))
    made = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(word, -len(vocabulary) / (len(word) + 1)) for word in vocabulary], 0)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<|end|>"])
    return made


class Counting:
    """A tokenizer that counts what it decodes."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.decoded = inner, 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        self.decoded += len(ids)
        return str(self.inner.decode(ids, skip_special_tokens=skip_special_tokens))


def whole(inner: Any, ids: list[int]) -> str:
    return str(inner.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("make", [byte_level, word_pieces])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_beginning_of_the_text(make: Any, text: str) -> None:
    inner = make()
    ids = inner.encode(text).ids
    special = inner.token_to_id("<|end|>")
    for given in (ids, [special, *ids, special], [it for one in ids for it in (one, special)]):
        pieces, said = Pieces(Counting(inner)), ""
        for place, token in enumerate(given):
            said += pieces.add(token)
            assert whole(inner, given[: place + 1]).startswith(said)
        rest = whole(inner, given)[len(said) :]
        assert len(rest) <= 1, "only half a character is held back"


def test_noise_is_text_too() -> None:
    inner, draw = byte_level(), random.Random(3)
    for _ in range(200):
        ids = [draw.randrange(256) for _ in range(40)]
        pieces = Pieces(Counting(inner))
        said = "".join(pieces.add(token) for token in ids)
        assert whole(inner, ids).startswith(said)


def test_a_token_costs_the_same_at_the_end_as_at_the_beginning() -> None:
    inner = byte_level()
    ids = inner.encode("The cost of a token. größer 日本語 " * 100).ids
    counting = Counting(inner)
    pieces = Pieces(counting)
    for token in ids:
        pieces.add(token)
    assert counting.decoded < 8 * len(ids)
    bad = Counting(inner)
    pieces = Pieces(bad)
    for _ in range(2000):
        pieces.add(inner.encode("é").ids[1])  # never a character
    assert bad.decoded < 200 * 2000


@pytest.mark.parametrize("stops", [["stop"], ["xyz", "st"], ["\n\nQ:", "p here"], ["ö"]])
def test_nothing_of_a_stop_string_is_sent(stops: list[str]) -> None:
    inner = byte_level()
    text = "Do not sto pst here\n\nQ no, größer\n\nQ: stop here, please stop"
    ids = inner.encode(text).ids
    pieces = Pieces(Counting(inner), stops)
    said = ""
    for token in ids:
        said += pieces.add(token)
    cut = min(at for stop in stops if (at := text.find(stop)) >= 0)
    assert said == text[:cut]


def test_empty_stop_strings_are_dropped() -> None:
    def request(**options: Any) -> ChatRequest:
        return ChatRequest.model_validate(
            {"model": "m", "messages": [{"role": "user", "content": "x"}], **options}
        )

    assert request(stop=[""]).stop == request(stop="").stop == []
    assert request(stop=["", "a"]).stop == ["a"]
    assert Pieces(Counting(byte_level()), ["", "a"]).stops == ["a"]
