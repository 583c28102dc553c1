"""From kept trajectories to what a training step sees: token ids and their mask.

A whole trajectory is one example, whatever its number of turns: every turn of the student is a
target at once, and no token is computed twice. (With ``rendering = "step"`` every step is one.) A failed
step stays as context, so that the student learns how to go on from it, but unless asked for it is not
learnt itself. Tokens can count differently by the part of the step they belong to.
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
from agentkd.distill.spans import SpanWeights, turn_weights
from agentkd.engine.render import Rendered, render_steps, render_training
from agentkd.errors import DataError
from agentkd.prompt import COT_STUDENT, STUDENT, learnt_prompt, system_prompt, trajectory_messages
from agentkd.trajectory import Context, Trajectory

__all__ = ["Example", "ExampleSet", "build_examples"]

DEFAULT_MAX_STEPS = 5


@dataclass(frozen=True)
class Example:
    """One trajectory (or one step of it) as token ids; ``mask`` marks the tokens that are learnt."""

    id: str
    """The trajectory's id; a single step's has ``/NUMBER`` behind it."""
    ids: list[int]
    mask: list[bool]
    weights: list[float] | None = None
    """How much each token counts, 0 where ``mask`` is False; None: all targets count 1."""

    @property
    def targets(self) -> int:
        """Number of tokens that are learnt."""
        return sum(self.mask)

    @property
    def weight(self) -> float:
        """What all targets count together."""
        return float(self.targets) if self.weights is None else sum(self.weights)


@dataclass(frozen=True)
class ExampleSet:
    """All examples of a run, and how the student will be asked."""

    examples: tuple[Example, ...]
    dropped: dict[str, int]
    """Trajectories left out, or cut, by reason."""
    system_prompt: str
    tools: tuple[str, ...]
    """Schemas, as JSON strings."""
    max_steps: int
    imports: tuple[str, ...]
    passages: int | None = None
    """Passages before the question, where the student is to be shown some."""
    passage_tokens: int | None = None

    def digest(self) -> str:
        """Hash of every id and mask."""
        rows = [(item.id, item.ids, item.mask, item.weights) for item in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def build_examples(trajectories: Sequence[Trajectory], tokenizer: Any, config: DistillConfig) -> ExampleSet:
    """Render trajectories with the student's prompt.

    Args:
        trajectories: the kept ones.
        tokenizer: of the base model.
        config: what says which tokens are learnt, and how the student will be asked.

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
        made = _examples(item, prompt, tokenizer, config)
        if not made:
            dropped["no step to learn"] += 1
        for example in made:
            fitting = _fitted(example, config.max_length, config.overlong)
            if fitting is None:
                dropped["too long"] += 1
                continue
            if fitting is not example:
                dropped["cut to fit"] += 1
            examples.append(fitting.example)
    if not examples:
        raise DataError(
            f"None of the {len(chosen)} trajectories can be learnt: {_reasons(dropped)}.",
            f"Raise max_length (now {config.max_length} tokens)."
            if dropped["too long"]
            else "Collect others.",
        )
    first, context = chosen[0].config, _context(chosen)
    return ExampleSet(
        examples=tuple(examples),
        dropped={reason: count for reason, count in dropped.items() if count},
        system_prompt=prompt,
        tools=tools,
        max_steps=config.max_steps or int(first.get("max_steps") or DEFAULT_MAX_STEPS),
        imports=tuple(first.get("imports") or ()) if config.imports is None else config.imports,
        passages=context.k if context else None,
        passage_tokens=context.max_tokens if context else None,
    )


def _context(trajectories: Sequence[Trajectory]) -> Context | None:
    """How passages are shown before the question: all of the trajectories must agree."""
    found = {(it.context.k, it.context.max_tokens) if it.context else None for it in trajectories}
    if len(found) > 1:
        raise DataError(
            "Some trajectories have passages before their question, and others have not, or other numbers "
            "of them; a student is asked in one way.",
            "Add the same to all of them: agentkd transform passages.",
        )
    return trajectories[0].context


@dataclass(frozen=True)
class _Made:
    example: Example
    ends: tuple[int, ...]
    """Behind each target turn."""


def _examples(trajectory: Trajectory, prompt: str, tokenizer: Any, config: DistillConfig) -> list[_Made]:
    targets = [config.failed_steps == "target" or step.failure is None for step in trajectory.steps]
    if not any(targets):
        return []
    # What comes after the last learnt turn teaches nothing.
    end = max(place for place, target in enumerate(targets) if target) + 1
    messages = trajectory_messages(trajectory, learnt_prompt(trajectory, prompt), trajectory.steps[:end])
    if messages[-1]["role"] != "assistant":
        messages.pop()
    if config.rendering == "step":
        rendered = render_steps(tokenizer, messages, targets[:end])
        names = [f"{trajectory.id}/{it.turns[0].number + 1}" for it in rendered]
    else:
        rendered = [render_training(tokenizer, messages, targets[:end])]
        names = [trajectory.id]
    made = [_made(name, it, trajectory, tokenizer, config) for name, it in zip(names, rendered, strict=True)]
    return [it for it in made if it.example.targets]


def _made(
    name: str, rendered: Rendered, trajectory: Trajectory, tokenizer: Any, config: DistillConfig
) -> _Made:
    ends = tuple(turn.end for turn in rendered.turns)
    steps = [trajectory.steps[turn.number] for turn in rendered.turns]
    apart = config.first_thought == "context" and any(step.first_thought for step in steps)
    if config.weights == SpanWeights() and not apart:
        return _Made(Example(name, rendered.ids, rendered.mask), ends)
    weights = [0.0] * len(rendered.ids)
    for turn, step in zip(rendered.turns, steps, strict=True):
        given = len(step.first_thought.prefix) if apart and step.first_thought else 0
        weights[turn.begin : turn.end] = turn_weights(
            turn, step, trajectory.kind, config.weights, given, tokenizer
        )
    return _Made(Example(name, rendered.ids, [weight > 0 for weight in weights], weights), ends)


def _fitted(made: _Made, limit: int, overlong: str) -> _Made | None:
    """The example within the limit: as it is, cut behind a whole turn, or None."""
    example = made.example
    if len(example.ids) <= limit:
        return made
    end = max((end for end in made.ends if end <= limit), default=0)
    if overlong == "drop" or not any(example.mask[:end]):
        return None
    weights = example.weights[:end] if example.weights is not None else None
    return _Made(Example(example.id, example.ids[:end], example.mask[:end], weights), (end,))


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
