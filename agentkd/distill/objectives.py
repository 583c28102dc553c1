"""What a training step minimises, beyond the plain cross-entropy that :class:`Learner` computes itself.

An :class:`Objective` may change what the student reads, and says the loss of each target from the logits of
student and teacher. All are means over target tokens, weighted like those of the cross-entropy.

=============  =======  =====================================================================
name           teacher  loss of a token (S student, T teacher, z logits, p = softmax(z))
=============  =======  =====================================================================
sft            no       -log p_S(target)
masked         no       the same, with a part of the target-side inputs masked (2403.02178)
forward-kl     yes      sum p_T (log p_T - log p_S)
reverse-kl     yes      sum p_S (log p_S - log p_T)
jsd            yes      KL(p_T | M) / 2 + KL(p_S | M) / 2, M = (p_T + p_S) / 2 (GKD, 2306.13649)
taid           yes      KL(r | p_S), r = softmax((1 - t) z_S + t z_T), z_S without gradient there,
                        t from 0.4 to 1 over the training (2501.16937)
first          yes      KL(q | p_S), q the teacher's 5 likeliest, smoothed (2408.12168)
plackett-luce  yes      -log likelihood of the teacher's 5 likeliest in their order (2506.12542)
=============  =======  =====================================================================

"aft" and "dpo", which hold right trajectories against wrong ones, are losses of whole trajectories: see
:mod:`agentkd.distill.preference`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from agentkd.distill.batches import Pack

__all__ = ["DIVERGENCES", "READ", "MaskedThought", "Objective", "TeacherObjective", "masked_ids"]

TOP = 5
SMOOTHING = 0.1
TAID_BEGIN = 0.4
MASK_WARMUP = 2 / 3
"""Part of the training in which the share of masked inputs rises."""


@runtime_checkable
class Objective(Protocol):
    """Called for each pack of a step.

    One that needs a teacher and reads nothing but its likeliest tokens can say so by an attribute ``top``,
    their number: then it learns from recorded ones as well.
    """

    needs_teacher: bool

    def inputs(self, pack: Pack, progress: float, seed: str) -> list[int]:
        """What the student reads instead of ``pack.ids``; ``progress`` is 0 at the begin, 1 at the end."""

    def losses(self, student: Tensor, targets: Tensor, teacher: Tensor | None, progress: float) -> Tensor:
        """Nats of each target, with gradient for ``student``.

        Args:
            student: logits (rows, vocabulary), float32.
            targets: token ids (rows).
            teacher: logits (rows, vocabulary) without gradient, if ``needs_teacher``.
            progress: 0 to 1.
        """


Divergence = Callable[[Tensor, Tensor, float], Tensor]
"""(student logits, teacher logits, progress) to the loss of each row."""


def forward_kl(student: Tensor, teacher: Tensor, progress: float = 0.0) -> Tensor:
    """``sum p_T (log p_T - log p_S)``."""
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


def reverse_kl(student: Tensor, teacher: Tensor, progress: float = 0.0) -> Tensor:
    """``sum p_S (log p_S - log p_T)``."""
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def jsd(student: Tensor, teacher: Tensor, progress: float = 0.0) -> Tensor:
    """The Jensen-Shannon divergence; at most log 2."""
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    return 0.5 * (_kl(theirs, middle) + _kl(ours, middle))


def taid(student: Tensor, teacher: Tensor, progress: float = 0.0) -> Tensor:
    """Forward KL to a distribution that moves from near the student's to the teacher's.

    TAID, arXiv 2501.16937. With ``z`` the logits and ``sg`` that no gradient passes, a row's loss is::

        KL(r | p_S),   r = softmax((1 - t) sg(z_S) + t z_T),   t = 0.4 + 0.6 progress

    The paper also raises ``t`` faster while the loss falls fast; here it rises evenly.

    Args:
        student, teacher: logits (rows, vocabulary).
        progress: 0 at the begin of the training, 1 at its end.

    Returns:
        Nats (rows).
    """
    t = TAID_BEGIN + (1 - TAID_BEGIN) * progress
    between = (1 - t) * student.detach() + t * teacher
    return _kl(between.log_softmax(-1), student.log_softmax(-1))


def first(student: Tensor, teacher: Tensor, progress: float = 0.0) -> Tensor:
    """KL to the teacher's likeliest tokens alone, calibrated anew (FIRST, arXiv 2408.12168).

    With ``B`` the teacher's k = 5 likeliest tokens, a row's loss is::

        sum over v in B of q_v (log q_v - log p_S(v)),
        q_v = (1 - 0.1) p_T(v) / (sum over u in B of p_T(u)) + 0.1 / k

    ``p_S`` is the student's softmax over the whole vocabulary, so it is pulled away from all others. The
    authors' code takes the softmax over ``B`` on both sides, and smooths logarithms by moving 0.1 from the
    likeliest to the others; here probabilities are mixed with equal ones, and ``q`` stays a distribution.

    Args:
        student, teacher: logits (rows, vocabulary); of the teacher only the likeliest are read, up to a
            constant, so log-probabilities will do.
        progress: not used.

    Returns:
        Nats (rows).
    """
    best = teacher.topk(min(TOP, teacher.shape[-1]), -1)
    chances = best.values.softmax(-1)
    chances = (1 - SMOOTHING) * chances + SMOOTHING / chances.shape[-1]
    return (chances * (chances.log() - student.log_softmax(-1).gather(-1, best.indices))).sum(-1)


def plackett_luce(student: Tensor, teacher: Tensor, progress: float = 0.0) -> Tensor:
    """Each of the teacher's likeliest, in order, is chosen among all that are not yet chosen.

    The likelihood of a ranking in the model of Plackett and Luce (PLD, arXiv 2506.12542): with ``b_1 .. b_k``
    the teacher's k = 5 likeliest tokens in their order and ``z`` the student's logits, a row's loss is::

        sum over i = 1 .. k of [ log( sum over v not in {b_1 .. b_(i-1)} of exp z_v ) - z_(b_i) ]

    The denominators are sums over what follows: with sums over what precedes, as they are published
    elsewhere, the reversed order would be rewarded. PLD ranks the label first and weights each choice by the
    teacher's confidence; here the order is the teacher's alone, and all k choices count the same.

    Args:
        student: logits (rows, vocabulary).
        teacher: logits (rows, vocabulary), of which only the order of the likeliest is read.
        progress: not used.

    Returns:
        Nats (rows), the sum over the k choices.
    """
    order = teacher.topk(min(TOP, teacher.shape[-1] - 1), -1).indices
    ranked = student.gather(-1, order)
    rest = student.scatter(-1, order, float("-inf")).logsumexp(-1, keepdim=True)
    following = torch.cat((ranked, rest), -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]
    return (following - ranked).sum(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of two log-probabilities over the last axis."""
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


