"""Self-consistent action sampling: sample several actions, run each in a fork, take the majority's.

Source: "Distilling LLM Agent into Small Models with Retrieval and Code Tools" (arXiv 2505.17612),
section 4.2, self-consistent action generation. A candidate that does not parse or fails is out; the
others vote by what they came to (:mod:`agentkd.vote`); the winner's process becomes the session, so
nothing is run twice. The number of candidates adapts: they are drawn in small batches until the
vote is settled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from agentkd.action import Parsed, program_key
from agentkd.draw import Draft
from agentkd.sandbox import CodeFailure, ForkingSandbox, Outcome, Sandbox
from agentkd.trajectory import Candidate, Failure, Usage
from agentkd.vote import Tally, outcome_text

__all__ = ["Draw", "Parse", "Sampled", "Sampler", "SamplerConfig", "SelfConsistentSampler", "run_action"]

Parse = Callable[[str], Parsed]
"""Reads an action; what the step was given to begin with is its business."""


class Draw(Protocol):
    """Asks the model for actions at the present step."""

    def __call__(self, count: int, first: int, config: SamplerConfig) -> tuple[list[Draft], Usage]:
        """``count`` drafts, the first of which is number ``first`` of the step (from 0), and their cost."""
        ...


class SamplerConfig(BaseModel):
    """How actions are sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(default=8, ge=1, le=64)
    """Candidates of a step, at most."""
    temperature: float = Field(default=0.4, gt=0)
    top_p: float = Field(default=0.8, gt=0, le=1)
    first: int = Field(default=1, ge=1)
    """Candidates of the first batch."""
    batch: int = Field(default=1, ge=1)
    """Candidates of each further batch, at least; as many as would settle the vote if they agreed."""
    likely: float | None = Field(default=0.5, ge=0.5, lt=1)
    """Probability of the leading outcome, as known by the log-probabilities of its candidates, above
    which no more are drawn: beyond 0.5 no other outcome is likelier. Needs a temperature of at most 1
    and a server that sends log-probabilities; None only counts votes."""
    confidence: float | None = Field(default=0.85, gt=0.5, lt=1)
    """Probability that the leading outcome is the likelier one (Beta criterion) at which no more
    are drawn; 0.85 is met by two that agree. None draws all ``n`` in one request."""
    token_budget: int | None = Field(default=None, ge=1)
    """Sampled tokens of a step after which no more are drawn."""
    if_all_fail: Literal["first", "likeliest"] = "first"
    """Whose failure the model is shown when every candidate failed: the first one's, as in the
    paper's code, or that of the highest mean log-probability."""
    seed: int | None = None
    """Drafts of a step are drawn from this seed; another one for every step."""


class Sampled(NamedTuple):
    """The action that was taken."""

    draft: Draft
    parsed: Parsed
    outcome: Outcome | None
    """What it did, already in effect in the session; None when it has no code."""
    candidates: tuple[Candidate, ...]
    usage: Usage

    def votes(self) -> list[dict[str, Any]]:
        """The candidates, as a span has them."""
        kept = {"code", "outcome", "votes", "chosen"}
        return [candidate.model_dump(mode="json", include=kept) for candidate in self.candidates]


class Sampler(Protocol):
    """Decides what a step does; used by :class:`agentkd.agent.StepAgent`."""

    def act(self, draw: Draw, parse: Parse, sandbox: Sandbox) -> Sampled:
        """Take one action in the session."""
        ...


class _Candidate:
    """A draft and what became of it."""

    def __init__(self, draft: Draft, parsed: Parsed) -> None:
        self.draft = draft
        self.parsed = parsed
        self.place: int | None = None
        """Which of the tried codes is its."""
        self.outcome: Outcome | None = None


