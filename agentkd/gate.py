"""The gate: the one place where calls of an endpoint wait, are counted and are tried again.

One gate stands before one endpoint and is shared by all threads of a process. It lets so many
calls through at a time as the endpoint bears, found by additive increase and multiplicative
decrease (Chiu and Jain 1989; slow start as in TCP): more while answers come, less on 429, 503 and
when more calls only make all of them slower. It keeps to the given requests and tokens a minute,
waits as long as ``Retry-After`` says, and tries again what may succeed later. The tokens of a call
are known when its answer is there, so what calls have taken on average is set aside when one begins,
and put right when it ends. All waiting is by the monotonic clock, so a jump of the system's clock
changes nothing.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from agentkd.trajectory import Usage

__all__ = ["Fault", "Gate", "GateConfig", "Level"]

T = TypeVar("T")

FIRST_LEVEL = 64
"""Calls in flight at the start, where so many are allowed; from there the level doubles."""
FIRST_BACKOFF = 0.25
LONGEST_BACKOFF = 30.0
LONGEST_PAUSE = 8.0
"""Seconds between two tries of a call that an overloaded endpoint refuses: fewer are in flight by then."""
LONGEST_RETRY_AFTER = 3600.0
"""Seconds; an endpoint that wants to be left alone for longer is given up."""
NOTABLE_WAIT = 2.0
"""Seconds; of a longer wait of all calls somebody is told."""
MEAN_WEIGHT = 0.1
"""Of the newest call in the running mean of the tokens of a call."""


class GateConfig(BaseModel):
    """What one endpoint may be asked, and how patiently."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_in_flight: int = Field(default=1024, ge=1)
    """Calls at a time, at most."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Prompt and sampled tokens."""
    retries: int = Field(default=5, ge=0)
    """How often one call is repeated after a failure that may pass (5xx, lost connection, no answer
    in time, garbage)."""
    patience: float = Field(default=300.0, ge=0)
    """Seconds that one call is repeated while the endpoint is overloaded (429, 503), the time it
    asks for itself not counted."""

    def share(self, count: int) -> GateConfig:
        """The part of one of ``count`` processes."""
        return self.model_copy(
            update={
                "max_in_flight": max(1, -(-self.max_in_flight // count)),
                "requests_per_minute": self.requests_per_minute and self.requests_per_minute / count,
                "tokens_per_minute": self.tokens_per_minute and self.tokens_per_minute / count,
            }
        )


class Fault(NamedTuple):
    """A failed call, classified."""

    kind: Literal["overload", "transient", "final", "usage"]
    """"overload" and "transient" may pass; "final" will not; "usage" is an answer with impossible counts."""
    what: str
    """Short name for counting: "429", "timeout", "connection", "garbage"."""
    retry_after: float | None = None
    """Seconds, where the endpoint says so."""
    usage: Usage | None = None
    """Tokens of an answer that was of no use: they are paid for all the same."""


class Level:
    """How many calls at a time; the arithmetic of the gate, without threads and clocks.

    Args:
        most: never more than this.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.value = float(min(most, FIRST_LEVEL))
        self._slow_start = True
        self._lowered_at = float("-inf")
        self._window: list[float] = []
        self._window_began: float | None = None
        self._best_rate = 0.0
        self._best_latency = float("inf")

    @property
    def now(self) -> int:
        """Calls allowed at a time."""
        return max(1, int(self.value))

    def answered(self, began: float, ended: float, full: bool) -> None:
        """A call was answered.

        Args:
            began, ended: seconds on one clock.
            full: as many calls were in flight as allowed; else nothing is learnt about more.
        """
        if full:
            self.value = min(self.most, self.value + (1.0 if self._slow_start else 1.0 / self.value))
        if self._window_began is None:
            self._window_began = began
        self._window.append(ended - began)
        if len(self._window) >= max(16, self.now):
            self._judge(ended, full)

    def _judge(self, ended: float, full: bool) -> None:
        """Once for as many answers as are allowed at a time: do more calls bring more answers?"""
        assert self._window_began is not None
        latency = sum(self._window) / len(self._window)
        rate = len(self._window) / max(1e-9, ended - self._window_began)
        if full and latency > 1.5 * self._best_latency:
            if rate < 0.85 * self._best_rate:
                self.lower(ended, min(0.9, max(0.5, 1.5 * self._best_latency / latency)))
            elif rate < 1.1 * self._best_rate:
                self._slow_start = False
        # Both fade, because an endpoint has good and bad hours.
        self._best_rate = max(rate, 0.995 * self._best_rate)
        self._best_latency = min(latency, 1.005 * self._best_latency)
        self._window, self._window_began = [], ended

    def overloaded(self, began: float, ended: float) -> None:
        """The endpoint refused a call; calls sent before the last lowering say nothing new."""
        if began >= self._lowered_at:
            self.lower(ended, 0.5)

    def lower(self, at: float, factor: float) -> None:
        """Multiplicative decrease."""
        self.value = max(1.0, self.value * factor)
        self._slow_start = False
        self._lowered_at = at
        self._window, self._window_began = [], None


class _Allowance:
    """So many units a minute, with ten seconds' worth at once (a token bucket)."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.rate = per_minute / 60.0
        self.most = max(1.0, 10.0 * self.rate)
        self.left, self.at = self.most, now

    def wait(self, now: float) -> float:
        """Seconds until the next call may go."""
        self.left = min(self.most, self.left + self.rate * (now - self.at))
        self.at = now
        return max(0.0, -self.left / self.rate) if self.left < 0 else 0.0

    def take(self, units: float) -> None:
        """Use so many; fewer than none gives back."""
        self.left -= units


class Gate:
    """See the module's text.

    Args:
        config: limits and patience.
        classify: names the fault of an exception.
        name: of the endpoint, for messages.
        on_fault: told of every failed call: the fault, its message, and the seconds until the next
            try (None: there is none).
        check: raises when no call may be made any more; asked before each try, and while waiting.
        on_wait: told of each longer wait of all calls: why, and its seconds.
    """

    def __init__(
        self,
        config: GateConfig,
        classify: Callable[[Exception], Fault],
        *,
        name: str = "",
        on_fault: Callable[[Fault, str, float | None], None] | None = None,
        check: Callable[[], None] | None = None,
        on_wait: Callable[[str, float], None] | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.on_fault = on_fault
        self._on_wait = on_wait or (lambda why, seconds: None)
        self._check = check or (lambda: None)
        self.level = Level(config.max_in_flight)
        self.in_flight = 0
        self.faults: Counter[str] = Counter()
        self._classify = classify
        self._changed = threading.Condition()
        self._closed_until = 0.0
        now = time.monotonic()
        self._requests = config.requests_per_minute and _Allowance(config.requests_per_minute, now)
        self._tokens = config.tokens_per_minute and _Allowance(config.tokens_per_minute, now)
        self._mean_tokens: float | None = None
        self._told_until = 0.0

    def call(
        self,
        send: Callable[[], T],
        tokens: Callable[[T], int | None] | None = None,
        guess: Callable[[], int] | None = None,
    ) -> T:
        """Send when it may be sent, and again when it may succeed later.

        Args:
            send: one try; called without any lock.
            tokens: how many tokens an answer was, for the limit a minute; None where nobody counted.
            guess: how many it may become, as long as no answer was counted.

        Raises:
            Exception: what the last try raised, or ``check``.
        """
        tries, refusals, waited = 0, 0, 0.0
        while True:
            reserved = self._enter(guess)
            began = time.monotonic()
            try:
                answer = send()
            except Exception as exc:
                fault = self._classify(exc)
                self._leave(began, reserved, 0, fault)
                tries += fault.kind != "overload"
                refusals += fault.kind == "overload"
                pause = self._pause(fault, tries, refusals, waited)
                self.note(fault, str(exc), pause)
                if pause is None:
                    raise
                if fault.retry_after is None:
                    waited += pause + (time.monotonic() - began)
                self._sleep(pause)
            else:
                self._leave(began, reserved, tokens(answer) if tokens else 0, None)
                return answer

    def note(self, fault: Fault, message: str, wait: float | None = None) -> None:
        """Count a fault, and tell of it."""
        self.faults[fault.what] += 1
        if self.on_fault is not None:
            self.on_fault(fault, message, wait)

    def _pause(self, fault: Fault, tries: int, refusals: int, waited: float) -> float | None:
        """Seconds until the next try, or None when there is none."""
        if fault.kind == "final" or tries > self.config.retries:
            return None
        if fault.retry_after is not None:
            return fault.retry_after if fault.retry_after <= LONGEST_RETRY_AFTER else None
        if fault.kind == "overload" and waited >= self.config.patience:
            return None
        steps, longest = (tries, LONGEST_BACKOFF) if fault.kind == "transient" else (refusals, LONGEST_PAUSE)
        return random.uniform(0.5, 1.0) * min(longest, FIRST_BACKOFF * 2.0 ** min(steps, 10))

    def _enter(self, guess: Callable[[], int] | None) -> float:
        """Wait until a call may begin; returns the tokens that are set aside for it."""
        with self._changed:
            while True:
                self._check()
                wait = self._wait(time.monotonic())
                if wait <= 0 and self.in_flight < self.level.now:
                    break
                # Woken by an answer; but a time that was waited for does not wake anybody.
                self._changed.wait(min(wait, 1.0) if wait > 0 else 1.0)
            self.in_flight += 1
            if self._requests:
                self._requests.take(1)
            if not self._tokens:
                return 0.0
            reserved = self._mean_tokens
            if reserved is None:
                reserved = float(guess()) if guess else 0.0
            self._tokens.take(reserved)
            return reserved

    def _wait(self, now: float) -> float:
        """Seconds until the endpoint may be asked again, by what it and the limits say."""
        waits = {
            "asks to wait": self._closed_until - now,
            "is at its limit of requests a minute for": self._requests.wait(now) if self._requests else 0.0,
            "is at its limit of tokens a minute for": self._tokens.wait(now) if self._tokens else 0.0,
        }
        why, wait = max(waits.items(), key=lambda item: item[1])
        if wait > NOTABLE_WAIT and now + wait > self._told_until + 1.0:
            self._told_until = now + wait
            self._on_wait(why, wait)
        return wait

    def _leave(self, began: float, reserved: float, tokens: int | None, fault: Fault | None) -> None:
        with self._changed:
            now = time.monotonic()
            full = self.in_flight >= self.level.now
            self.in_flight -= 1
            if fault is None:
                self.level.answered(began, now, full)
            elif fault.kind == "overload":
                self.level.overloaded(began, now)
                if fault.retry_after is not None and fault.retry_after <= LONGEST_RETRY_AFTER:
                    self._closed_until = max(self._closed_until, now + fault.retry_after)
                    self._wait(now)
            if self._tokens and tokens is not None:  # else what was set aside is the best that is known
                self._tokens.take(tokens - reserved)
                if fault is None:
                    mean = tokens if self._mean_tokens is None else self._mean_tokens
                    self._mean_tokens = mean + MEAN_WEIGHT * (tokens - mean)
            self._changed.notify(2 if self.in_flight + 1 < self.level.now else 1)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, 0.5))
