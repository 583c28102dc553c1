"""What was rendered and tokenised before, kept: a step of an agent renders all the steps before it again.

:func:`agentkd.engine.render.render_prompt` asks a tokenizer for two things: the text of a conversation,
and the ids of a piece of it. Both depend on nothing but what is asked, so that remembering them cannot
change an id.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

__all__ = ["CachedTokenizer"]

MOST_CHARACTERS = 4_000_000
"""Of all that is kept, question and answer."""


class CachedTokenizer:
    """A tokenizer that remembers. Thread-safe as the tokenizer itself is.

    For one that is not changed any more: neither its template nor its tokens.

    Args:
        tokenizer: of transformers; everything else is asked of it.
        most: characters that are kept; the least recently used are forgotten.
    """

    def __init__(self, tokenizer: Any, most: int = MOST_CHARACTERS) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """The ids of a text."""

        def ask() -> tuple[int, ...]:
            return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

        return {"input_ids": list(self._recall((text, add_special_tokens), len(text), ask))}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The text of a conversation."""
        turns = tuple(tuple(message.items()) for message in messages)
        size = sum(len(value) for turn in turns for _, value in turn)

        def ask() -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
                )
            )

        assert not tokenize, "text only"
        return str(self._recall((turns, add_generation_prompt), 2 * size, ask))

    def _recall(self, key: Hashable, size: int, ask: Callable[[], Any]) -> Any:
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
                return known[0]
        answer = ask()
        with self._lock:
            if size <= self._most and key not in self._kept:
                self._kept[key] = (answer, size)
                self._size += size
                while self._size > self._most:
                    _, (_, freed) = self._kept.popitem(last=False)
                    self._size -= freed
        return answer
