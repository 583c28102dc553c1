"""From the trajectories that a filter rejected to wrong examples beside the right ones.

Only what was judged and is wrong is a negative: a trajectory that was dropped because it is longer than
another, or that ended by an error of the endpoint, says nothing about what to avoid. All steps of a negative
count, the failed ones too: they are what went wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentkd.distill.choose import make_preference
from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example, ExampleSet, build_examples
from agentkd.distill.parity import find_faults
from agentkd.errors import ConfigError, DataError
from agentkd.record import file_hash
from agentkd.trajectory import Trajectory

__all__ = ["Negatives", "build_negatives", "negatives_hash", "read_rejected"]

_WHICH = "Name the dropped.jsonl that agentkd filter wrote."
WRONG = " (wrong)"
"""Stands behind the id of a wrong example: a right one may have the same."""


@dataclass(frozen=True)
class Negatives:
    """The wrong examples of a run."""

    by_right: dict[str, tuple[Example, ...]]
    """By the id of the right example."""
    left_out: dict[str, int]
    """Rejected trajectories that are no negative, by reason."""


def negatives_hash(config: DistillConfig) -> str:
    """Of the file of wrong trajectories; empty where the objective takes none.

    Raises:
        ConfigError: the objective needs wrong trajectories and none were named, or the other way round.
        DataError: their file is not there.
    """
    needed = make_preference(config) is not None
    if needed and config.negatives is None:
        raise ConfigError(
            f"The objective {config.objective} needs wrong trajectories.", "Add --negatives dropped.jsonl."
        )
    if not needed and config.negatives is not None:
        raise ConfigError(
            f"The objective {config.objective} takes no wrong trajectories.",
            "Leave --negatives out, or choose --objective aft or dpo.",
        )
    if config.negatives is None:
        return ""
    path = Path(config.negatives)
    if not path.is_file():
        raise DataError(f"There is no file {path}.", _WHICH)
    return file_hash(path)


def read_rejected(path: Path) -> list[Trajectory]:
    """The trajectories of ``dropped.jsonl``, or of a file of trajectories.

    Raises:
        DataError: no such file, or a line that is neither; names the line.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.", _WHICH)
    found: list[Trajectory] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            row = content.get("trajectory", content)
            found.append(Trajectory.model_validate(row))
        except (ValueError, AttributeError) as exc:
            raise DataError(
                f"{path}, line {number}, is not a trajectory.", "Name the dropped.jsonl of agentkd filter."
            ) from exc
    return found


def build_negatives(
    rejected: Sequence[Trajectory],
    right: ExampleSet,
    tasks: dict[str, str],
    tokenizer: Any,
    stops: frozenset[int],
    config: DistillConfig,
) -> Negatives:
    """Wrong examples, rendered as the right ones are.

    Args:
        rejected: from :func:`read_rejected`.
        right: the examples to learn from.
        tasks: the task of each right example, by the example's id.
        tokenizer: of the base model.
        stops: ids at which the server stops.
        config: the settings of the run.

    Raises:
        DataError: no right example has a wrong one of the same question.
    """
    left_out: Counter[str] = Counter()
    wanted = set(tasks.values())
    usable: dict[str, Trajectory] = {}
    for item in rejected:
        reason = _unusable(item, config.kind, wanted)
        if reason:
            left_out[reason] += 1
        else:
            usable[item.id] = item
    by_task: dict[str, list[Example]] = {}
    if usable:
        for example in _rendered(list(usable.values()), right, tokenizer, stops, config, left_out):
            by_task.setdefault(usable[example.id.removesuffix(WRONG)].task.id, []).append(example)
    by_right = {name: tuple(by_task[task]) for name, task in tasks.items() if task in by_task}
    if not by_right:
        told = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the file is empty"
        raise DataError(
            f"No trajectory has a wrong one of the same question beside it ({told}).",
            "Collect several of each task (--samples 4 --temperatures 0,0.7), and filter them.",
        )
    return Negatives(by_right, dict(left_out))


def _unusable(item: Trajectory, kind: str, wanted: set[str]) -> str:
    if item.kind != kind:
        return "of another kind"
    if item.stop_reason.is_error:
        return "ended by an error"
    if item.correct:
        return "with a right answer"
    if item.answer is not None and (item.score is None or item.score.value is None):
        return "not scored"
    if not item.steps:
        return "without a step"
    return "" if item.task.id in wanted else "of a question that has no right one"


def _rendered(
    items: list[Trajectory],
    right: ExampleSet,
    tokenizer: Any,
    stops: frozenset[int],
    config: DistillConfig,
    left_out: Counter[str],
) -> list[Example]:
    settings = {"failed_steps": "target", "system_prompt": right.system_prompt, "rendering": "whole"}
    plain = config.model_copy(
        update=settings | {"weights": type(config.weights)(), "first_thought": "target"}
    )
    try:
        made = build_examples(items, tokenizer, plain)
    except DataError:  # every one of them is too long
        left_out["too long"] += len(items)
        return []
    left_out.update(made.dropped)
    known = {item.id: item for item in items}
    good: list[Example] = []
    for example in made.examples:
        # What the model wrote in its failure may be nothing that can be rendered token by token.
        if find_faults([example], known, right.system_prompt, tokenizer, stops, failed_steps="target"):
            left_out["cannot be rendered"] += 1
        else:
            good.append(replace(example, id=example.id + WRONG))
    return good
