"""smolagents' memory: the step dictionaries of ``agent.memory.get_full_steps()``.

A row is ``{"system_prompt", "steps": [...]}``; a run's own ``RunResult.dict()`` and a bare list of
steps in a ``.json`` file are read too. :func:`agent_memory` makes smolagents' own objects, so that
its replay and its tools for memory work on collected trajectories.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentkd.exchange.chat import text_of
from agentkd.exchange.draft import Draft, Format, Row, Turn, acted, said
from agentkd.exchange.recast import call_code, final_code, logs_of, observation_from_logs, thought_of
from agentkd.trajectory import Failure, Step, Trajectory, Usage

if TYPE_CHECKING:
    from smolagents.memory import ActionStep, AgentMemory

__all__ = ["SMOLAGENTS", "agent_memory"]

_INTERPRETER = "python_interpreter"


def agent_memory(trajectory: Trajectory) -> AgentMemory:
    """The trajectory as an ``AgentMemory``: ``agent_memory(t).replay(logger)`` shows it.

    The wording of observations and errors is smolagents' own.
    """
    from smolagents.memory import AgentMemory, TaskStep

    memory = AgentMemory(trajectory.system_prompt)
    memory.steps.append(TaskStep(task=trajectory.task.question))
    for step in trajectory.steps:
        memory.steps.append(_action_step(step, trajectory))
    return memory


def _action_step(step: Step, trajectory: Trajectory) -> ActionStep:
    from smolagents.memory import ActionStep, ToolCall
    from smolagents.monitoring import AgentLogger, LogLevel, Timing, TokenUsage
    from smolagents.utils import AgentExecutionError, AgentParsingError

    logs, message = logs_of(step.observation) if step.observation is not None else (None, None)
    if step.failure is not None:
        message = step.failure.message
    error = None
    if message is not None:
        kind = AgentParsingError if step.code is None else AgentExecutionError
        error = kind(message, AgentLogger(level=LogLevel.OFF))
    answer = trajectory.answer if step.is_final else None
    return ActionStep(
        step_number=step.number,
        timing=Timing(start_time=0.0, end_time=step.model_seconds + step.code_seconds),
        tool_calls=[ToolCall(name=_INTERPRETER, arguments=step.code, id=f"call_{step.number}")]
        if step.code is not None
        else None,
        error=error,
        model_output=step.output,
        code_action=step.code,
        observations=f"Execution logs:\nLast output from code snippet:\n{answer}" if step.is_final else logs,
        action_output=answer,
        token_usage=TokenUsage(step.usage.input_tokens, step.usage.output_tokens),
        is_final_answer=step.is_final,
    )


def _encode(trajectory: Trajectory) -> Row:
    return {
        "id": trajectory.id,
        "system_prompt": trajectory.system_prompt,
        "steps": agent_memory(trajectory).get_full_steps(),
        "output": trajectory.answer,
        "answer": trajectory.task.answer,
        "model": trajectory.model,
    }


def _decode(row: Row) -> Draft:
    steps: list[dict[str, Any]] = row["steps"]
    question = next((step["task"] for step in steps if "task" in step), row.get("task"))
    if not question:
        raise ValueError('no step has a "task"')
    actions = [step for step in steps if "step_number" in step]
    ends = [step for step in actions if step.get("is_final_answer")]
    answer = ends[-1].get("action_output") if ends else row.get("output")
    return Draft(
        question=question,
        turns=tuple(_turn(step) for step in actions),
        id=row.get("id"),
        gold=row.get("answer"),
        answer=None if answer is None else str(answer),
        system_prompt=row.get("system_prompt") or _system(steps),
        model=row.get("model") or "unknown",
    )


def _system(steps: list[dict[str, Any]]) -> str:
    for step in steps:
        for message in step.get("model_input_messages") or ():
            if str(message.get("role")) == "system":
                return text_of(message.get("content"))
        if "system_prompt" in step:
            return str(step["system_prompt"])
    return ""


def _turn(step: dict[str, Any]) -> Turn:
    text = text_of(step.get("model_output"))
    error = step.get("error")
    message = None if error is None else str(error.get("message", error))
    final = bool(step.get("is_final_answer"))
    failure = None
    code = step.get("code_action")
    calls = [item["function"] for item in step.get("tool_calls") or ()]
    if code is None and calls and calls[0]["name"] == _INTERPRETER:
        code = str(calls[0]["arguments"])
    elif code is None and calls:
        code = call_code((call["name"], call.get("arguments")) for call in calls)
        if final:
            code = final_code(str(step.get("action_output")))
    if message is not None:
        failure = Failure(kind="parse" if code is None else "execution", message=message)
    logs = step.get("observations")
    observation = (
        None if final or (logs is None and message is None) else observation_from_logs(logs, message)
    )
    if code is None:
        turn = said(text, observation)
    else:
        before = said(text)
        same = before.code == code.strip("\n") and before.output == text.strip()
        turn = before if same else acted(thought_of(text), code, raw=text)
    return replace(turn, observation=observation, failure=failure, is_final=final, facts=_facts(step))


def _facts(step: dict[str, Any]) -> dict[str, Any]:
    used = step.get("token_usage")
    if not used:
        return {}
    return {"usage": Usage(input_tokens=used["input_tokens"], output_tokens=used["output_tokens"])}


SMOLAGENTS = Format(
    name="smolagents",
    about="memory of a smolagents agent",
    encode=_encode,
    decode=_decode,
    keys=frozenset(["id", "system_prompt", "steps", "output", "answer", "model", "task"]),
    containers=(".jsonl", ".json", "files"),
)
