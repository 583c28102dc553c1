"""A tokenizer that remembers gives the same ids, and is asked for what is new only."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from agentkd.engine.render import render_prompt
from agentkd.engine.rendered import CachedTokenizer
from tests.unit.test_render import small_tokenizer


class Counting:
    """Counts what a tokenizer is asked."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.templates, self.characters = inner, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        self.templates += 1
        return str(self.inner.apply_chat_template(messages, **options))

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.inner(text, **options)


def conversation(turns: int) -> list[dict[str, str]]:
    made = [{"role": "system", "content": "Act."}, {"role": "user", "content": "What is 6 times 7?"}]
    for number in range(turns):
        made.append(
            {"role": "assistant", "content": f"Thought: step {number}\n```python\nprint({number})\n```"}
        )
        made.append({"role": "user", "content": f"Observation:\n{number}"})
    return made


REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}(cut){% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, REWRITING], ids=["appends", "rewrites"])
def test_the_ids_are_the_same(template: str | None) -> None:
    plain = small_tokenizer()
    if template is not None:
        plain.chat_template = template
    cached = CachedTokenizer(plain)
    for turns in (0, 1, 2, 3, 2, 5):
        messages = conversation(turns)
        for _ in range(2):
            assert render_prompt(cached, messages) == render_prompt(plain, messages)
        begun = [*messages, {"role": "assistant", "content": "Thought: I go on"}]
        assert render_prompt(cached, begun, continue_final_message=True) == render_prompt(
            plain, begun, continue_final_message=True
        )
        assert render_prompt(cached, messages, add_generation_prompt=False) == render_prompt(
            plain, messages, add_generation_prompt=False
        )


def test_a_step_costs_what_is_new_in_it() -> None:
    counting = Counting(small_tokenizer())
    cached = CachedTokenizer(counting)
    costs = []
    for turns in range(12):
        templates, characters = counting.templates, counting.characters
        render_prompt(cached, conversation(turns))
        costs.append((counting.templates - templates, counting.characters - characters))
    assert max(templates for templates, _ in costs[1:]) <= 3
    assert max(characters for _, characters in costs[1:]) < 200


def test_who_gets_ids_may_change_them() -> None:
    cached = CachedTokenizer(small_tokenizer())
    first = cached("some text", add_special_tokens=False)["input_ids"]
    first.append(0)
    assert cached("some text", add_special_tokens=False)["input_ids"] == first[:-1]


def test_what_is_kept_is_bounded() -> None:
    counting = Counting(small_tokenizer())
    cached = CachedTokenizer(counting, most=1000)
    for number in range(200):
        cached(f"number {number} " * 5, add_special_tokens=False)
    assert cached._size <= 1000
    assert 0 < len(cached._kept) < 40
    asked = counting.characters
    cached("number 199 " * 5, add_special_tokens=False)
    assert counting.characters == asked, "the last ones are there"
    cached("x" * 2000, add_special_tokens=False)
    assert cached._size <= 1000
