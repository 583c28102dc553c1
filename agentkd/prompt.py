"""Prompts, and the one way in which a conversation becomes chat messages.

Collection, training, evaluation and serving all call :func:`chat_messages`, so a student never
sees a conversation in another form than it was trained on.

The teacher is asked with a longer prompt that carries examples; the student gets a short one,
because a small model pays for the prompt at every step and has learnt the format by training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from agentkd.trajectory import Step, Trajectory

__all__ = [
    "COT_STUDENT",
    "COT_TEACHER",
    "DIRECT",
    "FENCE_CLOSE",
    "FENCE_OPEN",
    "FIRST_THOUGHT",
    "STUDENT",
    "TEACHER",
    "TOOLS_ALLOWED",
    "TOOLS_REQUIRED",
    "TOOL_PROMPTS",
    "action_text",
    "answer_from_cot",
    "chat_messages",
    "first_thought_request",
    "first_thought_text",
    "joined",
    "learnt_prompt",
    "observation_text",
    "question_text",
    "system_prompt",
    "trajectory_messages",
]

FENCE_OPEN = "```python"
FENCE_CLOSE = "```"
OBSERVATION_LIMIT = 2000
"""Characters of an observation that the model is shown; the rest is cut with a visible mark."""

STUDENT = """\
Solve the task step by step. At each step write "Thought:" and then one ```python block. \
What the code prints comes back as the observation. Call final_answer(value) when you know the answer.
Tools: {tools}"""

TOOLS_ALLOWED = STUDENT
"""P_i of tool-usage adaptation: tools are there, and a direct answer is allowed. It is the prompt that
every student has anyway, so an adapted student is asked as any other."""

DIRECT = """\
Answer from what you know, without tools. Write "Thought:" and then one ```python block \
with nothing but final_answer(value)."""
"""P_n: no tools, answer directly."""

TOOLS_REQUIRED = """\
Solve the task step by step, and use tools or code: never answer from memory. At each step write \
"Thought:" and then one ```python block. What the code prints comes back as the observation. \
Call final_answer(value) when you have worked out the answer.
Tools: {tools}"""
"""P_f: tools must be used."""

TOOL_PROMPTS = {"direct": DIRECT, "allowed": TOOLS_ALLOWED, "required": TOOLS_REQUIRED}
"""P_n, P_i and P_f of tool-usage adaptation (arXiv 2411.00412) by name."""

TEACHER = """\
You are an expert who solves tasks with Python code and tools, one step at a time.

At each step write one thought that restates what you are looking for and says what you do next, \
then exactly one code block, and stop. The code runs, variables stay between steps, and what it \
prints comes back as the observation. When you know the answer call final_answer(value) in code.

You may call these functions from your code:
{tools}

You may import: {imports}.

Here is an example of the form:

Task: How many days lie between the founding dates of the two towns?
Thought: I need the founding date of both towns, so I look up the first one.
```python
print(search("founding date of the first town"))
```
Observation:
[The first town] It was founded on 3 March 1802.

Never write an observation yourself. Answer with the bare value: a number, a name or a date."""

COT_STUDENT = """\
Answer the question. Think step by step, then write the last line as "Answer: <answer>"."""

COT_TEACHER = """\
Answer the question. Think step by step in plain text, without code, and then give the bare \
answer (a number, a name or a date) on a last line of its own, as "Answer: <answer>"."""

FIRST_THOUGHT = """\
Answer the question. Think step by step in plain text, without code, in short paragraphs with a \
blank line between them; the first one says what is asked for and how to go about it. Then give \
the bare answer (a number, a name or a date) on a last line of its own, as "Answer: <answer>"."""

_COT_ANSWER = re.compile(r"^\s*\**(?:final )?answer\**\s*[:=]\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)


def system_prompt(template: str, tools: Iterable[Any] = (), imports: Sequence[str] = ()) -> str:
    """Fill ``{tools}`` and ``{imports}`` in a template.

    Args:
        template: one of the constants above, or a text of your own.
        tools: smolagents tools (``name``, ``inputs``, ``output_type``, ``description``).
        imports: module names that the code may import.
    """
    short = template in TOOL_PROMPTS.values()
    described = [_describe(tool, short) for tool in tools if tool.name != "final_answer"]
    listing = ", ".join(described) if short else "\n".join(f"- {line}" for line in described)
    return template.replace("{tools}", listing or "none").replace(
        "{imports}", ", ".join(imports) or "nothing"
    )


def _describe(tool: Any, short: bool) -> str:
    arguments = ", ".join(tool.inputs)
    if short:
        return f"{tool.name}({arguments})"
    typed = ", ".join(f"{name}: {spec['type']}" for name, spec in tool.inputs.items())
    return f"{tool.name}({typed}) -> {tool.output_type}: {tool.description}"


def action_text(thought: str, code: str) -> str:
    """The canonical text of one step: thought, then one fenced block, nothing after it."""
    return f"Thought: {thought.strip()}\n{FENCE_OPEN}\n{code.strip()}\n{FENCE_CLOSE}"


def observation_text(printed: str, value: Any = None, error: str | None = None) -> str:
    """What the model is shown after its action.

    Args:
        printed: what the code printed.
        value: value of its last expression, shown when not None.
        error: message of the exception it raised, or of the parser.
    """
    parts = []
    if printed.strip():
        parts.append(_cut(printed.rstrip()))
    if value is not None:
        parts.append(f"Out: {_cut(str(value))}")
    if error is not None:
        parts.append(f"Error: {_cut(error)}")
    return "Observation:\n" + ("\n".join(parts) if parts else "(nothing was printed)")


def _cut(text: str) -> str:
    if len(text) <= OBSERVATION_LIMIT:
        return text
    half = OBSERVATION_LIMIT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters cut ...]\n{text[-half:]}"


def chat_messages(
    system: str, question: str, turns: Sequence[tuple[str, str | None]] = ()
) -> list[dict[str, str]]:
    """A conversation as chat messages: system, user, then assistant and user in turn.

    Args:
        system: the system prompt.
        question: the task, verbatim.
        turns: ``(assistant text, observation)`` of each step so far; the observation of the
            last one may be None.
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    for output, observation in turns:
        messages.append({"role": "assistant", "content": output})
        if observation is not None:
            messages.append({"role": "user", "content": observation})
    return messages


def trajectory_messages(
    trajectory: Trajectory, system: str | None = None, steps: Sequence[Step] | None = None
) -> list[dict[str, str]]:
    """The whole conversation of a trajectory.

    Args:
        trajectory: the record.
        system: another system prompt than the recorded one (the student's, for training).
        steps: these steps instead of all.
    """
    chosen = trajectory.steps if steps is None else steps
    turns = [(step.output, step.observation) for step in chosen]
    context = trajectory.context.text if trajectory.context else None
    question = question_text(trajectory.task.question, context)
    return chat_messages(system or trajectory.system_prompt, question, turns)


def question_text(question: str, passages: str | None = None) -> str:
    """The user's turn: the question, behind the passages that were retrieved for it, where there are any."""
    return question if passages is None else f"Passages:\n{passages}\n\nQuestion: {question}"


def learnt_prompt(trajectory: Trajectory, student: str) -> str:
    """The system prompt under which a trajectory is learnt.

    It is the student's own, but for those that teach how to act under another one: their label
    ``prompt`` is "direct" or "required", and the text is the recorded one.

    Args:
        trajectory: the record.
        student: the prompt that the student is served with.
    """
    return trajectory.system_prompt if trajectory.labels.get("prompt") in ("direct", "required") else student


def answer_from_cot(text: str) -> str | None:
    """The answer on the last "Answer:" line of a chain of thought, or None."""
    found = _COT_ANSWER.findall(text)
    return found[-1].strip().strip("*").rstrip(".") if found else None


def first_thought_text(prefix: str) -> str:
    """How a step begins whose thought begins with ``prefix``."""
    return f"Thought: {prefix}"


def first_thought_request(question: str, begun: str) -> str:
    """The question, with the wish that the first step goes on from ``begun``."""
    return (
        f"{question}\n\nYour first step begins with the text below. Go on from where it ends and "
        f"do not repeat it.\n\n{begun}"
    )


def joined(begun: str, emitted: str) -> str:
    """A step from its given beginning and what a model wrote that was only asked to go on from it.

    A model may repeat the beginning, with or without its "Thought:", or begin its thought anew.
    """
    text = emitted.strip()
    for repeated in (begun, begun.removeprefix("Thought: ")):
        if text.startswith(repeated):
            text = text[len(repeated) :]
            break
    text = re.sub(r"^\s*Thought:\s*", "", text)
    if text.lstrip().startswith("```"):
        return f"{begun}\n{text.lstrip()}"
    apart = "" if not text or text[0].isspace() or text[0] in ",.;:!?)" else " "
    return begun + apart + text
