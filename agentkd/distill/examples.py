"""From kept trajectories to what a training step sees: token ids and their mask.

A whole trajectory is one example, whatever its number of turns: every turn of the student is a
target at once, and no token is computed twice. A failed step stays as context, so that the
student learns how to go on from it, but it is not learnt itself.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from agentkd.distill.config import DistillConfig
from agentkd.engine.render import render_training
from agentkd.errors import DataError
from agentkd.prompt import COT_STUDENT, STUDENT, system_prompt, trajectory_messages
from agentkd.trajectory import Trajectory

__all__ = ["Example", "ExampleSet", "build_examples"]

DEFAULT_MAX_STEPS = 5


@dataclass(frozen=True)
class Example:
    """One trajectory as token ids; ``mask`` marks the tokens that are learnt."""

    id: str
    ids: list[int]
    mask: list[bool]

    @property
    def targets(self) -> int:
        """Number of tokens that are learnt."""
        return sum(self.mask)


@dataclass(frozen=True)
class ExampleSet:
    """All examples of a run, and how the student will be asked."""

    examples: tuple[Example, ...]
    dropped: dict[str, int]
    """Trajectories left out, by reason."""
    system_prompt: str
    tools: tuple[str, ...]
    """Schemas, as JSON strings."""
    max_steps: int
    imports: tuple[str, ...]

    def digest(self) -> str:
        """Hash of every id and mask."""
        rows = [(item.id, item.ids, item.mask) for item in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def build_examples(trajectories: Sequence[Trajectory], tokenizer: Any, config: DistillConfig) -> ExampleSet:
    """Render trajectories with the student's prompt.

    Args:
        trajectories: the kept ones.
        tokenizer: of the base model.
        config: ``kind``, ``max_length``, ``system_prompt``, ``max_steps``, ``imports`` are used.

    Raises:
        DataError: no trajectories, none of this kind, or none that can be learnt.
        ConfigError, TrainingError: the chat template will not do, see :mod:`agentkd.engine.render`.
    """
    if not trajectories:
        raise DataError("There are no trajectories to learn from.", "Collect more, or relax the filter.")
    chosen = [item for item in trajectories if item.kind == config.kind]
    if not chosen:
        raise DataError(
            f"None of the {len(trajectories)} trajectories is of kind {config.kind!r}.",
            f"Set kind to {trajectories[0].kind!r}, or collect with the other agent.",
        )
    tools = _tools(chosen)
    prompt = config.system_prompt or _prompt(config.kind, tools)
    dropped = Counter({"other kind": len(trajectories) - len(chosen)})
    examples: list[Example] = []
    for item in chosen:
        example = _example(item, prompt, tokenizer)
        if example is None:
            dropped["no step to learn"] += 1
        elif len(example.ids) > config.max_length:
            dropped["too long"] += 1
        else:
            examples.append(example)
    if not examples:
        raise DataError(
            f"None of the {len(chosen)} trajectories can be learnt: {_reasons(dropped)}.",
            f"Raise max_length (now {config.max_length} tokens)."
            if dropped["too long"]
            else "Collect others.",
        )
    first = chosen[0].config
    return ExampleSet(
        examples=tuple(examples),
        dropped={reason: count for reason, count in dropped.items() if count},
        system_prompt=prompt,
        tools=tools,
        max_steps=config.max_steps or int(first.get("max_steps") or DEFAULT_MAX_STEPS),
        imports=tuple(first.get("imports") or ()) if config.imports is None else config.imports,
    )


def _example(trajectory: Trajectory, prompt: str, tokenizer: Any) -> Example | None:
    targets = [step.failure is None for step in trajectory.steps]
    if not any(targets):
        return None
    # What comes after the last learnt turn teaches nothing.
    end = max(place for place, target in enumerate(targets) if target) + 1
    messages = trajectory_messages(trajectory, prompt, trajectory.steps[:end])
    if messages[-1]["role"] != "assistant":
        messages.pop()
    rendered = render_training(tokenizer, messages, targets[:end])
    return Example(trajectory.id, rendered.ids, rendered.mask)


def _tools(trajectories: Sequence[Trajectory]) -> tuple[str, ...]:
    """All tools of all trajectories, each name once, in order of appearance.

    The student is served with one prompt, so it is trained with that one everywhere.
    """
    found: dict[str, str] = {}
    for trajectory in trajectories:
        for text in trajectory.tools:
            try:
                name = json.loads(text)["name"]
            except (ValueError, KeyError, TypeError) as exc:
                raise DataError(
                    f"Trajectory {trajectory.id}: a tool is not a schema with a name.", "Collect it again."
                ) from exc
            found.setdefault(name, text)
    return tuple(found.values())


def _prompt(kind: str, tools: Sequence[str]) -> str:
    if kind == "cot":
        return COT_STUDENT
    return system_prompt(STUDENT, [SimpleNamespace(**json.loads(text)) for text in tools])


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
