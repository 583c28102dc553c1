"""Routers: does this question need tools, or does the model know the answer?

Source: "Adapting While Learning" (arXiv 2411.00412): a model that is asked under one of three prompts
(:data:`agentkd.prompt.TOOL_PROMPTS`), P_n (answer directly), P_i (tools are allowed) and P_f (tools are
required), and uses tools only for what it cannot answer without. A router decides once, at the first
step of a rollout, from what the model itself says:

- ``implicit``: P_i; the first action is the decision.
- ``threshold``: P_i; tools when the probability that the first action uses one is above ``threshold``.
- ``agreement``: several answers under P_n; the one they agree on, or P_f where they do not.
- ``forced`` and ``never``: P_f and P_n, always.

Which action does without tools is read off its code (:func:`agentkd.tool_use.without_tools`), before
anything is run. What was asked to decide is part of the first step: its tokens count there, and the
decision stands in :attr:`agentkd.trajectory.Step.route`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from agentkd.action import program_key
from agentkd.errors import ConfigError
from agentkd.sandbox import Outcome
from agentkd.tool_use import ToolKind, is_direct
from agentkd.trajectory import Candidate, Mode, Route, RouterKind, Usage
from agentkd.vote import Tally, outcome_text

if TYPE_CHECKING:
    from agentkd.action import Parsed
    from agentkd.draw import Draft

__all__ = [
    "Ask",
    "Decision",
    "Direct",
    "Router",
    "RouterConfig",
    "make_router",
    "parse_router",
    "tool_probability",
]


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
    tools: ToolKind = "both"
    """What counts as a tool, as in adaptation. With "search" an answer without tools may compute."""


Ask = Callable[[Mode, int, RouterConfig], "tuple[list[Draft], list[Parsed]]"]
"""Asks the model for so many first actions under a prompt; for one, as its own settings say."""
Direct = Callable[[str | None], bool]
"""Whether code does without tools; see :func:`agentkd.tool_use.without_tools`."""


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

    def record(self, router: RouterKind, draft: Draft, action: Parsed, direct: Direct = is_direct) -> Route:
        """As it stands in the trajectory.

        Args:
            router: which one has decided.
            draft, action: the first action that was taken; it is the decision where that was left to it.
            direct: as in :meth:`Router.decide`.
        """
        route = Route(
            router=router,
            mode=self.mode,
            direct=self.direct,
            p_tool=self.p_tool,
            agreement=self.agreement,
            logprobs=any(draft.logprobs for draft in self.drafts),
            drafts=tuple(
                _candidate(drawn, parsed, number == self.opening and drawn is draft)
                for number, (drawn, parsed) in enumerate(zip(self.drafts, self.parsed, strict=True))
            ),
        )
        if self.direct is not None or action.code is None:
            return route
        shown = {
            "direct": direct(action.code),
            "p_tool": tool_probability([draft], [action], direct),
            "logprobs": draft.logprobs is not None,
        }
        return route.model_copy(update=shown)


class Router(Protocol):
    """Decides for one rollout; used by :class:`agentkd.agent.StepAgent`."""

    kind: RouterKind
    tools: ToolKind
    """What counts as a tool."""

    def decide(self, ask: Ask, direct: Direct = is_direct) -> Decision:
        """Decide at the first step.

        Args:
            ask: for first actions.
            direct: which of them do without tools; the agent knows what its tools are called.

        Raises:
            ProviderError: the model failed.
        """
        ...


class _Configured:
    def __init__(self, config: RouterConfig) -> None:
        self.kind, self.tools = config.kind, config.tools
        self._config = config


class _Fixed(_Configured):
    """One prompt for every question."""

    _modes: ClassVar[dict[str, Mode]] = {"implicit": "allowed", "forced": "required", "never": "direct"}

    def decide(self, ask: Ask, direct: Direct = is_direct) -> Decision:
        return Decision(self._modes[self.kind])


class _Threshold(_Configured):
    def decide(self, ask: Ask, direct: Direct = is_direct) -> Decision:
        drafts, parsed = ask("allowed", self._config.first_actions, self._config)
        p_tool = tool_probability(drafts, parsed, direct)
        without = p_tool <= self._config.threshold
        wanted = [
            number
            for number, action in enumerate(parsed)
            if action.code is not None and direct(action.code) == without
        ]
        if wanted:  # what was decided stands among the drafts already
            return Decision("allowed", without, wanted[0], p_tool, None, drafts, parsed)
        mode: Mode = "direct" if without else "required"
        return Decision(mode, without, None, p_tool, None, drafts, parsed)


class _Agreement(_Configured):
    def decide(self, ask: Ask, direct: Direct = is_direct) -> Decision:
        drafts, parsed = ask("direct", self._config.answers, self._config)
        tally = Tally()
        for number, action in enumerate(parsed):
            if action.code is not None and direct(action.code):
                # What an answer that computes comes to is not known before it is run: its program votes.
                said = _answer(action.code) or program_key(action.code)
                tally.add(number, said, drafts[number].mean_logprob)
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
    return _Fixed(config)


def parse_router(
    text: str, seed: int | None = None, saved: RouterConfig | None = None
) -> RouterConfig | None:
    """Read ``implicit``, ``never``, ``forced``, ``threshold:0.3``, ``agreement:0.8``, or ``none``.

    Args:
        text: the router.
        seed: of what is drawn to decide; None leaves it.
        saved: what the text stands in for. Of a router of the same kind all settings stay that the text
            does not name; of another kind, the seed and what counts as a tool.

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
        if seed is not None:
            settings["seed"] = seed
        kept = None if saved is not None and saved.kind == kind else {"seed", "tools"}
        before = saved.model_dump(include=kept) if saved is not None else {}
        return RouterConfig.model_validate({**before, "kind": kind, **settings})
    except ValueError:
        raise ConfigError(
            f"There is no router {text!r}.",
            "Name one of: none, implicit, never, forced, threshold:0.5, agreement:0.8.",
        ) from None


def tool_probability(drafts: Sequence[Draft], parsed: Sequence[Parsed], direct: Direct = is_direct) -> float:
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
        tool = not direct(action.code)
        count[tool] += 1
        if draft.raw not in seen:
            known[tool] += draft.probability
        seen.add(draft.raw)
    left = max(0.0, 1 - known[True] - known[False])
    share = (count[True] + 0.5) / (count[True] + count[False] + 1)
    return min(1.0, known[True] + left * share)


def _answer(code: str | None) -> Outcome | None:
    """What a lone ``final_answer(<literal>)`` comes to; None for other code."""
    if code is None or not is_direct(code):
        return None
    call: Any = ast.parse(code).body[0]
    values = [*call.value.args, *(keyword.value for keyword in call.value.keywords)]
    return Outcome(value=ast.literal_eval(values[0]), is_final=True)


def _candidate(draft: Draft, action: Parsed, chosen: bool) -> Candidate:
    answer = _answer(action.code)
    return Candidate(
        raw=draft.raw,
        code=action.code,
        repairs=action.repairs,
        outcome=outcome_text(answer) if answer else None,
        chosen=chosen,
        usage=Usage(output_tokens=len(draft.token_ids or ())),
        mean_logprob=draft.mean_logprob,
        output_token_ids=draft.token_ids,
    )
