"""First-thought prefix: the teacher's agent begins with the first thought of its chain of thought.

A large model reasons better when it answers in plain words than when it acts in code. So it first
answers every question by chain of thought; what stands before the first blank line of that answer
becomes the beginning of the agent's first step, and the teacher goes on from there (arXiv
2505.17612, section 3). The student learns the whole step as its own, and is given nothing.

::

    OUT/first-thought/
      trajectories.jsonl   the chains of thought, append-only; errors.jsonl beside it
      prefixes.jsonl       one line a task: its prefix, or why there is none
      endpoint.json        how the prefixes reach the model, and how that was found out
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentkd import prompt as prompts
from agentkd.agent_config import AgentConfig
from agentkd.errors import ConfigError, DataError, boundary
from agentkd.model import openai_model, provider_error
from agentkd.record import iter_jsonl, read_json, read_trajectories, write_json, write_jsonl
from agentkd.task import Task
from agentkd.trajectory import FirstThought, Trajectory, valid_text

if TYPE_CHECKING:
    from agentkd.agent import StepAgent

__all__ = [
    "Continuation",
    "FirstThoughtConfig",
    "FirstThoughts",
    "Prefix",
    "collect_first_thoughts",
    "cot_agent",
    "first_thought_log",
    "load_first_thoughts",
    "prefix_of",
    "probe_continuation",
]

FOLDER = "first-thought"
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_PROBE = (
    {"role": "user", "content": "Count from one to nine."},
    {"role": "assistant", "content": "one two three four"},
)

Make = Callable[[Task, int], "StepAgent"]
Run = Callable[[Sequence[Task], AgentConfig, Path], str | None]
"""Runs the rollouts that a file does not have yet: (tasks, settings of the agents, file). Gives the
limit that ended them early, in words."""


class FirstThoughtConfig(BaseModel):
    """Settings of the chain-of-thought pass and of what is taken from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = prompts.FIRST_THOUGHT
    """System prompt of the chain of thought."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=1024, ge=1)
    """Sampled tokens of a chain of thought."""
    max_characters: int = Field(default=1200, ge=1)
    """A longer prefix is dropped."""


class Prefix(BaseModel):
    """One line of ``prefixes.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """Id of the task."""
    prefix: str | None
    """How the first thought begins, without "Thought:"; None when it was dropped."""
    dropped: str = ""
    """Why there is none: the kind of reason, a colon, and details."""


class Continuation(BaseModel):
    """Whether an endpoint goes on with a final assistant message; ``endpoint.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    via: Literal["prefill", "instruction"]
    """"prefill": it does. "instruction": it does not, so the prefix is put into the question."""
    reason: str
    prompt_tokens: dict[str, int | None] = Field(default_factory=dict)
    """What the endpoint counted for each request of the probe."""


class FirstThoughts(NamedTuple):
    """The prefixes of a run, and how they reach the model."""

    lines: Mapping[str, Prefix]
    """By task id; a task whose chain of thought has not been had yet is not in it."""
    via: Literal["prefill", "instruction"]
    stopped: str | None = None
    """The limit that ended the pass before all chains of thought were had, in words."""

    @property
    def used(self) -> int:
        """Tasks that have a prefix."""
        return sum(line.prefix is not None for line in self.lines.values())

    @property
    def dropped(self) -> Counter[str]:
        """Tasks that have none, by the kind of reason."""
        return Counter(line.dropped.split(":")[0] for line in self.lines.values() if line.prefix is None)

    def counts(self) -> dict[str, Any]:
        """Tasks with a prefix, tasks without by reason, and how prefixes are given."""
        return {"used": self.used, "dropped": dict(self.dropped), "via": self.via}

    def summary(self) -> str:
        """The same in one line."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        dropped = f"; dropped: {reasons}" if reasons else ""
        return f"First thoughts given for {self.used} of {len(self.lines)} tasks, by {self.via}{dropped}"

    def give(self, make_agent: Make) -> Make:
        """Agents as ``make_agent`` makes them, each with the prefix of its task."""

        def make(task: Task, sample: int) -> StepAgent:
            agent, line = make_agent(task, sample), self.lines.get(task.id)
            if line is not None and line.prefix is not None:
                agent.first_thought = FirstThought(
                    prefix=prompts.first_thought_text(line.prefix), via=self.via
                )
            return agent

        return make


