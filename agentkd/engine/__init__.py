"""The embedded engine: a small model generates in this process, many requests at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from agentkd.engine.cancel import Cancellation

__all__ = ["GREEDY_BELOW", "Cancellation", "Completion", "Engine"]

GREEDY_BELOW = 1e-4
"""Temperatures below this one take the likeliest token: it leaves no other a chance, and still lower
ones are 0 in single precision."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: tuple[int, ...]
    """All sampled tokens, the end token included when it was emitted."""
    text: str
    """Decoded text without end token; cut before a stop string."""
    logprobs: tuple[float, ...]
    """Log-probability (nats) of each token under the model, at temperature 1."""
    finish_reason: Literal["stop", "length"]
    """"stop": end token or stop string; "length": the token limit or the model's context."""


class Engine(Protocol):
    """Whatever continues token sequences. Thread-safe: many threads may call ``generate``."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[int, int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> list[Completion]:
        """Continue a prompt ``n`` times; blocks until all are done.

        Args:
            prompt_ids: token ids.
            n: how many continuations.
            max_new_tokens: limit of each.
            temperature: 0, as all below :data:`GREEDY_BELOW`, takes the likeliest token.
            top_p: sample from the smallest set of tokens with at least this probability.
            seed: makes the samples reproducible.
            stop: texts that end a continuation; they are not part of its text.
            on_token: called with the number of the continuation and each new token, on a thread
                of the engine, so it must be quick; what it raises ends the request.
            cancellation: ends the call, also one that waits for its first token.

        Raises:
            ProviderError: the engine failed, or the call was cancelled.
            ContextOverflowError: the prompt leaves no room for a single token.
        """

    def close(self) -> None:
        """End the engine's threads and free its memory; running calls fail."""
