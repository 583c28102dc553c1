"""What a foreign row says, before it is a trajectory, and how it becomes one.

Every format decodes to a :class:`Draft`: the question, and a :class:`Turn` for each step in the
form in which a student sees it. :meth:`Draft.build` fills in what the row leaves open and scores
the answer, so that an imported trajectory is like a collected one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agentkd.action import Parsed, parse_action
from agentkd.agent import NO_CODE
from agentkd.exchange.infer import tools_called
from agentkd.prompt import action_text, answer_from_cot
from agentkd.scorer import score
from agentkd.task import Task
from agentkd.trajectory import Failure, Step, StopReason, Trajectory, Usage

__all__ = ["Draft", "Format", "Row", "Turn", "acted", "said"]

Row = dict[str, Any]
"""One record of a foreign format, as JSON has it."""

Container = Literal[".jsonl", ".json", ".parquet", ".txt", "files", "dataset"]
"""Where rows lie: a file by its suffix, a folder of JSON files, or a folder of ``datasets``."""

_FENCE = re.compile(r"```|~~~|<code>|<python>", re.IGNORECASE)
_FINAL = re.compile(r"\bfinal_answer\s*\(")
_ERROR = re.compile(r"(?:\A|\n)Error: (.+)\Z", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """One step of the model, in the form in which a student is shown it."""

    output: str
    thought: str = ""
    code: str | None = None
    observation: str | None = None
    """"Observation:" and what the code printed; None when nothing was shown."""
    failure: Failure | None = None
    raw: str | None = None
    """The text of the source, where it is another than ``output``."""
    repairs: tuple[str, ...] = ()
    is_final: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    """Further fields of the step that the source knows: usage, token ids, who acted."""


def said(text: str, observation: str | None = None) -> Turn:
    """A turn from a text that is in the student's form already: a thought and a code block."""
    parsed = parse_action(text) if _FENCE.search(text) else _plain(text.strip())
    return Turn(parsed.output, parsed.thought, parsed.code, observation, raw=text, repairs=parsed.repairs)


def _plain(text: str) -> Parsed:
    """A text without a fence: "Answer: sqrt(2)" would pass for Python, but is none."""
    return Parsed(text.removeprefix("Thought:").strip(), None, text, ())


def acted(thought: str, code: str, observation: str | None = None, raw: str | None = None) -> Turn:
    """A turn from its parts; a ``raw`` text in another form is kept, and the step says "recast"."""
    output = action_text(thought, code)
    recast = raw is not None and raw.strip() != output
    return Turn(
        output,
        thought.strip(),
        code.strip("\n"),
        observation,
        raw=raw,
        repairs=("recast",) if recast else (),
    )


@dataclass(frozen=True)
class Draft:
    """A trajectory to be."""

    question: str
    turns: tuple[Turn, ...]
    id: str | None = None
    """Of the trajectory; by default the task's with the number of the run of it."""
    task_id: str | None = None
    gold: str | None = None
    answer: str | None = None
    """What the model answered, where the row says so apart from its last step."""
    system_prompt: str = ""
    model: str = "unknown"
    tools: tuple[str, ...] | None = None
    """Schemas as trajectories keep them; None where the row does not say."""
    family: str = "custom"
    started_at: str = ""
    labels: dict[str, str] = field(default_factory=dict)

    def build(self, task_id: str, sample: int, scorer: str = "exact") -> Trajectory:
        """The trajectory.

        Args:
            task_id: used where the row has none.
            sample: which run of its task this is.
            scorer: name of the scorer that compares the answer with the gold answer.
        """
        task = Task(
            id=self.task_id or task_id,
            question=self.question,
            answer=self.gold,
            scorer=scorer,
            family=self.family,
            split="train",
        )
        kind: Literal["agent", "cot"] = "cot" if self._is_cot() else "agent"
        turns = [_judged(turn) for turn in self.turns]
        if turns:
            turns[-1] = _ended(turns[-1], kind)
        steps = tuple(_step(number, turn, self.model) for number, turn in enumerate(turns, 1))
        ended = bool(turns) and turns[-1].is_final
        answer = self.answer if self.answer is not None or not ended else _answer_of(turns[-1], kind)
        reason = StopReason.MAX_STEPS if kind == "agent" else StopReason.NO_ANSWER
        return Trajectory(
            id=self.id or f"{task.id}#{sample}",
            task=task,
            kind=kind,
            sample=sample,
            model=self.model,
            system_prompt=self.system_prompt,
            tools=self.tools if self.tools is not None else _tools(turns),
            steps=steps,
            answer=answer,
            stop_reason=StopReason.FINAL_ANSWER if ended else reason,
            score=score(task, answer),
            usage=sum((step.usage for step in steps), Usage()),
            started_at=self.started_at,
            labels=self.labels,
        )

    def _is_cot(self) -> bool:
        """One turn of plain text and no tools: a chain of thought."""
        return len(self.turns) == 1 and self.turns[0].code is None and not self.tools


