"""What several runs of each task, confidences and prices add to the figures of an evaluation."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from agentkd.errors import ConfigError
from agentkd.spend import Price
from agentkd.trajectory import Step, Trajectory

__all__ = ["Calibration", "Measures", "calibration", "confidence", "counted", "measure", "pass_at_k"]

BINS = 10
"""Equal-width bins of the calibration error."""


class Calibration(BaseModel):
    """How well the confidence in an answer says how often it is right."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    """Answers with a confidence."""
    source: str
    """"votes": share of the sampled actions that agreed on the last one; "logprob": geometric mean of the
    probabilities of the sampled tokens."""
    confidence: float
    """Mean, 0 to 1."""
    accuracy: float
    """Of the same answers, 0 to 1."""
    ece: float
    """Expected calibration error over ten equal bins, 0 to 1 (Guo et al. 2017)."""


class Measures(BaseModel):
    """Figures beside accuracy. Errored runs are left out, as everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: int
    """Runs of a task, at most."""
    run_accuracies: tuple[float, ...] = ()
    """Accuracy of each run over all tasks, by its number."""
    pass_at: dict[int, float] = {}
    """By k: chance that one of k runs of a task is right, mean over the tasks with at least k runs."""
    seconds_p95: float | None = None
    """95th percentile of the wall-clock seconds of a run."""
    cost_per_task: float | None = None
    """US dollars, mean of a run; None for a model without a price."""
    calibration: Calibration | None = None
    """None where no run has votes or log-probabilities."""
    repairs: dict[str, int] = {}
    """What had to be mended to find the code in what the model wrote, by kind (:mod:`agentkd.action`), most
    frequent first; in all that was drawn: chosen actions, candidates that lost, drafts of a router."""


class _Confidence(NamedTuple):
    value: float
    source: str


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of ``k`` runs drawn from ``n``, of which ``correct`` are right, is right.

    The unbiased estimator ``1 - C(n - c, k) / C(n, k)`` of Chen et al. 2021 (arXiv 2107.03374).

    Raises:
        ConfigError: not ``1 <= k <= n`` or not ``0 <= correct <= n``.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ConfigError(f"No pass@{k} of {n} runs with {correct} right ones.", "Give 1 <= k <= n.")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def confidence(run: Trajectory) -> _Confidence | None:
    """How sure the model was of its answer: the votes of the last step, else its tokens' probability."""
    if not run.steps:
        return None
    last = run.steps[-1]
    chosen = next((item for item in last.candidates if item.chosen), None)
    if chosen is not None and len(last.candidates) > 1:
        return _Confidence(min(1.0, chosen.votes / len(last.candidates)), "votes")
    values = [value for step in run.steps for value in step.logprobs or () if math.isfinite(value)]
    return _Confidence(math.exp(math.fsum(values) / len(values)), "logprob") if values else None


def calibration(runs: Iterable[Trajectory]) -> Calibration | None:
    """Confidence against accuracy of the runs that gave an answer; the more frequent source alone.

    Args:
        runs: each once, as :func:`agentkd.evaluate.latest_runs` gives them.
    """
    by_source: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for run in runs:
        if run.answer is not None and not run.stop_reason.is_error and (sure := confidence(run)):
            by_source[sure.source].append((sure.value, run.correct))
    if not by_source:
        return None
    source, pairs = max(by_source.items(), key=lambda item: len(item[1]))
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for value, right in pairs:
        bins[min(BINS - 1, int(value * BINS))].append((value, right))
    gaps = [
        abs(math.fsum(v for v, _ in members) - sum(right for _, right in members))
        for members in bins.values()
    ]
    n = len(pairs)
    return Calibration(
        n=n,
        source=source,
        confidence=math.fsum(value for value, _ in pairs) / n,
        accuracy=sum(right for _, right in pairs) / n,
        ece=math.fsum(gaps) / n,
    )


def measure(trajectories: Iterable[Trajectory], price: Price | None = None) -> Measures:
    """All of them.

    Args:
        trajectories: the runs of one system, each once, as :func:`agentkd.evaluate.latest_runs` gives them.
        price: of its model; without one nothing is said of cost.
    """
    runs = [run for run in trajectories if not run.stop_reason.is_error]
    tasks: dict[str, list[bool]] = defaultdict(list)
    samples: dict[int, list[bool]] = defaultdict(list)
    for run in runs:
        tasks[run.task.id].append(run.correct)
        samples[run.sample].append(run.correct)
    most = max((len(outcomes) for outcomes in tasks.values()), default=0)
    pass_at = {}
    for k in sorted({1, *(2**i for i in range(1, 10) if 2**i <= most), most} - {0}):
        able = [outcomes for outcomes in tasks.values() if len(outcomes) >= k]
        if able:
            pass_at[k] = math.fsum(pass_at_k(len(item), sum(item), k) for item in able) / len(able)
    costs = [price.of(run.usage) for run in runs] if price is not None else []
    return Measures(
        runs=most,
        run_accuracies=tuple(sum(item) / len(item) for _, item in sorted(samples.items())),
        pass_at=pass_at,
        seconds_p95=_percentile([run.seconds for run in runs], 0.95),
        cost_per_task=math.fsum(costs) / len(costs) if costs else None,
        calibration=calibration(runs),
        repairs=counted(name for run in runs for step in run.steps for name in _mended(step)),
    )


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each name is there; most frequent first, equals by name."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _mended(step: Step) -> list[str]:
    """The repairs of every text of a step, each text once: those of the chosen one are the step's own."""
    drawn = (*step.candidates, *(step.route.drafts if step.route else ()))
    return [*step.repairs, *(name for item in drawn if not item.chosen for name in item.repairs)]


def _percentile(values: Sequence[float], share: float) -> float | None:
    """By nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None