class SelfConsistentSampler:
    """See the module.

    Where the sandbox cannot fork, candidates vote by their code instead (equal syntax trees are
    equal), and only the winner is run: it finds what the model says most often, not what its
    executions agree on, and a candidate that fails is not out before it has won.

    Args:
        config: how many, and when that is enough.
    """

    def __init__(self, config: SamplerConfig | None = None) -> None:
        self.config = config or SamplerConfig()

    def act(self, draw: Draw, parse: Parse, sandbox: Sandbox) -> Sampled:
        """Sample, try, vote, go on from the winner.

        Raises:
            ProviderError: the model failed.
            SandboxError: the sandbox failed.
        """
        forks = (
            sandbox if getattr(sandbox, "can_fork", False) and isinstance(sandbox, ForkingSandbox) else None
        )
        seen: list[_Candidate] = []
        tally, usage, places = Tally(), Usage(), dict[Hashable, int]()
        outcomes: list[Outcome] = []
        try:
            while count := self._wanted(seen, tally, usage):
                drafts, cost = draw(count, len(seen), self.config)
                usage = usage + cost
                fresh = [_Candidate(draft, parse(draft.raw)) for draft in drafts]
                codes = _new_codes(fresh, places)
                seen += fresh
                if forks is not None and codes:
                    outcomes += forks.try_each(codes, more=True)
                for number, candidate in enumerate(fresh, len(seen) - len(fresh)):
                    _vote(number, candidate, outcomes if forks is not None else None, tally)
            winner = tally.winner()
            index = self._fallback(seen) if winner is None else winner
            chosen = seen[index]
            outcome = _take(chosen, forks, sandbox)
        except CodeFailure as exc:
            tally, index = Tally(), _lose(seen, exc)
            chosen = seen[index]
            outcome = chosen.outcome
        except BaseException:
            if forks is not None:
                forks.discard()
            raise
        records = tuple(
            _record(candidate, number == index, tally.size(number)) for number, candidate in enumerate(seen)
        )
        return Sampled(chosen.draft, chosen.parsed, outcome, records, usage)

    def _wanted(self, seen: list[_Candidate], tally: Tally, usage: Usage) -> int:
        """How many more to draw; 0 when the vote is settled."""
        config = self.config
        left = config.n - len(seen)
        if not seen:
            return config.n if config.confidence is None else min(config.first, config.n)
        if left <= 0 or config.confidence is None:
            return 0
        if config.token_budget is not None and usage.output_tokens >= config.token_budget:
            return 0
        if tally.settled(left, config.confidence) or self._likelier(seen, tally):
            return 0
        return min(max(config.batch, tally.missing(left, config.confidence)), left)

    def _likelier(self, seen: list[_Candidate], tally: Tally) -> bool:
        """Whether the leader is known to be the likeliest of what does not fail.

        Log-probabilities are those at temperature 1. A text of probability above 0.5 has the likeliest
        token at each place, so a lower temperature, or top_p, only makes it likelier.
        """
        config, leaders = self.config, tally.leaders()
        if config.likely is None or config.temperature > 1 or not leaders:
            return False
        known = {"leading": 0.0, "out": 0.0}
        for number, candidate in {item.draft.raw: (at, item) for at, item in enumerate(seen)}.values():
            if number in leaders:
                known["leading"] += candidate.draft.probability
            elif not tally.size(number):
                known["out"] += candidate.draft.probability
        return known["leading"] > config.likely * (1 - known["out"])

    def _fallback(self, seen: list[_Candidate]) -> int:
        if self.config.if_all_fail == "first":
            return 0
        known = [-math.inf if one.draft.mean_logprob is None else one.draft.mean_logprob for one in seen]
        return known.index(max(known))


def _new_codes(fresh: list[_Candidate], places: dict[Hashable, int]) -> list[str]:
    """The codes that no earlier candidate had; all candidates are told which is theirs."""
    codes = []
    for candidate in fresh:
        if candidate.parsed.code is None:
            continue
        key = program_key(candidate.parsed.code)
        if key not in places:
            places[key] = len(places)
            codes.append(candidate.parsed.code)
        candidate.place = places[key]
    return codes


def _vote(number: int, candidate: _Candidate, outcomes: list[Outcome] | None, tally: Tally) -> None:
    if candidate.place is None:
        return
    if outcomes is None:
        tally.add(number, candidate.place, candidate.draft.mean_logprob)
        return
    candidate.outcome = outcomes[candidate.place]
    if candidate.outcome.error is None:
        tally.add(number, candidate.outcome, candidate.draft.mean_logprob)


def _lose(seen: list[_Candidate], why: CodeFailure) -> int:
    """The session is lost, and all that was tried in it with it; the first candidate with code says why."""
    for candidate in seen:
        if candidate.place is not None:
            candidate.outcome = Outcome(
                printed=why.printed, error=why.message, timed_out=why.timed_out, ended=True
            )
    return next(number for number, candidate in enumerate(seen) if candidate.place is not None)


def _take(chosen: _Candidate, forks: ForkingSandbox | None, sandbox: Sandbox) -> Outcome | None:
    """Bring the chosen action into effect."""
    if forks is None:
        return None if chosen.parsed.code is None else run_action(sandbox, chosen.parsed.code)
    if chosen.place is None or chosen.outcome is None or chosen.outcome.ended:
        forks.discard()
    else:
        forks.commit(chosen.place)
    return chosen.outcome


def run_action(sandbox: Sandbox, code: str) -> Outcome:
    """Run one action in the session itself.

    Raises:
        SandboxError: the sandbox failed.
    """
    try:
        done = sandbox(code)
    except CodeFailure as exc:
        return Outcome(printed=exc.printed, error=exc.message, timed_out=exc.timed_out)
    return Outcome(printed=done.logs, value=done.output, is_final=done.is_final_answer)


def _record(candidate: _Candidate, chosen: bool, votes: int) -> Candidate:
    outcome, failure = candidate.outcome, None
    if candidate.parsed.code is None:
        failure = Failure(kind="parse", message="no code block")
    elif outcome is not None and outcome.error is not None:
        failure = Failure(kind="timeout" if outcome.timed_out else "execution", message=outcome.error)
    return Candidate(
        raw=candidate.draft.raw,
        code=candidate.parsed.code,
        repairs=candidate.parsed.repairs,
        outcome=None if outcome is None or failure is not None else outcome_text(outcome),
        failure=failure,
        votes=votes,
        chosen=chosen,
        usage=Usage(output_tokens=len(candidate.draft.token_ids or ())),
        mean_logprob=candidate.draft.mean_logprob,
        output_token_ids=candidate.draft.token_ids,
    )
