"""Asking the model at one step: one answer, or several, with what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from agentkd.errors import AgentkdError, ProviderError
from agentkd.model import provider_error, token_usage
from agentkd.trajectory import Usage, valid_text

if TYPE_CHECKING:
    from smolagents import Model
    from smolagents.models import ChatMessage

__all__ = ["STOP_SEQUENCES", "Draft", "Sampling", "StepDraw"]

STOP_SEQUENCES = ("Observation:",)
LOGPROB_SLACK = 1e-3
"""Above 0 by rounding; what is more is no log-probability, and nothing is concluded from it."""


class Draft(NamedTuple):
    """An action as the model emitted it."""

    raw: str
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Log-probability (nats) of each token."""

    @property
    def mean_logprob(self) -> float | None:
        """Mean over its tokens; None where the server does not say."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None

    @property
    def probability(self) -> float:
        """Of the whole text, at temperature 1; 0 where the server does not say."""
        return math.exp(sum(self.logprobs)) if self.logprobs else 0.0


class Sampling(Protocol):
    """How several answers are drawn."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def seed(self) -> int | None: ...


class StepDraw:
    """The model at one step of one rollout. See :class:`agentkd.sampler.Draw`.

    Args:
        model: any smolagents model.
        messages: what it is asked.
        options: of the call.
        step: number of the step, from 1: with a seed, every step draws something else.

    Attributes:
        answers: what came back so far.
        seconds: wall-clock seconds of waiting.
    """

    def __init__(self, model: Model, messages: list[ChatMessage], options: dict[str, Any], step: int) -> None:
        self.model, self.messages, self.options, self.step = model, messages, options, step
        self.answers: list[ChatMessage] = []
        self.seconds = 0.0
        self._before = Usage()

    def take_over(self, usage: Usage, seconds: float) -> None:
        """Count what was asked before this, to decide what to ask."""
        self._before, self.seconds = self._before + usage, self.seconds + seconds

    def one(self) -> Draft:
        """One answer, sampled as the model's own settings say.

        Raises:
            ProviderError: the model failed, or answered without text.
        """
        return self._ask({})[0]

    def scored(self) -> Draft:
        """As :meth:`one`, with log-probabilities where the server sends them."""
        return self._ask(self._scored({}))[0]

    def __call__(self, count: int, first: int, config: Sampling) -> tuple[list[Draft], Usage]:
        """Several answers: in one request where the server can, else in as many, side by side.

        Raises:
            ProviderError: the model failed, or answered without text.
        """
        asked = len(self.answers)
        drafts = self._several(count, first, config)
        spent = sum((token_usage(answer) for answer in self.answers[asked:]), Usage())
        return drafts[:count], spent

    def _several(self, count: int, first: int, config: Sampling) -> list[Draft]:
        drafts: list[Draft] = []
        if count > 1 and not getattr(self.model, "one_at_a_time", False):
            try:
                drafts = self._ask(self._sampling(config, first, count))
            except ProviderError as exc:
                if not _not_understood(exc):
                    raise
            if len(drafts) < count:
                self.model.one_at_a_time = True  # known from now on, to all rollouts of this model
        missing = list(range(first + len(drafts), first + count))
        if missing and not drafts and not hasattr(self.model, "refuses_logprobs"):
            # Alone, to learn that before many ask at once.
            drafts = self._ask(self._sampling(config, missing.pop(0), 1))
        return drafts + self._side_by_side([self._sampling(config, number, 1) for number in missing])

    def _side_by_side(self, asked: list[dict[str, Any]]) -> list[Draft]:
        """One request for each, at the same time."""
        if len(asked) < 2:
            return [draft for options in asked for draft in self._ask(options)]
        if hasattr(self.model, "side_by_side"):
            models = self.model.side_by_side(len(asked))
        else:
            models = [self.model] * len(asked)
        with ThreadPoolExecutor(len(asked)) as pool:
            found = pool.map(self._ask, asked, models)
            return [draft for drafts in found for draft in drafts]

    def _sampling(self, config: Sampling, number: int, count: int) -> dict[str, Any]:
        """The options of a request for ``count`` drafts, the first of which has this number."""
        wanted: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
        if config.seed is not None:
            wanted["seed"] = (config.seed * 1_000_003 + self.step * 1009 + number) % 2**31
        own = getattr(self.model, "kwargs", {})
        body = dict(self.options.get("extra_body") or {})
        # smolagents lets a model's own settings win over those of a call; in the body they do not.
        body |= {name: value for name, value in wanted.items() if name in own}
        options = {name: value for name, value in wanted.items() if name not in own}
        if count > 1:
            options["n"] = count
        return self._scored({**options, "extra_body": body} if body else options)

    def _scored(self, options: dict[str, Any]) -> dict[str, Any]:
        """Ask a server for log-probabilities, unless it refused them; a model in this process has them."""
        over_http = getattr(self.model, "client", None) is not None
        refused = getattr(self.model, "refuses_logprobs", False)
        return {**options, "logprobs": True} if over_http and not refused else options

    def _ask(self, sampling: dict[str, Any], model: Model | None = None) -> list[Draft]:
        model = model or self.model
        try:
            drafts, refused = self._generate(sampling, model), False
        except ProviderError as exc:
            if "logprobs" not in sampling or not _not_understood(exc):
                raise
            plain = {name: value for name, value in sampling.items() if name != "logprobs"}
            drafts, refused = self._generate(plain, model), True
        if "logprobs" in sampling:
            self.model.refuses_logprobs = refused
        return drafts

    def _generate(self, sampling: dict[str, Any], model: Model) -> list[Draft]:
        began = time.monotonic()
        try:
            answer = model.generate(
                self.messages, stop_sequences=list(STOP_SEQUENCES), **{**self.options, **sampling}
            )
        except AgentkdError:
            raise  # named already, with its cause
        except Exception as exc:
            raise provider_error(exc) from exc
        finally:
            self.seconds += time.monotonic() - began
        drafts = _drafts(answer)
        self.answers.append(answer)
        return drafts

    @property
    def usage(self) -> Usage:
        """What it has cost so far."""
        return sum((token_usage(answer) for answer in self.answers), self._before)

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """Where the server returns them."""
        return _ids(self.answers[0].raw, "prompt_token_ids") if self.answers else None


def _not_understood(exc: ProviderError) -> bool:
    """Whether the server says that it does not know such a request."""
    return getattr(exc.__cause__, "status_code", None) in (400, 422)


def _drafts(answer: ChatMessage) -> list[Draft]:
    choices: Sequence[Any] = getattr(answer.raw, "choices", None) or [None]
    texts = [answer.content] if len(choices) == 1 else [choice.message.content for choice in choices]
    if not all(isinstance(text, str) for text in texts):
        raise ProviderError("The endpoint answered without text.")
    return [
        Draft(
            valid_text(str(text)),
            getattr(choice, "finish_reason", None),
            _ids(choice, "token_ids"),
            _logprobs(choice),
        )
        for text, choice in zip(texts, choices, strict=True)
    ]


def _ids(record: Any, name: str) -> tuple[int, ...] | None:
    ids = getattr(record, name, None)
    return tuple(ids) if ids else None


def _logprobs(choice: Any) -> tuple[float, ...] | None:
    """Of each token; None where the server does not say, or says what is none."""
    content = getattr(getattr(choice, "logprobs", None), "content", None) or ()
    values: list[Any] = [getattr(token, "logprob", None) for token in content]
    if not values or not all(map(_is_logprob, values)):
        return None
    return tuple(min(0.0, float(value)) for value in values)


def _is_logprob(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value <= LOGPROB_SLACK
