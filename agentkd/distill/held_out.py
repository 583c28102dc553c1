"""The loss on what is held out of the training, and the parameters that do best there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from agentkd.distill.blame import no_number
from agentkd.distill.examples import Example
from agentkd.distill.learner import Learner
from agentkd.distill.ranks import rank
from agentkd.distill.shard import check_values, gathered
from agentkd.distill.workers import Contrast
from agentkd.errors import TrainingError, boundary

__all__ = ["Best", "held_out_loss"]


def held_out_loss(learner: Learner, examples: Sequence[Example], contrast: Contrast | None = None) -> float:
    """Mean cross-entropy (nats) of the targets of examples, weighted as in training; without dropout.

    With a contrast it is that loss instead: a student that learns to prefer may well write the right
    ones with a smaller likelihood, and would else be best before its first step.

    Raises:
        TrainingError: it is not a number; names the trajectories.
    """

    def loss(some: Sequence[Example]) -> float:
        return _cross_entropy(learner, some) if contrast is None else contrast.loss(learner, some)

    learner.refresh()
    learner.peft.eval()
    try:
        with torch.no_grad():
            mean = loss(examples)
            if not math.isfinite(mean):
                raise no_number("The held-out loss", examples, lambda it: math.isfinite(loss([it])))
    finally:
        learner.peft.train()
    return mean


def _cross_entropy(learner: Learner, examples: Sequence[Example]) -> float:
    total = 0.0
    for pack in learner.packs(examples, 1):
        losses = learner.losses(pack)
        total += (losses * losses.new_tensor(pack.weights)).sum().item()
    return total / sum(example.weight for example in examples)


class Best:
    """The parameters with the least held-out loss, kept in a file.

    What is best, and since when, follows from the losses alone: a training that goes on from a checkpoint
    comes to the same file again.

    Args:
        path: of the file.
        losses: held-out losses up to now, in order.
    """

    def __init__(self, path: Path, losses: Sequence[float]) -> None:
        self.path = path
        self.losses = list(losses)

    @property
    def since(self) -> int:
        """Looks since the best."""
        return len(self.losses) - 1 - self.losses.index(min(self.losses)) if self.losses else 0

    def add(self, loss: float, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Take note of a loss; keep the parameters when there was none as low."""
        self.losses.append(loss)
        if self.since:
            return
        kept = gathered([value.detach() for value in parameters])
        if rank():  # the first process writes the student
            return
        partial = self.path.with_suffix(".partial")
        with boundary(TrainingError, f"writing {self.path}"):
            torch.save(kept, partial)
            partial.replace(self.path)

    def values(self, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Of the parameters at the best, whole and on the CPU.

        Raises:
            TrainingError: the file cannot be read, or is of another model.
        """
        with boundary(TrainingError, f"reading {self.path}", "Remove the folder to start again."):
            kept: list[torch.Tensor] = torch.load(self.path, map_location="cpu", weights_only=True)
            check_values(kept, parameters)
        return kept
