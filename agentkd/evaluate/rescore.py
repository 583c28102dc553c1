"""A run scored again by another scorer, and where two scorers disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from agentkd.errors import AgentkdError, ConfigError, DataError
from agentkd.evaluate.figures import wilson
from agentkd.record import iter_jsonl, load_tasks, read_trajectories, write_jsonl, write_manifest
from agentkd.scorer import SCORERS, Scorer, check_scorers, score
from agentkd.trajectory import Score, Trajectory

__all__ = ["RECORDED", "Agreement", "Disagreement", "Label", "agreement", "rescore", "scores_of"]

RECORDED = "recorded"
"""In place of a scorer's name: the scores that stand in the run."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Label(_Result):
    """One line of a file of labels: what a person says of a trajectory's answer."""

    id: str
    """Of the trajectory."""
    correct: bool


class Disagreement(_Result):
    """One answer that two scorers see differently."""

    id: str
    question: str
    gold: str | None
    answer: str | None
    first: Score
    second: Score


class Agreement(_Result):
    """How far the first scorer agrees with the second."""

    first: str
    second: str
    n: int
    """Answers that both could score."""
    unscored_first: int
    """Answers that the first could not score; they are in no other figure."""
    unscored_second: int
    both: int
    """Correct by both."""
    neither: int
    only_first: int
    """Correct by the first alone: its false positives, if the second is right."""
    only_second: int
    agreement: float | None
    """Share of ``n``; None when it is 0."""
    low: float
    """Of the 95% Wilson interval."""
    high: float
    kappa: float | None
    """Cohen's kappa: agreement beyond chance; None where chance alone would agree always."""
    disagreements: tuple[Disagreement, ...] = ()


def agreement(
    first: str, second: str, runs: Sequence[Trajectory], ours: Sequence[Score], theirs: Sequence[Score]
) -> Agreement:
    """Compare two lists of scores of the same runs."""
    able = [
        (run, a, b)
        for run, a, b in zip(runs, ours, theirs, strict=True)
        if a.value is not None and b.value is not None
    ]
    n = len(able)
    both = sum(a.correct and b.correct for _, a, b in able)
    neither = sum(not a.correct and not b.correct for _, a, b in able)
    only_first = sum(a.correct and not b.correct for _, a, b in able)
    same = both + neither
    low, high = wilson(same, n)
    share_a, share_b = (both + only_first) / max(n, 1), (n - neither - only_first) / max(n, 1)
    chance = share_a * share_b + (1 - share_a) * (1 - share_b)
    return Agreement(
        first=first,
        second=second,
        n=n,
        unscored_first=sum(item.value is None for item in ours),
        unscored_second=sum(item.value is None for item in theirs),
        both=both,
        neither=neither,
        only_first=only_first,
        only_second=n - same - only_first,
        agreement=same / n if n else None,
        low=low,
        high=high,
        kappa=(same / n - chance) / (1 - chance) if n and chance < 1 else None,
        disagreements=tuple(
            Disagreement(
                id=run.id,
                question=run.task.question,
                gold=run.task.answer,
                answer=run.answer,
                first=a,
                second=b,
            )
            for run, a, b in able
            if a.correct != b.correct
        ),
    )