def cot_agent(agent: AgentConfig, config: FirstThoughtConfig) -> AgentConfig:
    """The settings of the chain-of-thought pass of an agent."""
    return agent.model_copy(
        update={
            "kind": "cot",
            "prompt": config.prompt,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
    )


def collect_first_thoughts(
    tasks: Sequence[Task], agents: Sequence[AgentConfig], config: FirstThoughtConfig, out: Path, run: Run
) -> FirstThoughts:
    """Have the chain of thought of every task, take the prefixes, and find out how to give them.

    Goes on where it stopped. The endpoint is probed at every start that has something left to do,
    because the same model may be served by another program by then.

    Args:
        tasks: of the run.
        agents: those that will be given the prefixes, one for each endpoint; the first one's model
            thinks. Where one endpoint cannot continue a message, all are asked by instruction.
        config: settings.
        out: the run's folder.
        run: runs the rollouts of the pass, see ``Run``.

    Raises:
        ConfigError: the endpoints take prefixes in another way than when the run began.
        DataError: no chain of thought gives a prefix, although all of them were had.
        ProviderError: an endpoint is dead or keeps failing; what is finished is kept.
    """
    folder = out / FOLDER
    ways = [probe_continuation(agent) for agent in agents]
    how = _same_way(folder / "endpoint.json", min(ways, key=lambda way: way.via))  # "instruction" comes first
    log = first_thought_log(out)
    stopped = run(tasks, cot_agent(agents[0], config), log)
    thoughts = {item.task.id: item for item in read_trajectories(log)}
    lines = [prefix_of(thoughts[task.id], config) for task in tasks if task.id in thoughts]
    write_jsonl(folder / "prefixes.jsonl", lines)
    found = FirstThoughts({line.task: line for line in lines}, how.via, stopped)
    if not found.used and stopped is None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.dropped.most_common())
        raise DataError(
            f"None of {len(lines)} chains of thought gives a first thought ({reasons}).",
            f"See {folder / 'prefixes.jsonl'}; collect without --first-thought, or with another prompt.",
        )
    return found


def first_thought_log(out: Path) -> Path:
    """Where a run's chains of thought are recorded."""
    return out / FOLDER / "trajectories.jsonl"


def load_first_thoughts(out: Path) -> FirstThoughts | None:
    """What a run folder has of first thoughts; None when it was begun without."""
    path = out / FOLDER / "prefixes.jsonl"
    if not path.is_file():
        return None
    how = _read_way(path.with_name("endpoint.json"))
    return FirstThoughts({line.task: line for line in iter_jsonl(path, Prefix)}, how.via)


def _read_way(path: Path) -> Continuation:
    content = read_json(path)
    with boundary(DataError, f"reading {path}", "Delete it to probe the endpoint again."):
        return Continuation.model_validate(content)


def _same_way(path: Path, how: Continuation) -> Continuation:
    if path.is_file():
        before = _read_way(path)
        if before.via != how.via:
            raise ConfigError(
                f"The run began with first thoughts given by {before.via}; with this endpoint it would go on "
                f"by {how.via}: {how.reason}.",
                "Serve the model as before, or choose another --out.",
            )
    write_json(path, how.model_dump(mode="json"))
    return how


