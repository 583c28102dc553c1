"""A trajectory: the versioned record of one rollout, step by step.

A failed rollout is a trajectory with a :class:`StopReason`, never a lost row or a crash. One
trajectory is one JSON line; its JSON Schema is published in ``docs/trajectory.schema.json``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentkd.task import Task

__all__ = [
    "SCHEMA_VERSION",
    "Candidate",
    "Change",
    "Context",
    "Failure",
    "FirstThought",
    "Mode",
    "Route",
    "RouterKind",
    "Score",
    "Step",
    "StopReason",
    "ToolUse",
    "Trajectory",
    "Usage",
    "valid_text",
]

SCHEMA_VERSION = 1
"""Version of the trajectory record; older versions stay readable."""


def valid_text(text: str) -> str:
    """The text as UTF-8 can hold it: half of a surrogate pair, which JSON lets through, becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


class StopReason(StrEnum):
    """Why a rollout ended."""

    FINAL_ANSWER = "final_answer"
    """The agent gave an answer (right or wrong)."""
    MAX_STEPS = "max_steps"
    """The step limit was reached without an answer."""
    OUTPUT_LIMIT = "output_limit"
    """A chain of thought was cut off by its token limit before it answered."""
    NO_ANSWER = "no_answer"
    """A chain of thought ended without an answer line."""
    CONTEXT_OVERFLOW = "context_overflow"
    """The conversation no longer fitted the model's context."""
    TIMEOUT = "timeout"
    """The time limit of the whole rollout was reached."""
    CANCELLED = "cancelled"
    """The user or the caller stopped it."""
    PROVIDER_ERROR = "provider_error"
    """The model endpoint failed; the rollout is retried on resume."""
    SANDBOX_ERROR = "sandbox_error"
    """The sandbox itself failed (not the code in it); retried on resume."""
    RETRIEVAL_ERROR = "retrieval_error"
    """A tool's index or retriever failed; retried on resume."""
    INTERNAL_ERROR = "internal_error"
    """A defect of agentkd or of a plug-in; retried on resume."""

    @property
    def is_error(self) -> bool:
        """True for the ends that say nothing about the model, and are therefore retried."""
        return self in _ERRORS


