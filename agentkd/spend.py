"""What a run costs: tokens, money and time, and the limits it must keep to.

Tokens are the server's counts. Money is tokens times the price of the model: the user's own table
first, then the published prices of the provider behind the endpoint's address (the registry
package genai-prices, extra ``prices``). A model without a price, such as one on one's own machine,
is counted in seconds of waiting for it and never priced as something else.
"""

from __future__ import annotations

import multiprocessing
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from agentkd.errors import AgentkdError, ConfigError, boundary, first_problem
from agentkd.trajectory import Usage

__all__ = ["Budget", "Ledger", "LimitReached", "Price", "Spent", "load_prices", "published_price"]


class LimitReached(AgentkdError):
    """A limit of the run is reached, or it is being stopped: no further call is made."""


class Price(BaseModel):
    """US dollars for a million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: float = Field(ge=0)
    """Prompt tokens."""
    output: float = Field(ge=0)
    """Sampled tokens."""
    cached: float | None = Field(default=None, ge=0)
    """Prompt tokens from the server's cache; as ``input`` by default."""

    def of(self, usage: Usage) -> float:
        """US dollars. An estimate does not tell prompts from answers, so the dearer price holds for it."""
        cached = self.input if self.cached is None else self.cached
        fresh = usage.input_tokens - usage.cached_tokens
        counted = fresh * self.input + usage.cached_tokens * cached + usage.output_tokens * self.output
        return (counted + usage.estimated_tokens * max(self.input, self.output)) / 1e6


_TABLE = TypeAdapter(dict[str, Price])


