"""World-knowledge distillation: a trajectory with tools becomes a solution without.

A rewriter keeps what the tools have found, says nothing of the tools, and rejects what it doubts.
:func:`literal_rewriter` needs no model: the solution is the answer itself, behind a short thought.
:func:`model_rewriter` asks a teacher for a worked solution.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from agentkd.adapt.config import AdaptConfig
from agentkd.agent_config import AgentConfig, agent_factory
from agentkd.errors import ProviderError
from agentkd.rollouts import Progress, run_rollouts
from agentkd.scorer import normalise
from agentkd.task import Task
from agentkd.tool_use import used_tool
from agentkd.trajectory import Trajectory

__all__ = [
    "REWRITE",
    "Rejected",
    "Rewriter",
    "Solution",
    "literal",
    "literal_rewriter",
    "model_rewriter",
    "needs_rewriting",
    "rewrite_request",
]

REWRITE = """\
You are given a question and the log of an assistant that answered it with tools. Write the solution as \
somebody does who knows the facts and works in the head: keep every fact and every result that the log \
found, add none, and never speak of tools, searches, code, passages, observations or the log. Then give \
the bare answer on a last line of its own, as "Answer: <answer>".
If the log does not prove its answer, or you doubt it, write "Doubt: <why>" and then "Answer: doubt"."""

_SPEAKS_OF_TOOLS = re.compile(
    r"```|\b(tools?|search(?:ed|es|ing)?|python|code|passages?|observ(?:ed|ations?)|look(?:ed)? up|log)\b",
    re.IGNORECASE,
)
_ANSWER_LINE = re.compile(r"^\s*\**(?:final )?answer\**\s*[:=].*\Z", re.IGNORECASE | re.MULTILINE | re.DOTALL)


class Solution(NamedTuple):
    """A solution without tools."""

    thought: str
    """What stands before the answer; it does not speak of tools."""
    code: str
    """A lone ``final_answer(<literal>)``."""
    by: str
    """Who rewrote it: "literal", or the model's id."""


class Rejected(NamedTuple):
    """Why there is no solution."""

    reason: str


class Rewriter(Protocol):
    """Makes solutions of trajectories: one for each id, or the reason why not."""

    def __call__(self, traces: Sequence[Trajectory]) -> dict[str, Solution | Rejected]: ...


def literal(answer: str) -> str:
    """An answer as a Python literal: a number as such, anything else as a string."""
    text = answer.strip()
    try:
        if str(int(text)) == text or str(float(text)) == text:
            return text if text not in ("nan", "inf", "-inf") else json.dumps(text)
    except ValueError:
        pass
    return json.dumps(text, ensure_ascii=False)


def literal_rewriter(config: AdaptConfig) -> Rewriter:
    """The answer itself, behind the thought of the settings; always the same for the same trajectory."""

    def rewrite(traces: Sequence[Trajectory]) -> dict[str, Solution | Rejected]:
        return {trace.id: _literal_solution(trace, config) for trace in traces}

    return rewrite


def _literal_solution(trace: Trajectory, config: AdaptConfig) -> Solution | Rejected:
    answer = (trace.answer or "").strip()
    if len(answer) > config.longest_answer or len(answer.splitlines()) != 1:
        return Rejected(f"no literal: an answer of {len(answer)} characters, {config.longest_answer} allowed")
    goal = _goal(trace) if "{goal}" in config.thought else ""
    if isinstance(goal, Rejected):
        return goal
    thought = config.thought.replace("{goal}", goal).replace("{answer}", answer)
    return Solution(thought, f"final_answer({literal(answer)})", "literal")


def _goal(trace: Trajectory) -> str | Rejected:
    """What the first thought says first: up to its first full stop, or to what it concludes from it."""
    thought = next((step.thought for step in trace.steps if step.thought), "")
    goal = re.split(r"[.!?](?=\s|$)|,? so\b|\n", thought.strip(), maxsplit=1)[0].strip()
    if not goal:
        return Rejected("no goal: the trajectory has no thought")
    spoken = _word_of_tools(trace, goal)
    return Rejected(f"no goal: its first thought speaks of tools: {spoken!r}") if spoken else f"{goal}."