def scores_of(
    runs: Sequence[Trajectory],
    scorer: str | None = None,
    *,
    judge: Scorer | None = None,
    workers: int = 8,
    on_progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Scores of the answers of runs, by a scorer's name (the tasks' own by default).

    A run that ended by an error has no answer and is wrong by every scorer.

    Args:
        runs: trajectories.
        scorer: see :data:`agentkd.scorer.SCORERS`, or "recorded".
        judge: what "judge" asks.
        workers: answers scored at a time.
        on_progress: called with the number done.

    Raises:
        ConfigError: an unknown scorer, or a judge without a model.
    """
    if scorer == RECORDED:
        none = Score(value=None, scorer=RECORDED, reason="the run has no score")
        return [run.score or none for run in runs]
    if scorer == "judge" and judge is None:
        raise ConfigError("A judge needs a model.", "Pass --api-base and --model.")
    tasks = [run.task if scorer is None else run.task.model_copy(update={"scorer": scorer}) for run in runs]
    check_scorers(tasks)

    def one(place: int) -> Score:
        own = judge if tasks[place].scorer == "judge" else None
        return score(tasks[place], runs[place].answer, scorer=own)

    result = []
    with ThreadPoolExecutor(workers) as pool:
        for done, item in enumerate(pool.map(one, range(len(runs))), 1):
            result.append(item)
            if on_progress:
                on_progress(done)
    return result


def rescore(
    source: Path,
    scorer: str | None = None,
    against: str = RECORDED,
    *,
    out: Path | None = None,
    judge: Scorer | None = None,
    workers: int = 8,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Agreement, list[Trajectory]]:
    """Score a run again and compare with other scores; with ``out``, write the run with the new ones.

    Args:
        source: a run folder (one that is still being written is read as far as it is) or a file.
        scorer: by name; the tasks' own by default.
        against: another scorer, "recorded", or a file of labels ``{"id", "correct"}``; only labelled
            answers are compared then.
        out: a folder without a run in it.
        judge, workers, on_progress: see :func:`scores_of`.

    Raises:
        ConfigError: an unknown scorer, or ``out`` is in use.
        DataError: no trajectories, or no label belongs to one.
    """
    path = source / "trajectories.jsonl" if source.is_dir() else source
    if against not in (*SCORERS, RECORDED) and not Path(against).is_file():
        raise ConfigError(
            f"Against what? {against!r} is neither a scorer nor a file.",
            f"Give one of {', '.join([*SCORERS, RECORDED])}, or labels.jsonl.",
        )
    if out is not None and (out / "trajectories.jsonl").exists():
        raise ConfigError(f"{out} holds a run already.", "Choose another --out.")
    runs = read_trajectories(path)
    if not runs:
        raise DataError(f"{path} has no trajectories.", "Run agentkd collect or evaluate first.")
    ours = scores_of(runs, scorer, judge=judge, workers=workers, on_progress=on_progress)
    new = [run.model_copy(update={"score": item}) for run, item in zip(runs, ours, strict=True)]
    if out is not None:
        _write(path, out, new, scorer)
    if against in (*SCORERS, RECORDED):
        theirs = scores_of(runs, against, judge=judge, workers=workers)
        return agreement(scorer or "own", against, runs, ours, theirs), new
    labelled = _labelled(Path(against), runs)
    return agreement(
        scorer or "own",
        against,
        [runs[i] for i in labelled],
        [ours[i] for i in labelled],
        list(labelled.values()),
    ), new


def _labelled(path: Path, runs: Iterable[Trajectory]) -> dict[int, Score]:
    labels = {item.id: item.correct for item in iter_jsonl(path, Label)}
    found = {
        place: Score(value=float(labels[run.id]), scorer="label")
        for place, run in enumerate(runs)
        if run.id in labels
    }
    if not found:
        raise DataError(f"No label of {path} belongs to a trajectory.", 'Write {"id", "correct"} a line.')
    return found


def _write(path: Path, out: Path, runs: Sequence[Trajectory], scorer: str | None) -> None:
    write_jsonl(out / "trajectories.jsonl", runs)
    outputs = [out / "trajectories.jsonl"]
    try:
        tasks = load_tasks(path.with_name("tasks.jsonl"))
    except AgentkdError:
        tasks = []
    if tasks:
        write_jsonl(out / "tasks.jsonl", tasks)
        outputs.append(out / "tasks.jsonl")
    counts = {"n": len(runs), "correct": sum(run.correct for run in runs)}
    write_manifest(
        out, stage="score", config={"scorer": scorer}, counts=counts, inputs=[path], outputs=outputs
    )
