"""Which examples a step sees, and how they are laid out for computing.

The order is a pure function of (seed, step), so a training that is resumed sees what it would
have seen. Examples are packed behind one another without padding, and what all of them begin
with (the system prompt) stands there once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from agentkd.distill.examples import Example
from agentkd.errors import DataError

__all__ = ["Pack", "batch_indices", "hold_out", "pack_batch", "single_packs", "total_steps"]


@dataclass(frozen=True)
class Pack:
    """Some examples in one row of tokens: the shared prefix, then the rest of each.

    ``rows[i]`` is the place in ``ids`` whose prediction is compared with ``targets[i]``,
    ``owners[i]`` the index in ``examples`` it belongs to, and ``weights[i]`` what it counts.
    """

    examples: tuple[str, ...]
    prefix: int
    lengths: tuple[int, ...]
    """Tokens of each example behind the prefix."""
    ids: list[int]
    positions: list[int]
    rows: list[int]
    targets: list[int]
    owners: list[int]
    weights: list[float]


def total_steps(examples: int, batch_size: int, steps: int | None, epochs: float) -> int:
    """How many optimiser steps a run has, at least one."""
    return steps if steps is not None else max(1, round(examples * epochs / batch_size))


def batch_indices(
    examples: int, batch_size: int, seed: int, step: int, *, shuffled: bool = True
) -> list[int]:
    """Indices of the examples of a step; every epoch is a new shuffle, batches run on across them.

    Args:
        examples: how many there are.
        batch_size: examples a step.
        seed: of the shuffles.
        step: 0 for the first.
        shuffled: else every epoch has the order of the file.
    """
    first = step * batch_size
    if not shuffled:
        return [place % examples for place in range(first, first + batch_size)]
    return [
        _shuffled(examples, seed, place // examples)[place % examples]
        for place in range(first, first + batch_size)
    ]


def hold_out(
    examples: Sequence[Example], tasks: Mapping[str, str], fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Those to learn from and those held out; no question has examples among both.

    Args:
        examples: all of them.
        tasks: id of the question, by the example's id.
        fraction: share of the questions that is held out, at least one; 0 holds out none.
        seed: which questions.

    Raises:
        DataError: all examples are of one question.
    """
    if fraction == 0:
        return tuple(examples), ()
    names = sorted({tasks[example.id] for example in examples})
    if len(names) < 2:
        raise DataError("All examples are of one question: none can be held out.", "Set --eval-fraction 0.")
    random.Random(f"held out:{seed}").shuffle(names)
    chosen = set(names[: min(len(names) - 1, max(1, round(fraction * len(names))))])
    return (
        tuple(example for example in examples if tasks[example.id] not in chosen),
        tuple(example for example in examples if tasks[example.id] in chosen),
    )


@lru_cache(maxsize=4)
def _shuffled(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return tuple(order)


def pack_batch(examples: Sequence[Example], budget: int, groups: int = 1) -> list[Pack]:
    """Lay out a batch as packs of about equal size, so that they can be computed side by side.

    Args:
        examples: the batch.
        budget: tokens that all packs computed at one time may have together; an example is never
            cut, so a pack can be larger.
        groups: how many packs are computed at one time.
    """
    tokens = sum(len(example.ids) for example in examples)
    rounds = max(1, math.ceil(tokens / budget))
    packs: list[list[Example]] = [[] for _ in range(min(len(examples), groups * rounds))]
    sizes = [0] * len(packs)
    for example in sorted(examples, key=lambda item: (-len(item.ids), item.id)):
        smallest = sizes.index(min(sizes))
        packs[smallest].append(example)
        sizes[smallest] += len(example.ids)
    return [_pack(pack) for pack in packs]


def single_packs(examples: Sequence[Example]) -> list[Pack]:
    """Each example by itself: for models that cannot compute several in one row."""
    return [_pack([example]) for example in examples]


def _pack(examples: Sequence[Example]) -> Pack:
    prefix = _shared_prefix(examples)
    ids = list(examples[0].ids[:prefix])
    positions = list(range(prefix))
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    weights: list[float] = []
    for owner, example in enumerate(examples):
        shift = len(ids) - prefix
        for place in range(prefix, len(example.ids)):
            if example.mask[place]:
                rows.append(shift + place - 1)
                targets.append(example.ids[place])
                owners.append(owner)
                weights.append(1.0 if example.weights is None else example.weights[place])
        ids += example.ids[prefix:]
        positions += range(prefix, len(example.ids))
    lengths = tuple(len(example.ids) - prefix for example in examples)
    names = tuple(item.id for item in examples)
    return Pack(names, prefix, lengths, ids, positions, rows, targets, owners, weights)


def _shared_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all examples begin with, ending before the first that predicts a target."""
    limit = min(example.mask.index(True) for example in examples) - 1
    first = examples[0].ids
    for place in range(max(limit, 0)):
        if any(example.ids[place] != first[place] for example in examples):
            return place
    return max(limit, 0)
