"""Learning from what was done wrong: a right trajectory is held against wrong ones of its question.

With ``S`` the student, ``y+`` a kept trajectory, ``y-`` a wrong one of the same question, and ``l(y)`` the
sum of ``log p_S`` over the tokens that the model emitted (never over observations):

- **AFT** (alignment fine-tuning, arXiv 2309.02144), with ``s(y) = l(y) / tokens(y)``::

      log(1 + sum over y- of [exp(s- - s+) + exp(T - s-)]),   T = s+ - 2 * bound, s+ without gradient in T

  The second term is the constraint: at ``s- = s+ - bound`` its pull equals that of the first, so a wrong
  trajectory is pushed no further below the right one than by ``bound`` nats a token. Without it the student
  unlearns what wrong trajectories share with right ones, most of all the language itself.

- **DPO** (arXiv 2305.18290), with ``r(y) = l(y) - l_reference(y)``, the reference being the student before
  its first step::

      mean over y- of -log sigmoid(beta * (r+ - r-))

Either is a mean over the questions of a step, beside ``sft_weight`` times the cross-entropy on ``y+`` (AFT
adds it by definition; with DPO it is the RPO of arXiv 2404.19733).

TRL's ``DPOTrainer`` takes one completion a prompt and counts all of its tokens. A trajectory has observations
between its steps, which the model did not write; they would be part of the log-ratio. So this is ours.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from agentkd.distill.examples import Example

__all__ = ["Aft", "Dpo", "Preference", "Scored", "chosen_negatives"]


class Scored(NamedTuple):
    """One trajectory as the student and the reference see it."""

    total: Tensor
    """``log p_S`` of all emitted tokens together (nats), with gradient; a scalar."""
    tokens: int
    """Emitted tokens."""
    reference: float = 0.0
    """``log p`` of the same tokens under the reference, where there is one."""


@runtime_checkable
class Preference(Protocol):
    """Called once for each question of a step that has wrong trajectories."""

    needs_reference: bool
    sft_weight: float
    """Of the cross-entropy on the right trajectory, which is added."""

    def loss(self, right: Scored, wrong: Sequence[Scored]) -> Tensor:
        """Nats, a scalar with gradient."""


class Aft:
    """Alignment fine-tuning with its constraint; see the module.

    Args:
        bound: nats a token by which a wrong trajectory may fall below the right one.
        sft_weight: of the cross-entropy beside it.
    """

    needs_reference = False

    def __init__(self, bound: float, sft_weight: float = 1.0) -> None:
        self.bound, self.sft_weight = bound, sft_weight

    def loss(self, right: Scored, wrong: Sequence[Scored]) -> Tensor:
        """See :class:`Preference`."""
        good = right.total / right.tokens
        floor = good.detach() - 2 * self.bound
        terms = [good.new_zeros(())]
        for one in wrong:
            bad = one.total / one.tokens
            terms += [bad - good, floor - bad]
        return torch.stack(terms).logsumexp(0)


class Dpo:
    """Direct preference optimisation; see the module.

    Args:
        beta: how much a deviation from the reference counts.
        sft_weight: of the cross-entropy beside it.
    """

    needs_reference = True

    def __init__(self, beta: float, sft_weight: float = 0.0) -> None:
        self.beta, self.sft_weight = beta, sft_weight

    def loss(self, right: Scored, wrong: Sequence[Scored]) -> Tensor:
        """See :class:`Preference`."""
        good = right.total - right.reference
        margins = [good - (one.total - one.reference) for one in wrong]
        return -functional.logsigmoid(self.beta * torch.stack(margins)).mean()


def chosen_negatives(
    right: str, negatives: Mapping[str, Sequence[Example]], count: int, seed: str
) -> list[Example]:
    """At most ``count`` wrong trajectories to hold against one right one, drawn by ``seed`` alone.

    Args:
        right: id of the right example.
        negatives: the wrong ones, by the id of the right one.
        count: how many.
        seed: the same seed gives the same ones.
    """
    found = negatives.get(right, ())
    if len(found) <= count:
        return list(found)
    return random.Random(f"{seed}:{right}").sample(list(found), count)