def model_rewriter(
    agent: AgentConfig,
    folder: Path,
    config: AdaptConfig,
    *,
    workers: int = 8,
    on_progress: Callable[[Progress], None] | None = None,
) -> Rewriter:
    """A teacher behind an endpoint rewrites, and rejects what it doubts.

    What it has rewritten stands in ``folder`` and is not asked again.

    Args:
        agent: the endpoint and its model; asked as a chain of thought.
        folder: for ``trajectories.jsonl`` and the call log of the rewriting.
        config: the settings.
        workers: calls in flight.
        on_progress: told of each result.
    """
    settings = agent.model_copy(update={"kind": "cot", "prompt": REWRITE})

    def rewrite(traces: Sequence[Trajectory]) -> dict[str, Solution | Rejected]:
        tasks = [_rewriting(trace) for trace in traces]
        done = run_rollouts(
            tasks,
            agent_factory(settings),
            folder / "trajectories.jsonl",
            workers=workers,
            config=settings.model_dump(mode="json"),
            on_progress=on_progress,
        )
        if len(done) < len(tasks):
            raise ProviderError(
                f"{len(tasks) - len(done)} of {len(tasks)} rewritings ended by errors.",
                f"See {folder / 'errors.jsonl'}; run the same command again to try them again.",
            )
        texts = dict(zip((trace.id for trace in traces), done, strict=True))
        return {trace.id: _model_solution(trace, texts[trace.id], config) for trace in traces}

    return rewrite


def _rewriting(trace: Trajectory) -> Task:
    """The rewriting as a task; its answer must be the one of the trajectory."""
    return Task(
        id=trace.id,
        question=rewrite_request(trace),
        answer=trace.answer,
        scorer=trace.task.scorer,
        split=trace.task.split,
    )


def rewrite_request(trace: Trajectory) -> str:
    """What a rewriter is shown of a trajectory."""
    steps = [text for step in trace.steps for text in (step.output, step.observation) if text]
    log = "\n".join([*steps, f"The assistant's answer: {trace.answer}"])
    return f"Question: {trace.task.question}\n\nLog:\n{log}"


def _model_solution(trace: Trajectory, rewritten: Trajectory, config: AdaptConfig) -> Solution | Rejected:
    text = rewritten.steps[-1].output if rewritten.steps else ""
    body = _ANSWER_LINE.sub("", text).strip()
    if rewritten.answer is None:
        return Rejected(f"no solution: {rewritten.stop_reason.value}")
    if normalise(rewritten.answer) == "doubt":
        return Rejected(f"the rewriter doubts: {_first_line(body)}")
    if not rewritten.correct:
        return Rejected(f"another answer: {_first_line(rewritten.answer)!r}, the tools' was {trace.answer!r}")
    spoken = _word_of_tools(trace, body)
    if spoken:
        return Rejected(f"speaks of tools: {spoken!r}")
    plain = _literal_solution(trace, config)
    if isinstance(plain, Rejected):
        return plain
    return Solution(body or plain.thought, plain.code, rewritten.model)


def _word_of_tools(trace: Trajectory, text: str) -> str | None:
    """A word for tools, or the name of one that was called, where the question has no such word itself."""
    names = {use.name for step in trace.steps for use in step.tool_uses}
    found = [match.group(0) for match in _SPEAKS_OF_TOOLS.finditer(text)]
    found += [name for name in sorted(names) if re.search(rf"\b{re.escape(name)}\b", text)]
    asked = trace.task.question.casefold()
    return next((word for word in found if word.casefold() not in asked), None)


def _first_line(text: str) -> str:
    lines = text.strip().removeprefix("Doubt:").strip().splitlines()
    return lines[0][:200] if lines else ""


def needs_rewriting(trace: Trajectory, config: AdaptConfig) -> bool:
    """False for a trajectory that is a solution without tools already."""
    return used_tool(trace, config.tools) or used_tool(trace, "search")
