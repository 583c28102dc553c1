"""The row that the published code of *Distilling LLM Agent into Small Models* reads and writes.

``{"model_id", "question", "generated_answer", "true_answer", "log_data": {"messages", ...},
"score"}`` (https://github.com/Nardien/agent-distillation): the messages carry smolagents' older
roles, "tool-call" with the calls as a Python literal and "tool-response" with headings; ``log_data``
is a JSON string in the sets on the hub.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from typing import Any

from agentkd.exchange.chat import text_of
from agentkd.exchange.draft import Draft, Format, Row, Turn, acted, said
from agentkd.exchange.recast import logs_of, observation_from_logs, thought_of
from agentkd.trajectory import Failure, Step, Trajectory

__all__ = ["REFERENCE"]

_TASK = "New task:\n"
_CALLS = "Calling tools:\n"
_RETRY = (
    "\nNow let's retry: take care not to repeat previous errors! If you have retried several times, "
    "try a completely different approach.\n"
)
_PARSE_ERROR = "Error in code parsing:\n"
_ERROR = re.compile(r"\A(?:Call id: \S+\n)?Error:\n(.*?)(?:\nNow let's retry: .*)?\Z", re.DOTALL)
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _encode(trajectory: Trajectory) -> Row:
    messages = [
        _message("system", trajectory.system_prompt),
        _message("user", _TASK + trajectory.task.question),
    ]
    for step in trajectory.steps:
        messages += _step_messages(step, trajectory.answer)
    cost = {"total_cost": 0.0}
    return {
        "model_id": trajectory.model,
        "question": trajectory.task.question,
        "generated_answer": trajectory.answer,
        "true_answer": trajectory.task.answer,
        "log_data": {
            "messages": messages,
            "original_memory": {
                "system_prompt": {"system_prompt": trajectory.system_prompt},
                "steps": [],
            },
            "metadata": {
                "task": trajectory.task.question,
                "model": {"model_id": trajectory.model},
                "total_steps": len(trajectory.steps),
                "final_answer": trajectory.answer,
                "cost": cost,
            },
        },
        "score": int(trajectory.correct),
    }


def _step_messages(step: Step, answer: str | None) -> list[dict[str, Any]]:
    if step.code is None:
        messages = [_message("assistant", step.output)]
        if step.failure is not None:
            text = f"Error:\n{_PARSE_ERROR}{step.failure.message}{_RETRY}"
            messages.append(_message("tool-response", text))
        return messages
    call_id = f"call_{step.number}"
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": "python_interpreter", "arguments": step.code},
    }
    text = f"Thought: {step.thought}\nCode:\n```py\n{step.code}\n```<end_code>"
    messages = [_message("assistant", text), _message("tool-call", f"{_CALLS}{[call]}")]
    logs, error = logs_of(step.observation)
    if step.is_final:
        logs = f"Execution logs:\n\nLast output from code snippet:\n{answer}"
    if step.failure is not None:
        error = step.failure.message
    if logs is not None and (step.observation is not None or step.is_final):
        messages.append(_message("tool-response", f"Call id: {call_id}\nObservation:\n{logs}"))
    if error is not None:
        messages.append(_message("tool-response", f"Call id: {call_id}\nError:\n{error}{_RETRY}"))
    return messages


def _decode(row: Row) -> Draft:
    log = row["log_data"]
    if isinstance(log, str):
        log = json.loads(log)
    if not log:
        raise ValueError(f"log_data is empty ({row.get('error', 'the run had failed')})")
    system, turns = "", []
    for role, texts in _grouped(log["messages"]):
        if role == "system":
            system = texts[0]
        elif role == "turn":
            turns.append(_turn(texts))
    answer = row.get("generated_answer")
    gold = row.get("true_answer")
    return Draft(
        question=row["question"],
        turns=tuple(turns),
        gold=None if gold is None else str(gold),
        answer=None if answer is None else str(answer),
        system_prompt=system,
        model=row.get("model_id") or "unknown",
    )


def _grouped(messages: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """("system", [text]), ("user", [text]) and ("turn", [(role, text), ...])."""
    groups: list[tuple[str, list[Any]]] = []
    for message in messages:
        role = str(message["role"]).removeprefix("MessageRole.").lower().replace("_", "-")
        text = text_of(message["content"])
        if role == "assistant":
            groups.append(("turn", [(role, text)]))
        elif role in ("tool-call", "tool-response") and groups and groups[-1][0] == "turn":
            groups[-1][1].append((role, text))
        elif role in ("system", "user"):
            groups.append((role, [text]))
        else:
            raise ValueError(f"unexpected role {role!r}")
    return groups


def _turn(parts: list[tuple[str, str]]) -> Turn:
    raw = parts[0][1]
    code = logs = error = None
    for role, text in parts[1:]:
        if role == "tool-call":
            calls = ast.literal_eval(text.removeprefix(_CALLS))
            code = str(calls[0]["function"]["arguments"])
        elif found := _ERROR.match(text):
            error = found.group(1)
        else:
            logs = text
    fenced = _CODE.search(raw)
    if code is None and error is None and fenced:
        code = fenced.group(1)
    observation = None if logs is None and error is None else observation_from_logs(logs, error)
    if code is None:
        error = None if error is None else error.removeprefix(_PARSE_ERROR)
        observation = None if error is None else observation_from_logs(None, error)
        turn = said(raw, observation)
        turn = replace(turn, code=None)
    else:
        turn = acted(thought_of(raw), code, observation, raw=raw)
    if error is None:
        return turn
    return replace(turn, failure=Failure(kind="parse" if code is None else "execution", message=error))


REFERENCE = Format(
    name="reference",
    about="rows of the published agent-distillation code (log_data.messages)",
    encode=_encode,
    decode=_decode,
    keys=frozenset(["model_id", "question", "generated_answer", "true_answer", "log_data", "score"]),
    containers=(".jsonl", ".parquet"),
)