def prefix_of(thought: Trajectory, config: FirstThoughtConfig) -> Prefix:
    """The first thought of a chain of thought: what stands before its first blank line.

    White space around it is left out, so that it ends behind a word or a sign and not inside the
    token that joins a space to the next word.
    """
    text = thought.steps[-1].raw.strip() if thought.steps else ""
    blank = _BLANK_LINE.search(text)
    begun = text[: blank.start()] if blank else text
    begun = re.sub(r"^Thought:", "", begun).strip()
    dropped = ""
    if not begun:
        dropped = f"empty: the chain of thought ended as {thought.stop_reason.value}"
    elif blank is None:
        dropped = f"no blank line: {len(text)} characters in one paragraph"
    elif len(begun) > config.max_characters:
        dropped = f"overlong: {len(begun)} characters, {config.max_characters} allowed"
    elif prompts.FENCE_CLOSE in begun or "Observation:" in begun:
        dropped = "code: a code block or an observation in it would be taken for the action"
    elif prompts.answer_from_cot(begun) is not None:
        dropped = "answered: the first paragraph gives the answer"
    return Prefix(task=thought.task.id, prefix=None if dropped else valid_text(begun), dropped=dropped)


def probe_continuation(agent: AgentConfig) -> Continuation:
    """Find out whether an endpoint honours ``continue_final_message``; many ignore it silently.

    Four requests of one token each are compared by the prompt tokens that the server counts:
    ``question`` alone; question and the beginning of an answer to be ``continued``, twice; the same
    with the beginning ``closed``, which differs from it in the one field only. A server that ignores
    the field renders the two alike and counts the same; one that honours it leaves out what closes
    the turn and counts less, yet more than for the question alone (else it has left out the
    beginning). The repeat shows that a count does not depend on what is cached. So
    ``question < continued < closed`` cannot come about by ignoring. The other way round, a server
    that does continue may be missed (it does not count, or its template closes a turn with
    nothing); it is then asked by instruction, which is less exact but never wrong.

    Raises:
        ProviderError: the endpoint is dead or keeps failing.
    """
    requests = {
        "continued": (_PROBE, True),
        "closed": (_PROBE, False),
        "continued again": (_PROBE, True),
        "question": (_PROBE[:1], None),
    }
    counts: dict[str, int | None] = {}
    via: Literal["prefill", "instruction"] = "instruction"
    for name, (messages, continued) in requests.items():
        try:
            counts[name] = _count(agent, messages, continued)
        except _RefusedError as exc:
            return Continuation(
                model=agent.model,
                via=via,
                reason=f"the endpoint refuses the request ({name}: {exc})",
                prompt_tokens=counts,
            )
    question, first, closed = counts["question"], counts["continued"], counts["closed"]
    if question is None or first is None or closed is None:
        reason = "the endpoint does not count prompt tokens"
    elif first != counts["continued again"]:
        reason = "the endpoint counts different prompt tokens for the same request"
    elif question < first < closed:
        via, reason = "prefill", "the endpoint leaves the end of a continued turn out of the prompt"
    else:
        reason = "the endpoint ignores continue_final_message"
    return Continuation(model=agent.model, via=via, reason=reason, prompt_tokens=counts)


class _RefusedError(Exception):
    """The endpoint answered that it cannot serve such a request."""


def _count(agent: AgentConfig, messages: Sequence[Mapping[str, str]], continued: bool | None) -> int | None:
    """Prompt tokens of a request, as the endpoint counts them; None when it does not.

    Args:
        agent: whose endpoint.
        messages: what is asked.
        continued: whether to continue or close the final message; None says nothing about it.
    """
    import openai

    assert agent.api_base is not None
    model = openai_model(agent.model, agent.api_base, agent.api_key, timeout=min(60.0, agent.timeout))
    fields = (
        {} if continued is None else {"add_generation_prompt": False, "continue_final_message": continued}
    )
    try:
        answer = model.client.chat.completions.create(
            model=agent.model,
            messages=[dict(message) for message in messages],
            max_tokens=1,
            extra_body=fields,
        )
    except (openai.BadRequestError, openai.UnprocessableEntityError) as exc:
        raise _RefusedError(" ".join(str(exc).split())[:200]) from exc
    except Exception as exc:
        raise provider_error(exc) from exc
    count = getattr(getattr(answer, "usage", None), "prompt_tokens", None)
    return count if isinstance(count, int) else None
