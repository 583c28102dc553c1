"""Routers: does this question need tools, or does the model know the answer?

Source: "Adapting While Learning" (arXiv 2411.00412): a model that is asked under one of three prompts
(:data:`agentkd.prompt.TOOL_PROMPTS`), P_n (answer directly), P_i (tools are allowed) and P_f (tools are
required), and uses tools only for what it cannot answer without. A router decides once, at the first
step of a rollout, from what the model itself says:

- ``implicit``: P_i; the first action is the decision.
- ``threshold``: P_i; tools when the probability that the first action uses one is above ``threshold``.
- ``agreement``: several answers under P_n; the one they agree on, or P_f where they do not.
- ``forced`` and ``never``: P_f and P_n, always.

What was asked to decide is part of the first step: its tokens count there, and the decision stands in
:attr:`agentkd.trajectory.Step.route`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from agentkd.errors import ConfigError
from agentkd.sandbox import Outcome
from agentkd.tool_use import is_direct
from agentkd.trajectory import Candidate, Mode, Route, RouterKind, Usage
from agentkd.vote import Tally, outcome_text

if TYPE_CHECKING:
    from agentkd.action import Parsed
    from agentkd.draw import Draft

__all__ = ["Ask", "Decision", "Router", "RouterConfig", "make_router", "parse_router", "tool_probability"]


class RouterConfig(BaseModel):
    """How it is decided whether a question is answered directly or with tools."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: RouterKind = "implicit"
    threshold: float = Field(default=0.5, ge=0, le=1)
    """threshold: probability of a tool-using first action above which tools are used."""
    first_actions: int = Field(default=1, ge=1, le=64)
    """threshold: first actions from which that probability is estimated; 1 takes the model's own."""
    agreement: float = Field(default=0.8, ge=0, le=1)
    """agreement: share of the direct answers that must agree for a direct answer."""
    answers: int = Field(default=5, ge=1, le=64)
    """agreement: direct answers that are asked for."""
    temperature: float = Field(default=0.7, gt=0)
    """Of the first actions where there are several, and of the direct answers."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    """What is drawn to decide is drawn from this seed."""


Ask = Callable[[Mode, int, RouterConfig], "tuple[list[Draft], list[Parsed]]"]
"""Asks the model for so many first actions under a prompt; for one, as its own settings say."""


class Decision(NamedTuple):
    """How a rollout goes on."""

    mode: Mode
    """The prompt it is held under."""
    direct: bool | None = None
    """None: the first action will show."""
    opening: int | None = None
    """Which of ``drafts`` is the first action; None: it is still to be asked for."""
    p_tool: float | None = None
    agreement: float | None = None
    drafts: Sequence[Draft] = ()
    parsed: Sequence[Parsed] = ()

    def record(self, router: RouterKind, draft: Draft, action: Parsed) -> Route:
        """As it stands in the trajectory.

        Args:
            router: which one has decided.
            draft, action: the first action that was taken; it is the decision where that was left to it.
        """
        route = Route(
            router=router,
            mode=self.mode,
            direct=self.direct,
            p_tool=self.p_tool,
            agreement=self.agreement,
            logprobs=any(draft.logprobs for draft in self.drafts),
            drafts=tuple(
                _candidate(draft, action, number == self.opening)
                for number, (draft, action) in enumerate(zip(self.drafts, self.parsed, strict=True))
            ),
        )
        if self.direct is not None or action.code is None:
            return route
        shown = {
            "direct": is_direct(action.code),
            "p_tool": tool_probability([draft], [action]),
            "logprobs": draft.logprobs is not None,
        }
        return route.model_copy(update=shown)


class Router(Protocol):
    """Decides for one rollout; used by :class:`agentkd.agent.StepAgent`."""

    kind: RouterKind

    def decide(self, ask: Ask) -> Decision:
        """Decide at the first step.

        Raises:
            ProviderError: the model failed.
        """
        ...


class _Fixed:
    """One prompt for every question."""

    def __init__(self, kind: RouterKind, mode: Mode) -> None:
        self.kind, self._mode = kind, mode

    def decide(self, ask: Ask) -> Decision:
        return Decision(self._mode)


class _Threshold:
    kind: RouterKind = "threshold"

    def __init__(self, config: RouterConfig) -> None:
        self._config = config

    def decide(self, ask: Ask) -> Decision:
        drafts, parsed = ask("allowed", self._config.first_actions, self._config)
        p_tool = tool_probability(drafts, parsed)
        direct = p_tool <= self._config.threshold
        wanted = [
            number
            for number, action in enumerate(parsed)
            if action.code is not None and is_direct(action.code) == direct
        ]
        if wanted:  # what was decided stands among the drafts already
            return Decision("allowed", direct, wanted[0], p_tool, None, drafts, parsed)
        return Decision("direct" if direct else "required", direct, None, p_tool, None, drafts, parsed)


class _Agreement:
    kind: RouterKind = "agreement"

    def __init__(self, config: RouterConfig) -> None:
        self._config = config

    def decide(self, ask: Ask) -> Decision:
        drafts, parsed = ask("direct", self._config.answers, self._config)
        tally = Tally()
        for number, action in enumerate(parsed):
            if action.code is not None and is_direct(action.code):
                answer = Outcome(value=_literal(action.code), is_final=True)
                tally.add(number, answer, drafts[number].mean_logprob)
        winner = tally.winner()
        agreed = tally.size(winner) / len(drafts) if winner is not None else 0.0
        if winner is not None and agreed >= self._config.agreement:
            return Decision("direct", True, winner, None, agreed, drafts, parsed)
        return Decision("required", False, None, None, agreed, drafts, parsed)


def make_router(config: RouterConfig) -> Router:
    """The router that the settings describe."""
    if config.kind == "threshold":
        return _Threshold(config)
    if config.kind == "agreement":
        return _Agreement(config)
    modes: dict[str, Mode] = {"implicit": "allowed", "forced": "required", "never": "direct"}
    return _Fixed(config.kind, modes[config.kind])


def parse_router(text: str, seed: int | None = None) -> RouterConfig | None:
    """Read ``implicit``, ``never``, ``forced``, ``threshold:0.3``, ``agreement:0.8``, or ``none``.

    Raises:
        ConfigError: anything else.
    """
    kind, _, value = text.strip().partition(":")
    if kind == "none" and not value:
        return None
    try:
        settings: dict[str, Any] = (
            {kind: float(value)} if value and kind in ("threshold", "agreement") else {}
        )
        if bool(value) != bool(settings):
            raise ValueError
        return RouterConfig.model_validate({"kind": kind, "seed": seed, **settings})
    except ValueError:
        raise ConfigError(
            f"There is no router {text!r}.",
            "Name one of: none, implicit, never, forced, threshold:0.5, agreement:0.8.",
        ) from None


def tool_probability(drafts: Sequence[Draft], parsed: Sequence[Parsed]) -> float:
    """Probability that the first action uses a tool, 0 to 1, from drafts of it.

    The probability of each distinct draft is known by the log-probabilities of its tokens; what is left
    of 1 is divided as the drafts themselves are (half a draft added on either side). So one draft
    suffices: a direct answer of probability 0.9 gives 0.025, one of probability 0.2 gives 0.2. Without
    log-probabilities only the division is left. A draft that cannot be parsed says nothing.
    """
    known: dict[bool, float] = {True: 0.0, False: 0.0}
    count = {True: 0, False: 0}
    seen: set[str] = set()
    for draft, action in zip(drafts, parsed, strict=True):
        if action.code is None:
            continue
        tool = not is_direct(action.code)
        count[tool] += 1
        if draft.raw not in seen:
            known[tool] += draft.probability
        seen.add(draft.raw)
    left = max(0.0, 1 - known[True] - known[False])
    share = (count[True] + 0.5) / (count[True] + count[False] + 1)
    return min(1.0, known[True] + left * share)


def _literal(code: str) -> Any:
    """The value of a direct answer."""
    call: Any = ast.parse(code).body[0]
    values = [*call.value.args, *(keyword.value for keyword in call.value.keywords)]
    return ast.literal_eval(values[0])


def _candidate(draft: Draft, action: Parsed, chosen: bool) -> Candidate:
    direct = action.code is not None and is_direct(action.code)
    answer = Outcome(value=_literal(action.code or ""), is_final=True) if direct else None
    return Candidate(
        raw=draft.raw,
        code=action.code,
        outcome=outcome_text(answer) if answer else None,
        chosen=chosen,
        usage=Usage(output_tokens=len(draft.token_ids or ())),
        mean_logprob=draft.mean_logprob,
        output_token_ids=draft.token_ids,
    )
