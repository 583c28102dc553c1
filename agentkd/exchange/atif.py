"""ATIF, the Agent Trajectory Interchange Format, version 1.8: checked by the package ``atif``.

An action is a call of "python_interpreter" with its code, as other code agents write it; other
agents' calls become the code that makes them. What ATIF has no field for is in ``extra``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentkd import __version__
from agentkd.errors import ConfigError, boundary
from agentkd.exchange.chat import text_of
from agentkd.exchange.draft import Draft, Format, Row, Turn, acted, said
from agentkd.exchange.recast import (
    call_code,
    final_code,
    function_schema,
    printed_of,
    shown,
    tool_from_schema,
)
from agentkd.trajectory import Step, Trajectory, Usage

__all__ = ["ATIF"]

SCHEMA = "ATIF-v1.8"
_INTERPRETER = "python_interpreter"


def _checked(row: Row) -> Row:
    with boundary(ConfigError, "importing atif", "Install it by: pip install 'agentkd[exchange]'."):
        import atif
    checked: Row = atif.Trajectory.model_validate(row).to_json_dict()
    return checked


def _encode(trajectory: Trajectory) -> Row:
    steps: list[Row] = [
        {"source": "system", "message": trajectory.system_prompt},
        {"source": "user", "message": trajectory.task.question},
        *(_encode_step(step, trajectory) for step in trajectory.steps),
    ]
    if trajectory.started_at:
        steps[1]["timestamp"] = trajectory.started_at
    row = {
        "schema_version": SCHEMA,
        "session_id": trajectory.id,
        "trajectory_id": trajectory.id,
        "agent": {
            "name": "agentkd",
            "version": trajectory.versions.get("agentkd", __version__),
            "model_name": trajectory.model,
            "tool_definitions": [function_schema(tool) for tool in trajectory.tools],
        },
        "steps": [{"step_id": number, **step} for number, step in enumerate(steps, 1)],
        "final_metrics": {
            "total_prompt_tokens": trajectory.usage.input_tokens,
            "total_completion_tokens": trajectory.usage.output_tokens,
            "total_steps": len(steps),
        },
        "extra": {"answer": trajectory.task.answer, "prediction": trajectory.answer},
    }
    return _checked(row)


def _encode_step(step: Step, trajectory: Trajectory) -> Row:
    row: Row = {
        "source": "agent",
        "message": step.output,
        "metrics": {
            "prompt_tokens": step.usage.input_tokens,
            "completion_tokens": step.usage.output_tokens,
            "prompt_token_ids": step.prompt_token_ids,
            "completion_token_ids": step.output_token_ids,
            "logprobs": step.logprobs,
        },
    }
    if step.actor != trajectory.model:
        row["model_name"] = step.actor
    call_id = None
    if step.code is not None:
        call_id = f"call_{step.number}"
        row["reasoning_content"] = step.thought
        row["tool_calls"] = [
            {"tool_call_id": call_id, "function_name": _INTERPRETER, "arguments": {"code": step.code}}
        ]
    if step.observation is not None:
        result = {"source_call_id": call_id, "content": printed_of(step.observation)}
        row["observation"] = {"results": [result]}
    return row


def _decode(row: Row) -> Draft:
    row = _checked(row)
    steps = [step for step in row["steps"] if not step.get("is_copied_context")]
    question = "\n\n".join(text_of(step["message"]) for step in steps if step["source"] == "user")
    if not question:
        raise ValueError('no step has the source "user"')
    extra = row.get("extra") or {}
    turns = [replace(_turn(step), facts=_facts(step)) for step in steps if step["source"] == "agent"]
    if turns and turns[-1].code is None and any(turn.code for turn in turns):
        last = turns[-1]
        if last.observation is None:  # a tool-calling agent's last plain text is its answer
            turns[-1] = replace(acted("", final_code(last.output), raw=last.output), is_final=True)
    definitions = row["agent"].get("tool_definitions")
    return Draft(
        question=question,
        turns=tuple(turns),
        id=row.get("trajectory_id") or row.get("session_id"),
        gold=extra.get("answer"),
        answer=extra.get("prediction"),
        system_prompt="\n\n".join(text_of(step["message"]) for step in steps if step["source"] == "system"),
        model=row["agent"].get("model_name") or "unknown",
        tools=None if definitions is None else tuple(tool_from_schema(tool) for tool in definitions),
        started_at=next((step["timestamp"] for step in steps if "timestamp" in step), ""),
    )


def _facts(step: Row) -> dict[str, Any]:
    metrics = step.get("metrics") or {}
    facts = {
        "actor": step.get("model_name"),
        "prompt_token_ids": metrics.get("prompt_token_ids"),
        "output_token_ids": metrics.get("completion_token_ids"),
        "logprobs": metrics.get("logprobs"),
        "usage": Usage(
            input_tokens=metrics.get("prompt_tokens") or 0,
            output_tokens=metrics.get("completion_tokens") or 0,
        ),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _turn(step: Row) -> Turn:
    text, calls = text_of(step["message"]), step.get("tool_calls") or []
    results = (step.get("observation") or {}).get("results", ())
    observation = shown("\n".join(text_of(item.get("content")) for item in results)) if results else None
    if not calls:
        return said(text, observation)
    if len(calls) == 1 and calls[0]["function_name"] == _INTERPRETER and "code" in calls[0]["arguments"]:
        code = str(calls[0]["arguments"]["code"])
        turn = said(text, observation)
        if turn.code == code:
            return turn
    else:
        code = call_code((call["function_name"], call["arguments"]) for call in calls)
    thought = step.get("reasoning_content") or text
    return acted(thought, code, observation, raw=text)


ATIF = Format(
    name="atif",
    about="Agent Trajectory Interchange Format 1.8",
    encode=_encode,
    decode=_decode,
    keys=frozenset(
        [
            "schema_version",
            "session_id",
            "trajectory_id",
            "agent",
            "steps",
            "notes",
            "final_metrics",
            "continued_trajectory_ref",
            "extra",
            "subagent_trajectories",
        ]
    ),
    containers=(".jsonl", ".json", "files"),
    extra=("extra", "agentkd"),
)