def _tools(turns: Sequence[Turn]) -> tuple[str, ...]:
    return tools_called(turn.code for turn in turns if turn.code is not None and turn.failure is None)


def _judged(turn: Turn) -> Turn:
    """Mark the model's mistakes, so that they are context and not learnt."""
    if turn.failure is not None or turn.observation is None:
        return turn
    if turn.code is None:
        return replace(turn, failure=Failure(kind="parse", message=NO_CODE))
    found = _ERROR.search(turn.observation)
    return replace(turn, failure=Failure(kind="execution", message=found.group(1))) if found else turn


def _ended(turn: Turn, kind: str) -> Turn:
    if kind == "cot":
        return replace(turn, thought=turn.output, is_final=answer_from_cot(turn.output) is not None)
    if turn.code is None:
        return replace(turn, failure=turn.failure or Failure(kind="parse", message=NO_CODE))
    if turn.is_final or (turn.failure is None and _FINAL.search(turn.code)):
        return replace(turn, is_final=True, failure=None, observation=None)
    return turn


def _answer_of(turn: Turn, kind: str) -> str | None:
    """The argument of ``final_answer`` where it is a constant."""
    if kind == "cot" or turn.code is None:
        return answer_from_cot(turn.output)
    try:
        calls = [node for node in ast.walk(ast.parse(turn.code)) if isinstance(node, ast.Call)]
        final = next(c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "final_answer")
        given = [*final.args, *(word.value for word in final.keywords)]
        return str(ast.literal_eval(given[0]))
    except (SyntaxError, ValueError, StopIteration, IndexError, RecursionError, MemoryError):
        return None


def _step(number: int, turn: Turn, model: str) -> Step:
    return Step(
        number=number,
        actor=turn.facts.get("actor", model),
        raw=turn.output if turn.raw is None else turn.raw,
        output=turn.output,
        repairs=turn.repairs,
        thought=turn.thought,
        code=turn.code,
        observation=turn.observation,
        failure=turn.failure,
        is_final=turn.is_final,
        **{key: value for key, value in turn.facts.items() if key != "actor"},
    )


@dataclass(frozen=True)
class Format:
    """One way in which others keep trajectories."""

    name: str
    about: str
    encode: Callable[[Trajectory], Row]
    decode: Callable[[Row], Draft]
    """Raises KeyError, TypeError or ValueError for a row that is not of this format."""
    keys: frozenset[str]
    """Keys of a row that ``decode`` knows; others are kept in the label "imported"."""
    containers: Sequence[Container] = (".jsonl",)
    """Where an export can go."""
    extra: tuple[str, ...] = ("agentkd",)
    """Where in a row stands what the format has no field for; a JSON string when it is one key,
    so that Arrow needs no schema for it."""
    split: Callable[[str], list[str]] | None = None
    """Cuts a text file into transcripts."""
    wrap: Callable[[list[Row]], Row] | None = None
    """The one document that a ``.json`` file of this format is, around its rows."""
    unwrap: Callable[[Row], list[Row]] | None = None
    """The rows of such a document; raises KeyError, TypeError or ValueError for another."""
