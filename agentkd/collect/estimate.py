"""What a run will cost, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from agentkd import prompt as prompts
from agentkd.collect.config import CollectConfig
from agentkd.rollouts import count_left
from agentkd.spend import Price
from agentkd.task import Task
from agentkd.trajectory import Trajectory, Usage

__all__ = ["Estimate", "estimate"]

CHARACTERS_PER_TOKEN = 4
STEPS = 3
STEP_TOKENS = 160
"""Sampled tokens of a step, and as many of its observation, where nothing was measured yet."""
ENOUGH_MEASURED = 3


class Estimate(NamedTuple):
    """What is still to be done, about."""

    rollouts: int
    calls: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    """US dollars; None without a price for every model (of several teachers the dearest counts)."""
    basis: str
    """What it rests on, in words."""

    def plus(self, other: Estimate) -> Estimate:
        """Both together."""
        costs = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Estimate(
            self.rollouts + other.rollouts,
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            costs,
            self.basis if self.basis == other.basis else f"{self.basis}; and {other.basis}",
        )

    def text(self) -> str:
        """One line for people."""
        money = "" if self.cost is None else f", about ${self.cost:.2f}"
        return (
            f"To do: {self.rollouts} rollouts, about {self.calls} calls, {self.input_tokens} prompt and "
            f"{self.output_tokens} sampled tokens{money} ({self.basis})."
        )


def estimate(
    config: CollectConfig,
    tasks: Sequence[Task],
    prices: dict[str, Price],
    finished: Sequence[Trajectory] = (),
    to_think: int = 0,
) -> Estimate:
    """Guess the cost of the rollouts that are left.

    Args:
        config: the run.
        tasks: all its tasks.
        prices: by model id.
        finished: what the run has already; three of them are enough to go by.
        to_think: chains of thought that first thoughts are still to be taken from.
    """
    left = count_left(tasks, {item.id: item for item in finished}, config.samples, config.enough)
    if len(finished) >= ENOUGH_MEASURED:
        usage = sum((item.usage for item in finished), Usage())
        count = len(finished)
        calls = sum(len(item.steps) for item in finished) / count
        tokens = usage.input_tokens / count, usage.output_tokens / count
        basis = f"measured on {count} finished rollouts"
    else:
        calls, *rest = _guess(config, tasks)
        tokens = rest[0], rest[1]
        basis = f"assumed: {calls:g} calls of {STEP_TOKENS} sampled tokens each"
    _, *thought = _guess(config, tasks, cot=True)
    total = Usage(
        input_tokens=round(left * tokens[0] + to_think * thought[0]),
        output_tokens=round(left * tokens[1] + to_think * thought[1]),
    )
    models = {teacher.model for teacher in config.everyone()}
    cost = max(prices[model].of(total) for model in models) if models <= set(prices) else None
    if to_think:
        basis += f"; {to_think} chains of thought before that"
    return Estimate(
        left, round(left * calls) + to_think, total.input_tokens, total.output_tokens, cost, basis
    )


def _guess(config: CollectConfig, tasks: Sequence[Task], cot: bool = False) -> tuple[float, float, float]:
    """Calls, prompt tokens and sampled tokens of one rollout; of a chain of thought where that is meant."""
    own = None if cot else config.agent.prompt
    cot = cot or config.agent.kind == "cot"
    calls = 1 if cot else min(STEPS, config.agent.max_steps)
    template = own or (prompts.COT_TEACHER if cot else prompts.TEACHER)
    question = sum(len(task.question) for task in tasks) / max(1, len(tasks))
    first = (len(template) + question) / CHARACTERS_PER_TOKEN
    # Each call repeats what was said before: its own prompt, then turn and observation of each step.
    before = sum(2 * STEP_TOKENS * step for step in range(calls))
    return float(calls), calls * first + before, float(calls * STEP_TOKENS)
