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

import torch

from agentkd.distill.batches import Pack
from agentkd.distill.config import DistillConfig
from agentkd.distill.learner import Learner
from agentkd.errors import TrainingError

__all__ = ["Workers", "side_by_side"]

Grads = tuple[torch.Tensor | None, ...]
"""Of each trained parameter; None where the pack did not use it."""


class Workers:
    """Threads that compute losses and gradients. Made by :func:`side_by_side`."""

    def __init__(self, learner: Learner, pool: ThreadPoolExecutor, count: int) -> None:
        self._learner = learner
        self._parameters = learner.parameters()
        self._pool = pool
        self.count = count

    def map(self, packs: Sequence[Pack], weight: float, step: int) -> Iterator[tuple[float, Grads]]:
        """For each pack, in order: its part of the mean loss, and the gradient of that.

        Args:
            packs: the batch.
            weight: what all targets of the batch count together.
            step: 0 for the first, for the error message.

        Raises:
            TrainingError: a loss is not a number; names the trajectory.
        """
        return self._pool.map(lambda pack: self._one(pack, weight, step), packs)

    def _one(self, pack: Pack, weight: float, step: int) -> tuple[float, Grads]:
        losses = self._learner.losses(pack)
        _check(losses, pack, step)
        part = (losses * losses.new_tensor(pack.weights)).sum() / weight
        return part.item(), torch.autograd.grad(part, self._parameters, allow_unused=True)


@contextmanager
def side_by_side(learner: Learner, config: DistillConfig) -> Iterator[Workers]:
    """Workers for one training run; torch's own number of threads is put back afterwards."""
    before = torch.get_num_threads()
    available = config.threads or before
    # Dropout draws from one generator: in turn, or the draws would depend on who is first.
    alone = learner.device.type != "cpu" or config.lora_dropout > 0
    count = 1 if alone else min(available, config.batch_size)
    torch.set_num_threads(max(1, available // count))
    try:
        with ThreadPoolExecutor(count, "agentkd-train") as pool:
            yield Workers(learner, pool, count)
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
