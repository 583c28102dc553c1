"""The logs of merged runs: what each rollout has behind it, and what all of it has cost.

A rollout can be gone on with, or replayed, only by the calls of one run, so those of a finished one
are taken from the run that its trajectory is from, and those of an unfinished one from the run that
came farthest. What other runs were answered for it is void, but was paid: it stays in the bill.
What stands in several logs word for word, as in the copies of a shard, is one call.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from agentkd.calls import VOID, Call, call_log, iter_calls
from agentkd.crew import FaultNote, iter_faults
from agentkd.record import write_jsonl

__all__ = ["CallPlan", "merge_calls", "merge_faults", "plan_calls"]

_NOBODY = -1


class CallPlan(NamedTuple):
    """Whose calls go into the merged log."""

    source: dict[str, int]
    """Number of the folder whose calls of a rollout hold, by the rollout's id; -1 where none do."""
    shared: frozenset[str]
    """Rollouts that stand in the logs of several folders."""


def plan_calls(folders: Sequence[Path], taken: Mapping[str, Path]) -> CallPlan:
    """Choose for each rollout the folder whose calls are taken.

    Args:
        folders: of the runs.
        taken: which of them each finished trajectory is from, by its id.

    Raises:
        DataError: a line of a log is no call (it is named).
    """
    best: dict[str, tuple[tuple[bool, int, int], int]] = {}
    shared: set[str] = set()
    for number, folder in enumerate(folders):
        reached: dict[str, tuple[int, int]] = {}
        for call in iter_calls(folder):
            restart, count = reached.setdefault(call.rollout, (0, 0))
            if call.restart >= restart:
                reached[call.rollout] = call.restart, count + 1 if call.restart == restart else 1
        shared |= reached.keys() & best.keys()
        for rollout, far in reached.items():
            mine = taken.get(rollout, folder) == folder
            if rollout not in best or (mine, *far) > best[rollout][0]:
                best[rollout] = (mine, *far), number if mine else _NOBODY
    return CallPlan({rollout: number for rollout, (_, number) in best.items()}, frozenset(shared))


def merge_calls(folders: Sequence[Path], plan: CallPlan, out: Path) -> int:
    """Write the merged log, where there is one; returns how many calls and marks it has."""
    return write_jsonl(call_log(out, 0), _merged(folders, plan)) if plan.source else 0


def _merged(folders: Sequence[Path], plan: CallPlan) -> Iterator[Call]:
    paid: set[bytes] = set()
    for number, folder in enumerate(folders):
        for call in iter_calls(folder):
            if plan.source[call.rollout] == number:
                if call.kind == "model" and call.rollout in plan.shared:
                    paid.add(_identity(call))
                yield call
    for number, folder in enumerate(folders):
        for call in iter_calls(folder):
            if plan.source[call.rollout] != number and call.kind == "model" and _identity(call) not in paid:
                paid.add(_identity(call))
                yield call.model_copy(update={"restart": VOID})


def _identity(call: Call) -> bytes:
    """Two calls that agree in everything, times included, are one."""
    line = call.model_copy(update={"restart": 0}).model_dump_json()
    return hashlib.blake2b(line.encode("utf-8"), digest_size=16).digest()


def merge_faults(folders: Sequence[Path], out: Path) -> None:
    """Write the failed calls of all runs; those that several runs have word for word are the same."""
    merged: Counter[str] = Counter()
    for folder in folders:
        merged |= Counter(note.model_dump_json() for note in iter_faults(folder))
    if merged:
        lines = sorted(merged.elements())  # each begins with its time
        write_jsonl(out / "faults-0.jsonl", map(FaultNote.model_validate_json, lines))
