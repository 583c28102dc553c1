"""Chat messages, one conversation a row: what TRL, LLaMA-Factory and ms-swift train on.

``{"messages": [{"role", "content"}, ...], "tools": "[...]"}``; the tools are a JSON string of
function schemas, so that Arrow does not pad them with nulls. Read are also the tool calls of the
OpenAI form (``tool_calls``, role "tool"), ms-swift's roles "tool_call" and "tool_response", and
ShareGPT's ``conversations`` of ``{"from", "value"}``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from agentkd.exchange.draft import Draft, Format, Row, Turn, acted, said
from agentkd.exchange.recast import call_code, final_code, function_schema, shown, tools_of
from agentkd.prompt import trajectory_messages
from agentkd.trajectory import Trajectory

__all__ = ["CHAT", "decode_chat", "encode_chat", "text_of"]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "tool_call",
    "tool-call": "tool_call",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool-response": "tool",
}


def encode_chat(trajectory: Trajectory) -> Row:
    """One row; the roles are system, user and assistant only, which every trainer takes."""
    return {
        "id": trajectory.id,
        "messages": trajectory_messages(trajectory),
        "tools": json.dumps([function_schema(tool) for tool in trajectory.tools], ensure_ascii=False),
        "answer": trajectory.task.answer,
        "prediction": trajectory.answer,
        "model": trajectory.model,
    }


def decode_chat(row: Row) -> Draft:
    """A draft of one conversation."""
    messages = _messages(row)
    system = "\n\n".join(text_of(m["content"]) for m in messages if m["role"] == "system")
    talk = [message for message in messages if message["role"] != "system"]
    start = next((i for i, m in enumerate(talk) if m["role"] in ("assistant", "tool_call")), len(talk))
    question = "\n\n".join(text_of(message["content"]) for message in talk[:start])
    if not question:
        raise ValueError("no user message stands before the first of the assistant")
    return Draft(
        question=question,
        turns=_turns(talk[start:]),
        id=row.get("id"),
        gold=row.get("answer"),
        answer=row.get("prediction"),
        system_prompt=row.get("system") or system,
        model=row.get("model") or "unknown",
        tools=None if row.get("tools") is None else tools_of(row["tools"]),
    )


def _messages(row: Row) -> list[dict[str, Any]]:
    if "messages" in row:
        messages = [dict(message) for message in row["messages"]]
    else:
        messages = [{"role": item["from"], "content": item["value"]} for item in row["conversations"]]
    for message in messages:
        role = str(message["role"]).removeprefix("MessageRole.").lower()
        message["role"] = _ROLES.get(role, role)
        if message["role"] not in ("system", "user", "assistant", "tool", "tool_call"):
            raise ValueError(f"unknown role {role!r}")
    return messages


def text_of(content: Any) -> str:
    """The text of a message, of one part or several; None is empty.

    Raises:
        ValueError: neither a text nor a list of parts.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    raise ValueError(f"content is neither a text nor a list of parts: {content!r}")


@dataclass
class _Open:
    """A turn that is being read."""

    texts: list[str] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)

    def close(self) -> Turn:
        observation = shown("\n".join(self.replies)) if self.replies else None
        text = "\n".join(self.texts)
        if self.calls:
            return acted(_thought(text), call_code(self.calls), observation, raw=text)
        return said(text, observation)


def _thought(text: str) -> str:
    return text.removeprefix("<think>").removesuffix("</think>").strip()


def _turns(messages: list[dict[str, Any]]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    now, called = _Open(), False
    for message in messages:
        role = message["role"]
        if role in ("assistant", "tool_call") and now.replies:
            turns.append(now.close())
            now = _Open()
        text = text_of(message.get("content"))
        if role == "assistant":
            if now.texts and not now.calls:  # two turns with nothing said in between
                turns.append(now.close())
                now = _Open()
            now.texts += [text] if text else []
            now.calls += [_call(item) for item in message.get("tool_calls") or ()]
        elif role == "tool_call":
            now.calls.append(_call(json.loads(text)))
        else:
            now.replies.append(text)
        called = called or bool(now.calls)
    if now.texts or now.calls:
        turns.append(now.close())
    return tuple(_answered(turns) if called else turns)


def _call(item: Any) -> tuple[str, Any]:
    function = item.get("function", item)
    return function["name"], function.get("arguments", {})


def _answered(turns: list[Turn]) -> list[Turn]:
    """A tool-calling agent's last plain text is its answer."""
    last = turns[-1]
    if last.code is not None or last.observation is not None:
        return turns
    return [*turns[:-1], replace(acted("", final_code(last.output), raw=last.output), is_final=True)]


CHAT = Format(
    name="chat",
    about="chat messages (TRL, LLaMA-Factory, ms-swift)",
    encode=encode_chat,
    decode=decode_chat,
    keys=frozenset(["id", "messages", "conversations", "system", "tools", "answer", "prediction", "model"]),
    containers=(".jsonl", ".json", ".parquet"),
)