class TeacherObjective:
    """A divergence from the teacher, mixed with the cross-entropy.

    Args:
        divergence: one of the functions above.
        share: of the divergence; the rest is cross-entropy.
        top: how many of the teacher's likeliest tokens it reads; None: its whole distribution.
    """

    needs_teacher = True

    def __init__(self, divergence: Divergence, share: float, top: int | None = None) -> None:
        self.divergence, self.share, self.top = divergence, share, top

    def inputs(self, pack: Pack, progress: float, seed: str) -> list[int]:
        """See :class:`Objective`."""
        return pack.ids

    def losses(self, student: Tensor, targets: Tensor, teacher: Tensor | None, progress: float) -> Tensor:
        """See :class:`Objective`."""
        assert teacher is not None
        found = self.share * self.divergence(student, teacher, progress)
        if self.share == 1:
            return found
        return found + (1 - self.share) * functional.cross_entropy(student, targets, reduction="none")


class MaskedThought:
    """Cross-entropy while a part of what the student reads of its own turns is masked (arXiv 2403.02178).

    With ``x`` the tokens and ``m`` drawn anew in every step, the loss of a target is::

        -log p_S(x_i | x'_1 .. x'_(i-1)),   x'_j = [mask] where m_j, else x_j

        m_j = 1 with probability rate * min(1, progress / (2/3)), and only where x_j is a target that is
        followed by one

    What the student did not write (prompt, question, observations) is never masked. See :func:`masked_ids`.

    Args:
        rate: share of masked inputs, reached after two thirds of the training.
        mask_id: what stands in their place.
    """

    needs_teacher = False

    def __init__(self, rate: float, mask_id: int) -> None:
        self.rate, self.mask_id = rate, mask_id

    def inputs(self, pack: Pack, progress: float, seed: str) -> list[int]:
        """See :class:`Objective`."""
        return masked_ids(pack, self.rate * min(1.0, progress / MASK_WARMUP), self.mask_id, seed)

    def losses(self, student: Tensor, targets: Tensor, teacher: Tensor | None, progress: float) -> Tensor:
        """See :class:`Objective`."""
        return functional.cross_entropy(student, targets, reduction="none")


def masked_ids(pack: Pack, rate: float, mask_id: int, seed: str) -> list[int]:
    """The ids of a pack, each target but the last of its turn replaced with probability ``rate``.

    Labels are kept: the token behind a masked one is predicted without having seen it.

    Args:
        pack: the examples.
        rate: 0 to 1.
        mask_id: what stands in the place of a masked token.
        seed: the same seed masks the same tokens of the same pack.

    Returns:
        As many ids as ``pack.ids``.
    """
    draw = random.Random(f"{seed}:{','.join(pack.examples)}")
    ids = list(pack.ids)
    predicting = set(pack.rows)
    for row in pack.rows:
        # The last token of a turn predicts nothing: to mask it would only hide where a turn ends.
        if row + 1 in predicting and draw.random() < rate:
            ids[row + 1] = mask_id
    return ids


DIVERGENCES: dict[str, Divergence] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jsd": jsd,
    "taid": taid,
    "first": first,
    "plackett-luce": plackett_luce,
}
READ = {"first": TOP, "plackett-luce": TOP}
"""Those that read nothing but the teacher's likeliest tokens, and how many."""
