"""Other agents' forms of an action, an observation and a tool, made into the form of a student.

A tool-calling agent's call becomes the line of code that makes it; smolagents' observations lose
their headings; function schemas become the signatures that a prompt is made of.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterable
from typing import Any

__all__ = [
    "call_code",
    "final_code",
    "function_schema",
    "logs_of",
    "observation_from_logs",
    "printed_of",
    "shown",
    "thought_of",
    "tool_from_schema",
    "tools_of",
]

HEAD = "Observation:\n"
NOTHING = "(nothing was printed)"

_LOGS = re.compile(
    r"\A(?:Call id: \S+\n)?(?:Observation:\n)?(?:Execution logs:\n)?(.*?)"
    r"(?:\n?Last output from code snippet:\n(.*))?\Z",
    re.DOTALL,
)
_PARTS = re.compile(r"\A(.*?)(?:(?:\A|\n)Out: (.*?))?(?:(?:\A|\n)Error: (.*))?\Z", re.DOTALL)


def shown(text: str | None) -> str:
    """An observation as a student is shown it; one that is in that form already stays as it is."""
    if text is not None and text.startswith(HEAD):
        return text
    return HEAD + (text if text and text.strip() else NOTHING)


def printed_of(observation: str | None) -> str:
    """What the code printed, without the heading: the opposite of :func:`shown`."""
    text = (observation or "").removeprefix(HEAD)
    return "" if text == NOTHING else text


def observation_from_logs(text: str | None, error: str | None = None) -> str:
    """The observation that smolagents words as "Execution logs" and "Last output from code snippet"."""
    match = _LOGS.match(text or "")
    assert match is not None  # every part of it is optional
    printed, value = match.group(1).rstrip("\n"), (match.group(2) or "None").strip()
    parts = [printed] if printed.strip() else []
    if value != "None":
        parts.append(f"Out: {value}")
    if error is not None:
        parts.append(f"Error: {error}")
    return shown("\n".join(parts))


def logs_of(observation: str | None) -> tuple[str | None, str | None]:
    """``(text as smolagents words it, error)`` of an observation; the text is None for an error alone."""
    match = _PARTS.match(printed_of(observation))
    assert match is not None  # every part of it is optional
    printed, value, error = match.groups()
    if error is not None and not printed and value is None:
        return None, error
    return f"Execution logs:\n{printed}\nLast output from code snippet:\n{value}", error


def call_code(calls: Iterable[tuple[str, Any]]) -> str:
    """Tool calls as the code that makes them: ``print(search(query='x'))``.

    Args:
        calls: name and arguments of each; the arguments a dict, a JSON string of one, or one value.
    """
    lines = []
    for name, given in calls:
        arguments = _arguments(given)
        if isinstance(arguments, dict):
            inside = ", ".join(
                f"{key}={value!r}" if _is_name(key) else f"**{{{key!r}: {value!r}}}"
                for key, value in arguments.items()
            )
        else:
            inside = repr(arguments)
        function = re.sub(r"\W", "_", name)
        call = f"{function}({inside})"
        lines.append(call if name == "final_answer" else f"print({call})")
    return "\n".join(lines)


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _arguments(given: Any) -> Any:
    if isinstance(given, str):
        try:
            parsed = json.loads(given)
        except ValueError:
            return given
        return parsed if isinstance(parsed, dict) else given
    return given


def thought_of(text: str) -> str:
    """What stands before the code: smolagents' agents open it by "<code>", "Code:" or a fence."""
    for mark in ("<code>", "\nCode:", "```"):
        text = text.split(mark)[0]
    return text.strip().removeprefix("Thought:").strip()


def final_code(answer: str) -> str:
    """The code that gives an answer."""
    return f"final_answer({answer!r})"


def function_schema(tool: str) -> dict[str, Any]:
    """A tool as an OpenAI function schema.

    Args:
        tool: as trajectories keep it: JSON of ``{name, description, inputs, output_type}``.
    """
    schema = json.loads(tool)
    inputs = schema.get("inputs", {})
    return {
        "type": "function",
        "function": {
            "name": schema["name"],
            "description": schema.get("description", ""),
            "parameters": {
                "type": "object",
                "properties": {
                    name: {key: value for key, value in spec.items() if key != "nullable"}
                    for name, spec in inputs.items()
                },
                "required": [name for name, spec in inputs.items() if not spec.get("nullable")],
            },
        },
    }


def tool_from_schema(schema: dict[str, Any]) -> str:
    """An OpenAI function schema (with or without the outer "function") as trajectories keep tools."""
    function = schema.get("function", schema)
    if "inputs" in function:
        return json.dumps(function, ensure_ascii=False)
    parameters = function.get("parameters") or {}
    required = parameters.get("required")
    inputs = {}
    for name, spec in (parameters.get("properties") or {}).items():
        optional = required is not None and name not in required
        inputs[name] = {
            "type": spec.get("type", "any"),
            "description": spec.get("description", ""),
            **({"nullable": True} if optional else {}),
        }
    return json.dumps(
        {
            "name": function["name"],
            "description": function.get("description") or "",
            "inputs": inputs,
            "output_type": "string",
        },
        ensure_ascii=False,
    )


def tools_of(value: Any) -> tuple[str, ...]:
    """The tools of a row: None, a list of schemas, or a JSON string of one; each may be a string too."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else []
    return tuple(
        tool_from_schema(json.loads(item) if isinstance(item, str) else item) for item in value or ()
    )
