"""How much of its training trajectories a student has by heart.

Three signs (Carlini et al. 2021, arXiv 2012.07805): its perplexity on what it was trained to emit; the
ratio of that to the zlib entropy of the text, which is low for text that is likely though it is not simple;
and how many tokens from the middle of a target on it would write out verbatim. Against trajectories that it
has not seen, the first two tell how well training membership can be guessed (AUC; 0.5 is chance).
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from agentkd.engine.render import render_training
from agentkd.errors import DataError
from agentkd.prompt import trajectory_messages
from agentkd.study import Share
from agentkd.trajectory import Trajectory

if TYPE_CHECKING:
    from agentkd.engine.likelihood import Likelihood

__all__ = ["Membership", "MemorisationStudy", "Memorised", "study_memorisation"]

VERBATIM = 32
"""Tokens that must come out word for word for a trajectory to count as extractable."""
RESAMPLES = 1000


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Memorised(_Result):
    """One trajectory."""

    id: str
    tokens: int
    """Target tokens that the model's context holds."""
    perplexity: float
    """Of the target tokens."""
    zlib_ratio: float
    """Bits that the model needs for the targets by bits that zlib needs; the lower, the more suspect."""
    verbatim: int
    """Tokens from the middle of the targets on that greedy decoding writes as they are."""


class Membership(_Result):
    """How well one number tells training trajectories from others."""

    auc: float
    low: float
    """Of the 95% bootstrap interval."""
    high: float


class MemorisationStudy(_Result):
    """What :func:`study_memorisation` finds."""

    n: int
    perplexity: float
    """Median over the training trajectories."""
    zlib_ratio: float
    """Median."""
    extractable: Share
    """Training trajectories of which at least 32 tokens (or all that follow) come out verbatim."""
    held_out: int = 0
    held_out_perplexity: float | None = None
    held_out_extractable: Share | None = None
    by_perplexity: Membership | None = None
    by_zlib: Membership | None = None
    most: tuple[Memorised, ...] = ()
    """The training trajectories most at risk, by the zlib ratio."""


def study_memorisation(
    model: Likelihood,
    trained: Sequence[Trajectory],
    held_out: Sequence[Trajectory] = (),
    *,
    on_progress: Callable[[int], None] | None = None,
) -> MemorisationStudy:
    """Read training trajectories, and others that were not trained on, with a student.

    Raises:
        DataError: no trajectory has a target.
    """
    done = 0

    def read(runs: Sequence[Trajectory]) -> list[Memorised]:
        nonlocal done
        found = []
        for run in runs:
            item = _read(model, run)
            done += 1
            if on_progress:
                on_progress(done)
            if item is not None:
                found.append(item)
        return found

    ours, others = read(trained), read(held_out)
    if not ours:
        raise DataError("No trajectory has a step to be learnt.", "Give the kept.jsonl that was trained on.")
    return MemorisationStudy(
        n=len(ours),
        perplexity=_median([item.perplexity for item in ours]),
        zlib_ratio=_median([item.zlib_ratio for item in ours]),
        extractable=_extractable(ours),
        held_out=len(others),
        held_out_perplexity=_median([item.perplexity for item in others]) if others else None,
        held_out_extractable=_extractable(others) if others else None,
        by_perplexity=_membership(ours, others, lambda item: item.perplexity) if others else None,
        by_zlib=_membership(ours, others, lambda item: item.zlib_ratio) if others else None,
        most=tuple(sorted(ours, key=lambda item: item.zlib_ratio)[:10]),
    )


def _read(model: Likelihood, run: Trajectory) -> Memorised | None:
    if not run.steps:
        return None
    messages = trajectory_messages(run, model.system_prompt)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    rendered = render_training(model.tokenizer, messages)
    scores = model.scores(rendered.ids)
    targets = [place for place in range(1, len(scores) + 1) if rendered.mask[place]]
    if not targets:
        return None
    total = -math.fsum(scores[place - 1].logprob for place in targets)
    text = "\n".join(message["content"] for message in messages if message["role"] == "assistant")
    verbatim = 0
    for place in targets[len(targets) // 2 :]:
        if not scores[place - 1].top:
            break
        verbatim += 1
    return Memorised(
        id=run.id,
        tokens=len(targets),
        perplexity=math.exp(min(700.0, total / len(targets))),
        zlib_ratio=total / math.log(2) / (8 * len(zlib.compress(text.encode("utf-8"), 9))),
        verbatim=verbatim,
    )


def _extractable(items: Sequence[Memorised]) -> Share:
    able = [item.verbatim >= min(VERBATIM, item.tokens - item.tokens // 2) for item in items]
    return Share.of(sum(able), len(able))


def _membership(
    ours: Sequence[Memorised], others: Sequence[Memorised], of: Callable[[Memorised], float]
) -> Membership:
    members, rest = [of(item) for item in ours], [of(item) for item in others]
    rng = random.Random(0)
    drawn = sorted(
        _auc(rng.choices(members, k=len(members)), rng.choices(rest, k=len(rest))) for _ in range(RESAMPLES)
    )
    cut = int(0.025 * RESAMPLES)
    return Membership(auc=_auc(members, rest), low=drawn[cut], high=drawn[-1 - cut])


def _auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Chance that a member has the lower value; ties count half (Mann and Whitney)."""
    ranked = sorted([(value, 0) for value in members] + [(value, 1) for value in others])
    ranks: dict[float, list[int]] = {}
    for rank, (value, _) in enumerate(ranked, 1):
        ranks.setdefault(value, []).append(rank)
    total = math.fsum(math.fsum(ranks[value]) / len(ranks[value]) for value in others)
    n, m = len(members), len(others)
    return (total - m * (m + 1) / 2) / (n * m)


def _median(values: Sequence[float]) -> float:
    import statistics

    return statistics.median(values)
