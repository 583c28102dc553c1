"""Merging run folders: their settings, tasks and passages, and what the other modules merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agentkd.errors import ConfigError, DataError
from agentkd.merge.logs import merge_calls, merge_faults, plan_calls
from agentkd.merge.thoughts import given_alike, merge_first_thoughts
from agentkd.merge.trajectories import LOG, copy_lines, find_trajectories, open_errors
from agentkd.record import iter_jsonl, read_json, write_json, write_jsonl, write_manifest
from agentkd.retrieval import Passage
from agentkd.shard import Shard
from agentkd.task import Task

__all__ = ["Merged", "merge_runs"]

R = TypeVar("R", Task, Passage)


class Merged(NamedTuple):
    """What a merge left."""

    trajectories: int
    correct: int
    duplicates: int
    """Trajectories that stood in a run before; the first one is kept."""
    missing_shards: tuple[str, ...]
    """Shards of which no run was given, as in "3/8"."""
    missing_tasks: int
    """Tasks without a trajectory."""
    logged: int
    """Calls and marks in the merged log; without any, the result cannot be replayed and its bill
    begins at nothing."""


def merge_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    any_settings: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Merged:
    """Merge runs into the folder ``out``, which must not hold a run.

    Trajectories are ordered by task and sample, so the order of the runs does not matter unless two
    of them hold the same trajectory. Logs and first thoughts go along, see :mod:`agentkd.merge.logs`.
    Several passes over the files; memory holds ids and places only.

    Args:
        runs: run folders, at least one.
        out: a folder.
        any_settings: merge runs that were made with different settings all the same.
        on_progress: called with the number of trajectories seen.

    Raises:
        ConfigError: the runs were made with different settings or gave first thoughts in different
            ways, or ``out`` is in use.
        DataError: a run is missing or malformed, or two runs have different tasks under one id.
        StorageError: ``out`` cannot be written.
    """
    _check(runs, out)
    settings = _settings(runs, any_settings)
    thoughts = given_alike(runs, any_settings) and settings is not None
    tasks = _union(runs, "tasks.jsonl", Task)
    passages = _union(runs, "passages.jsonl", Passage)
    order = {task.id: number for number, task in enumerate(tasks)}
    found = find_trajectories(runs, order, on_progress=on_progress)
    plan = plan_calls(runs, found.folders())
    if settings is not None:
        write_json(out / "config.json", settings)
    _write_corpus(runs, passages, out)
    write_jsonl(out / "tasks.jsonl", tasks)
    logged = merge_calls(runs, plan, out)
    merge_faults(runs, out)
    if thoughts:
        merge_first_thoughts(runs, out, order, found)
    copy_lines(found, out / LOG)  # after what belongs to it, because it makes the folder a run
    if errors := list(open_errors(runs, found)):
        write_jsonl(out / "errors.jsonl", errors)
    missing = order.keys() - {name.rpartition("#")[0] for name in found.places}
    counts = len(found.places), found.correct, found.duplicates
    merged = Merged(*counts, _missing_shards(runs), len(missing), logged)
    write_manifest(
        out,
        stage="merge",
        config={"runs": [str(run) for run in runs], "any_settings": any_settings, "collect": settings},
        counts=merged._asdict(),
        inputs=[run / LOG for run in runs],
        outputs=[out / "tasks.jsonl", out / LOG],
    )
    return merged


def _check(runs: Sequence[Path], out: Path) -> None:
    if (out / LOG).exists():
        raise ConfigError(f"{out} holds a run already.", "Choose another --out.")
    for run in runs:
        if not (run / LOG).is_file():
            raise DataError(f"{run} is not a run: it has no {LOG}.", "Give folders that collect has written.")


def _write_corpus(runs: Sequence[Path], passages: Sequence[Passage], out: Path) -> None:
    """What was searched: the passages, and where it is one and the same, which corpus that was."""
    if passages:
        write_jsonl(out / "passages.jsonl", passages)
    paths = [run / "corpus.json" for run in runs]
    stored = [read_json(path) for path in paths if path.is_file()]
    if len(stored) == len(runs) and len({corpus["identity"] for corpus in stored}) == 1:
        write_json(out / "corpus.json", stored[0])


def _settings(runs: Sequence[Path], any_settings: bool) -> dict[str, Any] | None:
    """The settings of the runs, without the shard; None where there are none, or several."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for run in runs:
        path = run / "config.json"
        settings = read_json(path) if path.is_file() else {}
        found.append((run, {key: value for key, value in settings.items() if key != "shard"}))
    first, mine = found[0]
    for other, theirs in found[1:]:
        if theirs == mine:
            continue
        if any_settings:
            return None
        keys = sorted(_different(mine, theirs))
        raise ConfigError(
            f"{first} and {other} were made with different settings ({', '.join(keys)}).",
            "Merge them all the same with --any-settings.",
        )
    return mine or None


def _different(mine: dict[str, Any], theirs: dict[str, Any], before: str = "") -> Iterator[str]:
    for key in mine.keys() | theirs.keys():
        left, right = mine.get(key), theirs.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _different(left, right, f"{before}{key}.")
        elif left != right:
            yield before + key


def _union(runs: Sequence[Path], name: str, model: type[R]) -> list[R]:
    """The records of all runs, each id once, in order of appearance."""
    found: dict[str, R] = {}
    for run in runs:
        path = run / name
        for record in iter_jsonl(path, model) if path.is_file() else ():
            if found.setdefault(record.id, record) != record:
                raise DataError(
                    f"{path}: {record.id!r} is another {model.__name__.lower()} than in a run before.",
                    "Runs with other tasks under the same ids cannot be merged.",
                )
    return list(found.values())


def _missing_shards(runs: Sequence[Path]) -> tuple[str, ...]:
    given: set[Shard] = set()
    for run in runs:
        path = run / "config.json"
        text = read_json(path).get("shard") if path.is_file() else None
        if text is None:
            return ()  # a whole run: its tasks tell what is missing
        given.add(Shard.parse(text))
    counts = {shard.of for shard in given}
    if len(counts) != 1:
        return ()
    (of,) = counts
    return tuple(str(Shard(number, of)) for number in range(1, of + 1) if Shard(number, of) not in given)
