"""Logs of Inspect (``inspect_ai``), log version 2: a run is one log, a trajectory one sample of it.

A ``.json`` file is a log, a ``.jsonl`` file holds the samples alone.

An action is a call of the tool "python" with its code, its observation the tool's message. Several samples of
one task are its epochs. What a sample has no field for is in its ``metadata``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentkd import __version__
from agentkd.exchange.chat import text_of
from agentkd.exchange.draft import Draft, Format, Row, Turn, acted, said
from agentkd.exchange.recast import call_code, printed_of, shown
from agentkd.trajectory import Step, Trajectory, Usage

__all__ = ["INSPECT"]

_VERSION = 2
_PYTHON = "python"
_EPOCH = "1970-01-01T00:00:00+00:00"
"""Where no trajectory says when it began; the log must."""
_KEYS = (
    "id epoch input choices target sandbox files setup messages output scores metadata store events "
    "timelines model_usage role_usage model_fallbacks started_at completed_at total_time working_time uuid "
    "invalidation error error_retries attachments events_data limit turn_count token_limit token_limit_type "
    "token_limit_usage message_limit time_limit description"
)


def _encode(trajectory: Trajectory) -> Row:
    task, usage = trajectory.task, trajectory.usage
    messages: list[Row] = []
    if trajectory.system_prompt:
        messages.append({"role": "system", "content": trajectory.system_prompt})
    messages.append({"role": "user", "content": task.question})
    for step in trajectory.steps:
        messages += _messages(step)
    last = next((item for item in reversed(messages) if item["role"] == "assistant"), None)
    answer = trajectory.answer or ""
    row: Row = {
        "id": task.id,
        "epoch": trajectory.sample + 1,
        "input": task.question,
        "target": task.answer or "",
        "messages": messages,
        "output": {
            "model": trajectory.model,
            "choices": [{"message": last, "stop_reason": "stop"}] if last else [],
            "completion": answer,
        },
        "scores": _scores(trajectory),
        "model_usage": {
            trajectory.model: {
                "input_tokens": usage.input_tokens,
                "output_tokens": usage.output_tokens,
                "total_tokens": usage.input_tokens + usage.output_tokens,
                "input_tokens_cache_read": usage.cached_tokens,
            }
        },
        "total_time": trajectory.seconds,
    }
    if trajectory.started_at:
        row["started_at"] = trajectory.started_at
    if trajectory.stop_reason.is_error:
        message = trajectory.failure.message if trajectory.failure else trajectory.stop_reason.value
        row["error"] = {"message": message, "traceback": "", "traceback_ansi": ""}
    return row


def _messages(step: Step) -> list[Row]:
    call = f"call_{step.number}"
    said_by_model: Row = {"role": "assistant", "content": step.output, "model": step.actor}
    if step.code is not None:
        said_by_model["tool_calls"] = [
            {"id": call, "function": _PYTHON, "arguments": {"code": step.code}, "type": "function"}
        ]
    if step.observation is None:
        return [said_by_model]
    answer: Row = {"role": "user", "content": printed_of(step.observation)}
    if step.code is not None:
        answer |= {"role": "tool", "tool_call_id": call, "function": _PYTHON}
    return [said_by_model, answer]


def _scores(trajectory: Trajectory) -> Row:
    score = trajectory.score
    if score is None or score.value is None:
        return {}
    given: Row = {"value": score.value, "answer": trajectory.answer, "metadata": {"scorer": score.scorer}}
    return {"score": {**given, "explanation": score.reason} if score.reason else given}


def _decode(row: Row) -> Draft:
    given = row["input"]
    messages = row["messages"]
    question = given if isinstance(given, str) else _joined(given, "user")
    model = row["output"]["model"] or "unknown"
    target = row["target"] if isinstance(row["target"], str) else "\n".join(row["target"])
    return Draft(
        question=question,
        turns=tuple(_turns(messages, model)),
        id=f"{row['id']}#{row['epoch'] - 1}",
        gold=target or None,
        answer=row["output"].get("completion") or None,
        system_prompt=_joined(messages, "system"),
        model=model,
        started_at=row.get("started_at") or "",
    )


def _joined(messages: Sequence[Row], role: str) -> str:
    return "\n\n".join(text_of(message["content"]) for message in messages if message["role"] == role)


def _turns(messages: Sequence[Row], model: str) -> list[Turn]:
    turns: list[Turn] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answers: list[str] = []
        for later in messages[at + 1 :]:
            if later["role"] == "assistant":
                break
            answers.append(text_of(later["content"]))
        turns.append(_turn(message, shown("\n".join(answers)) if answers else None, model))
    return turns


def _turn(message: Row, observation: str | None, model: str) -> Turn:
    text, calls = text_of(message["content"]), message.get("tool_calls") or []
    facts: dict[str, Any] = {"actor": message.get("model") or model, "usage": Usage()}
    if not calls:
        turn = said(text, observation)
    elif len(calls) == 1 and calls[0]["function"] == _PYTHON and "code" in calls[0]["arguments"]:
        code = str(calls[0]["arguments"]["code"])
        turn = said(text, observation)
        turn = turn if turn.code == code else acted(text, code, observation, raw=text)
    else:
        code = call_code((call["function"], call["arguments"]) for call in calls)
        turn = acted(text, code, observation, raw=text)
    return Turn(**{**vars(turn), "facts": facts})


def _log(rows: list[Row]) -> Row:
    """The log around the samples, with their mean score."""
    first, ids = rows[0], list(dict.fromkeys(row["id"] for row in rows))
    created = min((row["started_at"] for row in rows if "started_at" in row), default=_EPOCH)
    values = [row["scores"]["score"]["value"] for row in rows if row["scores"]]
    return {
        "version": _VERSION,
        "status": "success",
        "eval": {
            "created": created,
            "task": "agentkd",
            "dataset": {"name": "agentkd", "samples": len(ids), "sample_ids": ids},
            "model": first["output"]["model"],
            "config": {"epochs": max(row["epoch"] for row in rows)},
            "packages": {"agentkd": __version__},
        },
        "results": {
            "total_samples": len(rows),
            "completed_samples": sum("error" not in row for row in rows),
            "scores": [_result(values)] if values else [],
        },
        "stats": {"started_at": created, "completed_at": created},
        "samples": rows,
    }


def _result(values: list[float]) -> Row:
    metrics = {"mean": {"name": "mean", "value": sum(values) / len(values)}}
    return {"name": "score", "scorer": "score", "scored_samples": len(values), "metrics": metrics}


def _samples(log: Row) -> list[Row]:
    samples = log["samples"]
    if not isinstance(samples, list):
        raise ValueError("the log has no samples")
    return samples


INSPECT = Format(
    name="inspect",
    about="a log of Inspect in JSON, version 2",
    encode=_encode,
    decode=_decode,
    keys=frozenset(_KEYS.split()),
    containers=(".json", ".jsonl"),
    extra=("metadata", "agentkd"),
    wrap=_log,
    unwrap=_samples,
)
