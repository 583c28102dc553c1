"""Packs computed side by side, each by one thread that waits for nobody.

On a CPU, splitting every small operation over all cores costs more in waiting than it gains,
and becomes many times slower as soon as another program wants a core. So each core gets packs
of its own, and the gradients are added up in a fixed order: the sum is the same whichever
thread was first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from agentkd.distill.batches import Pack
from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example
from agentkd.distill.learner import Learner
from agentkd.distill.objectives import Objective
from agentkd.distill.preference import Preference, Scored, chosen_negatives
from agentkd.distill.ranks import world
from agentkd.distill.teacher import Teacher
from agentkd.errors import TrainingError

__all__ = ["Contrast", "Goal", "Unit", "Workers", "score_references", "side_by_side"]

Grads = tuple[torch.Tensor | None, ...]
"""Of each trained parameter; None where the pack did not use it."""


class Unit(NamedTuple):
    """What one thread computes at once."""

    packs: tuple[Pack, ...]
    """Several only where a loss that is not the sum of theirs needs examples that cannot be packed."""
    right: str = ""
    """Id of the right trajectory, where it stands beside wrong ones."""
    counts: bool = True
    """False when it is computed only to keep step with other processes."""


@dataclass(frozen=True)
class Contrast:
    """Right trajectories held against wrong ones; see :mod:`agentkd.distill.preference`."""

    preference: Preference
    negatives: Mapping[str, Sequence[Example]]
    """By the id of the right example."""
    count: int
    """Wrong ones a right one is held against in a step."""
    references: Mapping[str, float] = field(default_factory=dict)
    """``log p`` of each example under the reference, where the preference needs one."""

    def lay_out(self, learner: Learner, batch: Sequence[Example], seed: str) -> list[Unit]:
        """Each right trajectory with the wrong ones that ``seed`` draws."""
        units: list[Unit] = []
        for right in batch:
            wrong = chosen_negatives(right.id, self.negatives, self.count, seed)
            units.append(Unit(tuple(learner.together([right, *wrong])), right.id))
        return units

    def loss(self, learner: Learner, batch: Sequence[Example]) -> float:
        """Of examples that are not learnt; always against the same wrong ones."""
        units = self.lay_out(learner, batch, "held out")
        weight, questions = sum(example.weight for example in batch), _compared(units)
        return sum(_contrasted(learner, self, unit, weight, questions, -1).item() for unit in units)


@dataclass(frozen=True)
class Goal:
    """What is minimised; no objective is cross-entropy, on the fast path."""

    objective: Objective | None = None
    teacher: Teacher | None = None
    seed: int = 0
    contrast: Contrast | None = None


SFT = Goal()


class Workers:
    """Threads that compute losses and gradients. Made by :func:`side_by_side`."""

    def __init__(self, learner: Learner, pool: ThreadPoolExecutor, count: int, goal: Goal) -> None:
        self._learner, self._goal = learner, goal
        self._parameters = learner.parameters()
        self._pool = pool
        self.count = count

    def lay_out(self, batch: Sequence[Example], step: int) -> list[Unit]:
        """What is computed side by side in a step: packs, or a right trajectory with its wrong ones."""
        contrast = self._goal.contrast
        if contrast is not None:
            return contrast.lay_out(self._learner, batch, f"{self._goal.seed}:{step}")
        units = [Unit((pack,)) for pack in self._learner.packs(batch, self.count * world())]
        return _filled_up(units) if self._learner.sharded else units

    def map(
        self, units: Sequence[Unit], weight: float, step: int, steps: int
    ) -> Iterator[tuple[float, Grads]]:
        """For each unit, in order: its part of the mean loss, and the gradient of that.

        Of a model that is shared out, the gradients are added to those of the parameters instead, as sums
        over all processes.

        Args:
            units: the batch, see :meth:`lay_out`.
            weight: what all (right) targets of the batch count together.
            step: 0 for the first.
            steps: in all.

        Raises:
            TrainingError: a loss is not a number; names the trajectory.
        """
        questions = _compared(units)

        def one(unit: Unit) -> tuple[float, Grads]:
            if self._goal.contrast is None:
                part = self._plain(unit.packs[0], weight, step, steps)
            else:
                part = _contrasted(self._learner, self._goal.contrast, unit, weight, questions, step)
            if not unit.counts:
                part = part * 0.0
            if self._learner.sharded:
                part.backward()
                return part.item(), (None,) * len(self._parameters)
            return part.item(), torch.autograd.grad(part, self._parameters, allow_unused=True)

        # One worker is this thread: it has chosen its GPU, and computes nothing before it is asked for.
        return map(one, units) if self.count == 1 else self._pool.map(one, units)

    def _plain(self, pack: Pack, weight: float, step: int, steps: int) -> torch.Tensor:
        losses = self._losses(pack, step, steps)
        _check(losses, pack, step)
        return (losses * losses.new_tensor(pack.weights)).sum() / weight

    def _losses(self, pack: Pack, step: int, steps: int) -> torch.Tensor:
        objective, teacher = self._goal.objective, self._goal.teacher
        if objective is None:
            return self._learner.losses(pack)
        progress = step / max(1, steps - 1)
        ids = objective.inputs(pack, progress, f"{self._goal.seed}:{step}")
        student = self._learner.logits(pack, ids)
        theirs = None
        if teacher is not None:
            theirs = teacher.logits(pack)[:, : student.shape[-1]]
            student = student[:, : theirs.shape[-1]]  # one of them may be padded to a rounder size
        return objective.losses(student, student.new_tensor(pack.targets).long(), theirs, progress)


@contextmanager
def side_by_side(learner: Learner, config: DistillConfig, goal: Goal = SFT) -> Iterator[Workers]:
    """Workers for one training run; torch's own number of threads is put back afterwards."""
    before = torch.get_num_threads()
    available = config.threads or before
    if learner.sharded:  # processes that wait for each other at every layer must not fight for a core
        available = max(1, available // world())
    # Dropout draws from one generator: in turn, or the draws would depend on who is first.
    alone = learner.device.type != "cpu" or config.lora_dropout > 0 or learner.sharded
    count = 1 if alone else min(available, config.batch_size)
    torch.set_num_threads(max(1, available // count))
    try:
        with ThreadPoolExecutor(count, "agentkd-train") as pool:
            yield Workers(learner, pool, count, goal)
    finally:
        torch.set_num_threads(before)


def _filled_up(units: list[Unit]) -> list[Unit]:
    """With the smallest once more, for nothing, until every process has the same number."""
    smallest = min(units, key=lambda unit: sum(len(pack.ids) for pack in unit.packs))
    return [*units, *[smallest._replace(counts=False)] * (-len(units) % world())]


def _check(losses: torch.Tensor, pack: Pack, step: int) -> None:
    bad = (~torch.isfinite(losses.detach())).nonzero()
    if len(bad):
        name = pack.examples[pack.owners[int(bad[0])]]
        raise TrainingError(
            f"The loss of trajectory {name} is not a number{f' in step {step + 1}' if step >= 0 else ''}.",
            "Lower the learning rate, or leave that trajectory out.",
        )


def _compared(units: Sequence[Unit]) -> int:
    """How many of them have a wrong trajectory beside the right one."""
    return sum(sum(len(pack.examples) for pack in unit.packs) > 1 for unit in units)


def _contrasted(
    learner: Learner, contrast: Contrast, unit: Unit, weight: float, questions: int, step: int
) -> torch.Tensor:
    """The part of one question: its preference, and the cross-entropy on its right trajectory."""
    scored, cross_entropy = _scored(learner, unit.packs, step, contrast.references)
    part = contrast.preference.sft_weight * cross_entropy[unit.right] / weight
    wrong = [it for name, it in scored.items() if name != unit.right]
    return part + contrast.preference.loss(scored[unit.right], wrong) / questions if wrong else part


def _scored(
    learner: Learner, packs: Sequence[Pack], step: int, references: Mapping[str, float]
) -> tuple[dict[str, Scored], dict[str, torch.Tensor]]:
    """Of each example, by its id: its log-probability, and its weighted cross-entropy."""
    scored: dict[str, Scored] = {}
    cross_entropy: dict[str, torch.Tensor] = {}
    for pack in packs:
        losses = learner.losses(pack)
        _check(losses, pack, step)
        owners = torch.tensor(pack.owners, device=losses.device)
        weighted = losses * losses.new_tensor(pack.weights)
        for owner, name in enumerate(pack.examples):
            mine = owners == owner
            scored[name] = Scored(-losses[mine].sum(), int(mine.sum()), references.get(name, 0.0))
            cross_entropy[name] = weighted[mine].sum()
    return scored, cross_entropy


def score_references(learner: Learner, examples: Sequence[Example]) -> dict[str, float]:
    """``log p`` (nats) that the student as it is now gives each example's targets, by the example's id."""
    learner.refresh()
    learner.peft.eval()  # without dropout
    found: dict[str, float] = {}
    with torch.no_grad():
        for example in examples:
            scored, _ = _scored(learner, learner.together([example]), -1, {})
            found |= {name: it.total.item() for name, it in scored.items()}
    learner.peft.train()
    return found
