"""Packs computed side by side, each by one thread that waits for nobody.

On a CPU, splitting every small operation over all cores costs more in waiting than it gains,
and becomes many times slower as soon as another program wants a core. So each core gets packs
of its own, and the gradients are added up in a fixed order: the sum is the same whichever
thread was first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from agentkd.distill.batches import Pack
from agentkd.distill.config import DistillConfig
from agentkd.distill.learner import Learner
from agentkd.distill.objectives import Objective
from agentkd.distill.teacher import LocalTeacher
from agentkd.errors import TrainingError

__all__ = ["Goal", "Workers", "side_by_side"]

Grads = tuple[torch.Tensor | None, ...]
"""Of each trained parameter; None where the pack did not use it."""


@dataclass(frozen=True)
class Goal:
    """What is minimised; no objective is cross-entropy, on the fast path."""

    objective: Objective | None = None
    teacher: LocalTeacher | None = None
    seed: int = 0


SFT = Goal()


class Workers:
    """Threads that compute losses and gradients. Made by :func:`side_by_side`."""

    def __init__(self, learner: Learner, pool: ThreadPoolExecutor, count: int, goal: Goal) -> None:
        self._learner, self._goal = learner, goal
        self._parameters = learner.parameters()
        self._pool = pool
        self.count = count

    def map(
        self, packs: Sequence[Pack], weight: float, step: int, steps: int
    ) -> Iterator[tuple[float, Grads]]:
        """For each pack, in order: its part of the mean loss, and the gradient of that.

        Args:
            packs: the batch.
            weight: what all targets of the batch count together.
            step: 0 for the first.
            steps: in all.

        Raises:
            TrainingError: a loss is not a number; names the trajectory.
        """
        return self._pool.map(lambda pack: self._one(pack, weight, step, steps), packs)

    def _one(self, pack: Pack, weight: float, step: int, steps: int) -> tuple[float, Grads]:
        losses = self._losses(pack, step, steps)
        _check(losses, pack, step)
        part = (losses * losses.new_tensor(pack.weights)).sum() / weight
        return part.item(), torch.autograd.grad(part, self._parameters, allow_unused=True)

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
    # Dropout draws from one generator: in turn, or the draws would depend on who is first.
    alone = learner.device.type != "cpu" or config.lora_dropout > 0
    count = 1 if alone else min(available, config.batch_size)
    torch.set_num_threads(max(1, available // count))
    try:
        with ThreadPoolExecutor(count, "agentkd-train") as pool:
            yield Workers(learner, pool, count, goal)
    finally:
        torch.set_num_threads(before)


def _check(losses: torch.Tensor, pack: Pack, step: int) -> None:
    bad = (~torch.isfinite(losses.detach())).nonzero()
    if len(bad):
        name = pack.examples[pack.owners[int(bad[0])]]
        raise TrainingError(
            f"The loss of trajectory {name} is not a number in step {step + 1}.",
            "Lower the learning rate, or leave that trajectory out.",
        )
