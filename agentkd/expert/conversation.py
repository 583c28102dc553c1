"""What the expert makes of the chat messages it gets: who asks what, and what was done so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentkd.errors import DataError

__all__ = ["Conversation", "Turn", "read_messages"]

_AGENT_MARKS = ("Thought:", "```python", "final_answer")
_PARAGRAPH_MARK = "blank line"
_TASK_MARKS = ("New task:", "Task:")


@dataclass(frozen=True)
class Turn:
    """One assistant message and the observation that followed it."""

    output: str
    observation: str

    @property
    def failed(self) -> bool:
        """True when the observation reports an error."""
        return any(line.startswith("Error:") for line in self.observation.split("\n"))

    @property
    def printed(self) -> str:
        """What the code printed or returned."""
        text = self.observation.removeprefix("Observation:").strip()
        return "" if text == "(nothing was printed)" else text.removeprefix("Out: ")


@dataclass(frozen=True)
class Conversation:
    """The messages, understood."""

    is_agent: bool
    """True: act in code, one step. False: answer by chain of thought."""
    question: str
    turns: tuple[Turn, ...] = ()
    prefix: str = ""
    """Text that the answer must go on from."""
    in_paragraphs: bool = False
    """Whether a chain of thought shall have paragraphs, with a blank line between them."""

    @property
    def last(self) -> Turn | None:
        """The step before this one."""
        return self.turns[-1] if self.turns else None


def read_messages(
    messages: Sequence[Mapping[str, Any]], continue_final_message: bool = False
) -> Conversation:
    """Understand chat messages.

    A system prompt that speaks of thoughts and code asks for an agent's step, any other (or none)
    for a chain of thought.

    Args:
        messages: the conversation.
        continue_final_message: an assistant message at the end is the beginning of the answer.

    Raises:
        DataError: there is no user message.
    """
    texts = [(str(message.get("role", "")), _text(message.get("content"))) for message in messages]
    system = "\n".join(text for role, text in texts if role in ("system", "developer"))
    chat = [(role, text) for role, text in texts if role not in ("system", "developer")]
    first = next((index for index, (role, _) in enumerate(chat) if role != "assistant"), None)
    if first is None:
        raise DataError(
            "The conversation has no user message.", "Send at least one message of the role user."
        )
    turns: list[Turn] = []
    prefix = ""
    for role, text in chat[first + 1 :]:
        if role == "assistant":
            turns.append(Turn(text, ""))
        elif turns:
            seen = f"{turns[-1].observation}\n{text}".strip()
            turns[-1] = Turn(turns[-1].output, seen)
    if continue_final_message and chat[-1][0] == "assistant" and turns:
        prefix = turns.pop().output
    return Conversation(
        is_agent=any(mark in system for mark in _AGENT_MARKS),
        question=_question(chat[first][1]),
        turns=tuple(turns),
        prefix=prefix,
        in_paragraphs=_PARAGRAPH_MARK in system,
    )


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""


def _question(text: str) -> str:
    text = text.strip()
    for mark in _TASK_MARKS:
        text = text.removeprefix(mark).strip()
    return text
