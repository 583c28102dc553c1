"""Limits: how many requests are worked on, how many wait, and how much each caller may ask for."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from agentkd.serve.request import RequestError

__all__ = ["Line", "Rates", "TryLater"]

_MINUTE = 60.0
_LONGEST = 60
"""Seconds of the longest Retry-After."""


class TryLater(RequestError):
    """Refused for now (429).

    Args:
        message: why.
        seconds: after which it is worth another try; becomes Retry-After, in whole seconds.
        code: OpenAI's short name.
    """

    def __init__(self, message: str, seconds: float, code: str) -> None:
        super().__init__(message, status=429, code=code)
        self.seconds = max(1, min(_LONGEST, math.ceil(seconds)))


class Line:
    """Places for requests that are worked on, and a line before them, first come first served.

    Used on one event loop.

    Args:
        places: requests worked on at a time.
        waiting: requests that may stand in line; more are refused at once.
        patience: seconds after which one that still stands in line is refused.

    Attributes:
        running: places that are taken.
        lingering: those of them whose client is gone, and whose work has not ended yet.
    """

    def __init__(self, places: int, waiting: int, patience: float) -> None:
        self.places, self.most_waiting, self.patience = places, waiting, patience
        self.running = self.lingering = 0
        self._line: deque[asyncio.Future[None]] = deque()
        self._usual = 1.0
        """Seconds that a place was taken, a moving average."""

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    async def enter(self) -> None:
        """Take a place, which :meth:`leave` gives back.

        Raises:
            TryLater: the line is full, or it took too long.
        """
        if self.running < self.places and not self._line:
            self.running += 1
            return
        if len(self._line) >= self.most_waiting:
            raise TryLater("The server is busy and its queue is full.", self._expected(), "server_busy")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(self.patience):
                await turn
        except BaseException as exc:
            if turn in self._line:
                self._line.remove(turn)
            elif turn.done() and not turn.cancelled():  # the turn came in the same moment
                self._pass_on()
            if isinstance(exc, TimeoutError):
                message = f"The server is busy: no turn within {self.patience:g} seconds."
                raise TryLater(message, self._expected(), "server_busy") from None
            raise

    def leave(self, seconds: float) -> None:
        """Give back a place that was taken for some seconds."""
        self._usual += 0.1 * (seconds - self._usual)
        self._pass_on()

    def leave_when(self, over: Callable[[Callable[[], None]], bool], began: float) -> None:
        """Give back a place when its work is over.

        Args:
            over: calls what it is given when that is so, and returns whether it is still to come.
            began: ``time.perf_counter()`` when the place was taken.
        """
        late = False

        def leave() -> None:
            self.lingering -= late
            self.leave(time.perf_counter() - began)

        if over(leave):
            late = True
            self.lingering += 1

    def _pass_on(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def _expected(self) -> float:
        return self._usual * (len(self._line) + 1) / self.places


class Rates:
    """Requests and tokens a minute of each caller: buckets that fill evenly.

    What a request costs in tokens is known only afterwards. So one is let in while anything is
    left, and its cost may take the bucket below nothing, which is waited for by the next.

    Args:
        requests: a minute; None: no limit.
        tokens: a minute, prompt and completion; None: no limit.
        clock: seconds.
    """

    def __init__(
        self, requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._requests = _Buckets(requests, clock)
        self._tokens = _Buckets(tokens, clock)

    def take(self, caller: str) -> None:
        """Count a request.

        Raises:
            TryLater: too many requests, or tokens, in the last minute.
        """
        for buckets, noun in ((self._tokens, "tokens"), (self._requests, "requests")):
            if wait := buckets.wait(caller):
                message = f"Rate limit: {buckets.rate} {noun} a minute for each caller."
                raise TryLater(message, wait, "rate_limit_exceeded")
        self._requests.spend(caller, 1.0)

    def charge(self, caller: str, tokens: int) -> None:
        """Count the tokens of a request that has ended."""
        self._tokens.spend(caller, tokens)


class _Buckets:
    """One bucket a caller; a caller is a token, so there are as many as tokens."""

    def __init__(self, rate: int | None, clock: Callable[[], float]) -> None:
        self.rate, self.clock = rate, clock
        self._levels: dict[str, tuple[float, float]] = {}

    def _level(self, caller: str) -> float:
        assert self.rate is not None
        level, then = self._levels.get(caller, (float(self.rate), self.clock()))
        return min(float(self.rate), level + (self.clock() - then) * self.rate / _MINUTE)

    def wait(self, caller: str) -> float:
        """Seconds until there is one; 0 when there is."""
        if self.rate is None:
            return 0.0
        return max(0.0, 1.0 - self._level(caller)) * _MINUTE / self.rate

    def spend(self, caller: str, amount: float) -> None:
        if self.rate is not None:
            self._levels[caller] = (self._level(caller) - amount, self.clock())