_ERRORS = frozenset(
    {
        StopReason.CANCELLED,
        StopReason.PROVIDER_ERROR,
        StopReason.SANDBOX_ERROR,
        StopReason.RETRIEVAL_ERROR,
        StopReason.INTERNAL_ERROR,
    }
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(_Record):
    """Token counts as the server reported them."""

    input_tokens: int = 0
    """Prompt tokens."""
    output_tokens: int = 0
    """Sampled tokens."""
    cached_tokens: int = 0
    """Prompt tokens that the server had in its cache; they are among ``input_tokens``."""
    uncounted_calls: int = 0
    """Calls whose server gave no counts; their tokens are unknown, not zero."""
    estimated_tokens: int = 0
    """Tokens of the uncounted calls, guessed from their characters."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            uncounted_calls=self.uncounted_calls + other.uncounted_calls,
            estimated_tokens=self.estimated_tokens + other.estimated_tokens,
        )


class Failure(_Record):
    """Something that went wrong, and on whose side."""

    kind: Literal["parse", "execution", "timeout", "provider", "sandbox", "retrieval", "internal"]
    """"parse", "execution" and "timeout" are the model's mistakes, the others are not."""
    message: str


class Score(_Record):
    """What a scorer said about one answer. An error is an error, never a correct answer."""

    value: float | None
    """0 to 1; None when the answer could not be scored."""
    scorer: str
    reason: str = ""
    """Why it could not be scored, or what was compared."""

    @property
    def correct(self) -> bool:
        """True for a full score."""
        return self.value is not None and self.value >= 1.0


class ToolUse(_Record):
    """One call of a tool made by the code of a step."""

    name: str
    arguments: dict[str, Any]
    result: str | None = None
    """What the code got back, as text; None when the call failed."""
    error: str | None = None
    seconds: float = 0.0
    """Wall-clock seconds."""


class Candidate(_Record):
    """One sampled action of a step, whether it was chosen or not."""

    raw: str
    code: str | None = None
    repairs: tuple[str, ...] = ()
    """What was mended to find ``code`` in ``raw``, by name."""
    outcome: str | None = None
    """Normalised outcome that was voted on; None when it failed."""
    failure: Failure | None = None
    votes: int = 0
    chosen: bool = False
    usage: Usage = Usage()
    mean_logprob: float | None = None
    output_token_ids: tuple[int, ...] | None = None


class FirstThought(_Record):
    """The beginning of a step that the model was given (first-thought prefix, arXiv 2505.17612)."""

    prefix: str
    """The beginning of ``Step.output``, verbatim, with its "Thought:"; the rest is the model's own."""
    via: Literal["prefill", "instruction"]
    """"prefill": the server continued exactly these tokens. "instruction": the model was asked to go
    on from these words, and what it wrote was joined to them."""


Mode = Literal["direct", "allowed", "required"]
"""Under which prompt an agent acts: P_n, P_i or P_f of tool-usage adaptation (arXiv 2411.00412)."""
RouterKind = Literal["implicit", "threshold", "agreement", "forced", "never"]


class Route(_Record):
    """Whether a question was answered directly or with tools, and why."""

    router: RouterKind
    mode: Mode
    """The prompt of the rollout."""
    direct: bool | None = None
    """The decision; None where the first action could not be parsed."""
    p_tool: float | None = None
    """Probability that the first action uses a tool, as far as the drafts tell."""
    agreement: float | None = None
    """Share of the direct answers that agreed."""
    logprobs: bool = False
    """Whether the server sent log-probabilities, so that they took part in ``p_tool``."""
    drafts: tuple[Candidate, ...] = ()
    """What was drawn to decide; the chosen one is the step's action."""


class Step(_Record):
    """Thought, action, observation: one turn of the model and what came of it."""

    number: int
    """1 for the first step."""
    actor: str
    """Who acted: the model's id."""
    raw: str
    """The text as the model emitted it; without what it was given, see ``first_thought``."""
    output: str
    """The text that stands in the conversation (``raw`` after ``repairs``, behind what was given)."""
    repairs: tuple[str, ...] = ()
    """What was mended between ``raw`` and ``output``, by name."""
    first_thought: FirstThought | None = None
    """What ``output`` begins with that was given to the model; only ever at the first step."""
    route: Route | None = None
    """How the rollout was routed; only ever at the first step. What that has cost is in ``usage``."""
    thought: str = ""
    code: str | None = None
    observation: str | None = None
    """What the model saw next, verbatim; None after the last step."""
    failure: Failure | None = None
    is_final: bool = False
    tool_uses: tuple[ToolUse, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    usage: Usage = Usage()
    finish_reason: str | None = None
    """As the server said: "stop", "length"."""
    prompt_token_ids: tuple[int, ...] | None = None
    """Where the server returns them."""
    output_token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Log-probability (nats) of each output token."""
    model_seconds: float = 0.0
    """Wall-clock seconds spent waiting for the model."""
    code_seconds: float = 0.0
    """Wall-clock seconds spent running the code."""

    @property
    def continuation(self) -> str:
        """What of ``output`` is the model's own: all of it but a given beginning."""
        return self.output[len(self.first_thought.prefix) :] if self.first_thought else self.output


class Context(_Record):
    """Passages that stood before the question of a chain of thought."""

    text: str
    """As they were shown."""
    k: int
    """Passages that were asked for."""
    max_tokens: int | None = None
    """Budget of the text in (estimated) tokens; None for no limit."""


class Change(_Record):
    """What a transform made of a trajectory; see :mod:`agentkd.transform`."""

    by: str
    """Name of the transform."""
    source: str
    """Id of the trajectory that it was made from."""
    note: str = ""
    """What was changed, in words."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the transform."""


class Trajectory(_Record):
    """The record of one rollout."""

    schema_version: Literal[1] = 1
    id: str
    """``{task id}#{sample}``: unique within a run."""
    task: Task
    kind: Literal["agent", "cot"] = "agent"
    """"agent" acts in code; "cot" answers once by chain of thought, without tools."""
    sample: int = 0
    model: str
    system_prompt: str
    tools: tuple[str, ...] = ()
    """Each tool's schema as a JSON string (a string, so that Arrow adds no null fields)."""
    context: Context | None = None
    """What was retrieved for the question and stood before it; only with kind "cot"."""
    steps: tuple[Step, ...] = ()
    answer: str | None = None
    stop_reason: StopReason
    failure: Failure | None = None
    """Why it stopped, when that was an error."""
    score: Score | None = None
    usage: Usage = Usage()
    seconds: float = 0.0
    """Wall-clock seconds of the whole rollout."""
    started_at: str = ""
    """UTC, ISO 8601."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved settings that made it."""
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None
    """Git commit of agentkd, where it is run from a checkout."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Free labels, such as ``{"teacher": "offline expert (programmatic)"}``."""
    changes: tuple[Change, ...] = ()
    """The transforms it went through, first to last; a rollout as it happened has none."""

    @property
    def correct(self) -> bool:
        """True when the answer was scored and is right."""
        return self.score is not None and self.score.correct
