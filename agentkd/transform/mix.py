"""Mixers: which trajectories, how often, in which order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from agentkd.errors import ConfigError, DataError
from agentkd.trajectory import Trajectory
from agentkd.transform.means import Means, changed

__all__ = ["GapSettings", "SuccessGap", "Temperature", "TemperatureSettings", "gap_shares"]


class GapSettings(BaseModel):
    """Settings of :class:`SuccessGap`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    smoothing: float = Field(default=0.3, ge=0, le=1)
    """Share of the mix that keeps the families as they were."""
    n: int | None = Field(default=None, ge=1)
    """Trajectories of the mix; as many as there are by default."""
    seed: int = 0
    """Of the draw."""


def gap_shares(gaps: dict[str, float], counts: dict[str, int], smoothing: float) -> dict[str, float]:
    """The share of each family in the mix.

    ``p_f = (1 - a) gap_f / sum(gap) + a n_f / sum(n)``, ``gap_f`` the teacher's success rate minus the
    student's, at least 0; where there is no gap at all, the mix stays as it was.

    Args:
        gaps: by family; a family without one has none.
        counts: trajectories of each family.
        smoothing: ``a``.
    """
    positive = {name: max(0.0, gaps.get(name, 0.0)) for name in counts}
    whole, n = sum(positive.values()), sum(counts.values())
    if not whole:
        return {name: count / n for name, count in counts.items()}
    return {
        name: (1 - smoothing) * positive[name] / whole + smoothing * count / n
        for name, count in counts.items()
    }


class SuccessGap:
    """More of what the student is behind in (after DDK, arXiv 2407.16154).

    DDK samples domains by the ratio of the student's loss to the teacher's, smoothed against the mix before.
    Agents have a more direct measure: the success rate of both on the same families, from two sets of
    trajectories (evaluations, or the collection for the teacher). A family that needs more than it has is
    repeated whole and then drawn from; copies get ids of their own.
    """

    name = "success-gap"

    def __init__(self, settings: GapSettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        if not means.teacher_runs or not means.student_runs:
            raise ConfigError(
                "The gap is that between two runs.", "Name both: --teacher-runs and --student-runs."
            )
        teacher, student = _rates(means.teacher_runs), _rates(means.student_runs)
        families: dict[str, list[Trajectory]] = {}
        for item in trajectories:
            families.setdefault(item.task.family, []).append(item)
        common = teacher.keys() & student.keys() & families.keys()
        if not common:
            raise DataError(
                "No family of these trajectories is in both runs.",
                "Evaluate both on the families to be mixed.",
            )
        gaps = {name: teacher[name] - student[name] for name in common}
        counts = {name: len(items) for name, items in families.items()}
        shares = gap_shares(gaps, counts, self.settings.smoothing)
        wanted = _whole_numbers(shares, self.settings.n or len(trajectories))
        return [
            self._copy(
                item, time, f"{name}: gap {gaps.get(name, 0.0):+.2f}, {counts[name]} -> {wanted[name]}"
            )
            for name, items in families.items()
            for item, time in self._draw(items, wanted[name], name)
        ]

    def _draw(self, items: list[Trajectory], count: int, name: str) -> list[tuple[Trajectory, int]]:
        whole, rest = divmod(count, len(items))
        places = random.Random(f"{self.settings.seed}:{name}").sample(range(len(items)), rest)
        drawn = [(item, time) for time in range(whole) for item in items]
        return drawn + [(items[place], whole) for place in sorted(places)]

    def _copy(self, item: Trajectory, time: int, note: str) -> Trajectory:
        return changed(self, item, note, id=f"{item.id}~{time + 1}" if time else item.id)


def _rates(runs: Sequence[Trajectory]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for item in runs:
        if not item.stop_reason.is_error:
            right.setdefault(item.task.family, []).append(item.correct)
    return {name: sum(them) / len(them) for name, them in right.items()}


def _whole_numbers(shares: dict[str, float], n: int) -> dict[str, int]:
    """Largest remainders: they add up to ``n``."""
    numbers = {name: int(share * n) for name, share in shares.items()}
    order = sorted(shares, key=lambda name: (numbers[name] - shares[name] * n, name))
    for name in order[: n - sum(numbers.values())]:
        numbers[name] += 1
    return numbers


class TemperatureSettings(BaseModel):
    """Settings of :class:`Temperature`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    """Of the order among those of one temperature."""


class Temperature:
    """What was sampled at low temperature first (temperature-scheduled learning of DASD, arXiv 2601.09088).

    Easy, typical trajectories come before diverse ones. Train on the file with ``order = "file"``
    (``--order file``), or it is shuffled again.
    """

    name = "temperature"

    def __init__(self, settings: TemperatureSettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        known = {item.id: _temperature(item) for item in trajectories}
        missing = [name for name, temperature in known.items() if temperature is None]
        if missing:
            raise DataError(
                f"{len(missing)} trajectories ({missing[0]}, ...) do not say their temperature.",
                "Collect them with agentkd collect --temperatures.",
            )
        order = list(trajectories)
        random.Random(self.settings.seed).shuffle(order)
        order.sort(key=lambda item: known[item.id] or 0.0)
        counts = Counter(known[item.id] or 0.0 for item in order)
        note = ", ".join(f"{count} at {temperature:g}" for temperature, count in sorted(counts.items()))
        return [changed(self, item, note) for item in order]


def _temperature(item: Trajectory) -> float | None:
    found = item.config.get("temperature")
    return float(found) if isinstance(found, (int, float)) else None
