"""One call of the engine, and the samples that it consists of."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentkd.engine import Completion
from agentkd.errors import ProviderError

if TYPE_CHECKING:
    import torch

    from agentkd.engine.kv import Prefix

__all__ = ["Request", "Row", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How the samples of one call are drawn; see :meth:`agentkd.engine.Engine.generate`."""

    limit: int
    """Tokens of each sample; prompt and sample fit the model's context."""
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    on_token: Callable[[int, int], None] | None


class Request:
    """One call of ``generate``.

    Attributes:
        future: resolves to the completions; cancelled when the caller has gone.
        started: how many of the ``n`` samples have begun.
        prompt: keys, values and last logits of the prompt, for samples that still have to begin.
    """

    def __init__(self, ids: list[int], n: int, settings: Settings) -> None:
        self.ids, self.n, self.settings = ids, n, settings
        self.future: Future[list[Completion]] = Future()
        self.started = 0
        self.prompt: tuple[Prefix, torch.Tensor] | None = None
        self._done: list[Completion | None] = [None] * n

    @property
    def over(self) -> bool:
        """True when nobody waits for it any more."""
        return self.future.done()

    def finish(self, index: int, completion: Completion) -> None:
        """Note one finished sample; the last one resolves the future."""
        self._done[index] = completion
        if all(self._done):
            with suppress(InvalidStateError):  # the caller has just gone, or another lane was first
                self.future.set_result([it for it in self._done if it is not None])

    def fail(self, error: BaseException) -> None:
        """Resolve the future to an error, unless it is resolved."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def give_up(self) -> None:
        """Nobody waits for it any more: the lanes drop its samples."""
        self.fail(ProviderError("The call was cancelled."))


class Row:
    """One sample while it is being decoded, with a random stream of its own."""

    def __init__(self, request: Request, index: int) -> None:
        self.request, self.index = request, index
        self.random = random.Random(f"{request.settings.seed}/{index}")
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    @property
    def length(self) -> int:
        """Tokens before the last one: those whose keys are in the slab when it is fed."""
        return len(self.request.ids) + len(self.ids) - 1
