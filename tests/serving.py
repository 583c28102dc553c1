"""Backends and an agent for tests of the server: they say what they are told, at the pace they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from agentkd.serve import AgentBackend, ChatChoice, ChatRequest, ChatResult, Listener, RequestError
from agentkd.serve.agent import AgentConfig

__all__ = ["Talker", "scripted_agent"]


class Talker:
    """Repeats the last message, so that every answer can be checked.

    "slowly ..." comes word by word, "for ever" until nobody waits, "much" is four megabytes,
    "broken" fails in the middle.
    """

    model_id = "talker"
    label = "repeats what it is told"

    def __init__(self, pace: float = 0.02) -> None:
        self.pace = pace
        self.running = 0
        self.left = threading.Event()
        """Set when a request was given up because nobody waited."""
        self._lock = threading.Lock()

    def complete(self, request: ChatRequest, listener: Listener | None = None) -> ChatResult:
        """See :class:`agentkd.serve.ChatBackend`."""
        text = request.messages[-1].content
        with self._lock:
            self.running += 1
        try:
            return self._answer(text, listener)
        finally:
            with self._lock:
                self.running -= 1

    def _answer(self, text: str, listener: Listener | None) -> ChatResult:
        assert listener is not None
        pieces = [text]
        if text.startswith("slowly"):
            pieces = [f"{word} " for word in text.split()]
        if text == "for ever":
            pieces = ["again "] * 100_000
        if text == "much":
            pieces = ["x" * 2**16] * 64
        for piece in pieces:
            if listener.cancelled():
                self.left.set()
                raise RequestError("gone", status=503)
            listener.text(0, piece)
            if len(pieces) > 1 and text != "much":
                time.sleep(self.pace)
            if text == "broken":
                raise RequestError("It broke.", status=503, code="unavailable")
        said = "".join(pieces)
        return ChatResult((ChatChoice(said, "stop"),), len(text.split()), len(pieces))


class ScriptedEngine:
    """An engine whose answers are the texts of a script, by how many steps the prompt holds."""

    context = 100_000

    def __init__(self, tokenizer: Any, script: list[list[str]], before: Callable[[int], object]) -> None:
        self.tokenizer, self.script, self.before = tokenizer, script, before

    def generate(self, prompt_ids: Any, *, n: int = 1, on_token: Any = None, **options: Any) -> list[Any]:
        """See :class:`agentkd.engine.Engine`."""
        from agentkd.engine import Completion

        step = self.tokenizer.decode(list(prompt_ids)).count("```python")
        self.before(step)
        texts = self.script[step]
        done = []
        for index in range(n):
            text = texts[index % len(texts)]
            ids = tuple(self.tokenizer.encode(text))
            if on_token is not None:
                on_token(index, ids[0])
            done.append(Completion(ids, text, (-0.1,) * len(ids), "stop"))
        return done

    def close(self) -> None:
        """Nothing to free."""


def scripted_agent(
    script: list[list[str]],
    tokenizer: Any,
    *,
    name: str = "script",
    before: Callable[[int], object] = lambda step: None,
    **settings: Any,
) -> AgentBackend:
    """The real agent (rollout, sandbox, sampler) over texts that are known beforehand.

    Args:
        script: for each step the texts that its candidates say, in turn.
        tokenizer: renders the prompts.
        name: of the bare model.
        before: called with the number of the step, from 0, before its texts are given.
        settings: of :class:`agentkd.agent_config.AgentConfig`.
    """
    engine: Any = ScriptedEngine(tokenizer, script, before)
    return AgentBackend(engine, tokenizer, AgentConfig(model=name, prompt="Act.", **settings))