def load_prices(path: Path) -> dict[str, Price]:
    """Read a price table: TOML, one table a model id, ``["NAME"]`` with input, output and cached.

    Raises:
        ConfigError: no such file, not TOML, or a wrong value (named).
    """
    if not path.is_file():
        raise ConfigError(f"There is no price table {path}.", "Check --prices.")
    with boundary(ConfigError, f"reading {path}"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        return _TABLE.validate_python(content)
    except ValidationError as exc:
        raise ConfigError(
            f"{path}: {first_problem(exc)}.", 'Write ["MODEL"], then input = 2.5 and output = 10.0.'
        ) from exc


def published_price(model: str, api_base: str) -> Price | None:
    """The provider's published price; None where address or model are unknown, or the extra is missing.

    A price that depends on the length of the prompt is taken for short prompts.
    """
    try:
        from genai_prices import Usage as Tokens
        from genai_prices import calc_price
    except ImportError:
        return None

    def dollars(**tokens: int) -> float:
        return float(calc_price(Tokens(**tokens), model, provider_api_url=api_base).total_price) * 1000

    try:
        return Price(
            input=dollars(input_tokens=1000),
            output=dollars(output_tokens=1000),
            cached=dollars(input_tokens=1000, cache_read_tokens=1000),
        )
    except (LookupError, ValueError):
        return None


class Budget(BaseModel):
    """Hard limits of a run; calls in flight when one is reached are still paid for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_cost: float | None = Field(default=None, gt=0)
    """US dollars, earlier starts of the run included."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Prompt and sampled tokens, earlier starts of the run included."""
    max_hours: float | None = Field(default=None, gt=0)
    """Hours since this start."""

    def part(self, share: float) -> Budget:
        """The budget of a part of the run that has this share of its tasks; the hours are those of all.

        Args:
            share: above 0, at most 1.
        """
        return self.model_copy(
            update={
                "max_cost": self.max_cost and self.max_cost * share,
                "max_tokens": self.max_tokens and max(1, int(self.max_tokens * share)),
            }
        )


class Spent(NamedTuple):
    """What calls have cost so far."""

    calls: int = 0
    usage: Usage = Usage()
    cost: float = 0.0
    """US dollars of the calls of models with a price."""
    seconds: float = 0.0
    """Wall-clock seconds of waiting for models, summed over calls."""

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(
            self.calls + other.calls,
            self.usage + other.usage,
            self.cost + other.cost,
            self.seconds + other.seconds,
        )

    @property
    def tokens(self) -> int:
        """Prompt and sampled tokens; estimated where a server does not count."""
        return self.usage.input_tokens + self.usage.output_tokens + self.usage.estimated_tokens


_FIELDS = ("calls", "input", "output", "cached", "uncounted", "estimated", "cost", "seconds", "stopped")


class Ledger:
    """The running total of a run, shared by its threads and processes; see ``recorder.Meter``.

    Args:
        budget: the limits.
        prices: by model id.
        others: what other runs have spent of the same budget: it counts for the limits alone.
    """

    def __init__(
        self,
        budget: Budget = Budget(),  # noqa: B008
        prices: Mapping[str, Price] | None = None,
        others: Spent = Spent(),  # noqa: B008
    ) -> None:
        self.budget = budget
        self.prices = dict(prices or {})
        self.others = others
        self._counted: set[Path] = set()
        # "spawn", so that starting processes from a program with threads is safe
        self._values = multiprocessing.get_context("spawn").Array("d", len(_FIELDS))
        self._until = time.monotonic() + 3600 * budget.max_hours if budget.max_hours else float("inf")

    def after(self, others: Spent) -> Ledger:
        """The ledger of another run on what these others leave of the budget; the clock goes on."""
        ledger = Ledger(self.budget, self.prices, others)
        ledger._until = self._until
        return ledger

    def is_new(self, folder: Path) -> bool:
        """Whether the log of a folder is still to be counted; true once."""
        known = folder.resolve() in self._counted
        self._counted.add(folder.resolve())
        return not known

    def add(self, model: str, usage: Usage, seconds: float, calls: int = 1) -> None:
        """Count one call; with ``calls=0``, what was paid for an answer that was of no use."""
        price = self.prices.get(model)
        added = {
            "calls": calls,
            "input": usage.input_tokens,
            "output": usage.output_tokens,
            "cached": usage.cached_tokens,
            "uncounted": usage.uncounted_calls,
            "estimated": usage.estimated_tokens,
            "cost": price.of(usage) if price else 0.0,
            "seconds": seconds,
        }
        with self._values.get_lock():
            for name, value in added.items():
                self._values[_FIELDS.index(name)] += value

    def spent(self) -> Spent:
        """The total."""
        with self._values.get_lock():
            now = dict(zip(_FIELDS, self._values[:], strict=True))
        usage = Usage(
            input_tokens=int(now["input"]),
            output_tokens=int(now["output"]),
            cached_tokens=int(now["cached"]),
            uncounted_calls=int(now["uncounted"]),
            estimated_tokens=int(now["estimated"]),
        )
        return Spent(int(now["calls"]), usage, now["cost"], now["seconds"])

    def stop(self) -> None:
        """Let no further call begin, in any process."""
        self._values[_FIELDS.index("stopped")] = 1.0

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return bool(self._values[_FIELDS.index("stopped")])

    def reached(self) -> str | None:
        """The limit that is reached, in words; None while there is none."""
        if time.monotonic() >= self._until:
            return f"--max-hours {self.budget.max_hours:g}"
        if self.budget.max_tokens is None and self.budget.max_cost is None:
            return None
        spent = self.spent().plus(self.others)
        if self.budget.max_tokens is not None and spent.tokens >= self.budget.max_tokens:
            return f"--max-tokens {self.budget.max_tokens}"
        if self.budget.max_cost is not None and spent.cost >= self.budget.max_cost:
            return f"--max-cost {self.budget.max_cost:g}"
        return None

    def check(self) -> None:
        """Refuse a call that the limits do not allow.

        Raises:
            LimitReached: none may be made any more.
        """
        if self.stopped:
            raise LimitReached("The run is being stopped.")
        if limit := self.reached():
            raise LimitReached(f"The run has reached {limit}.", "Raise the limit and run the command again.")
