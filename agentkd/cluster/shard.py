"""What a node does: one shard of the run, and where its tries lie in the store."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from agentkd.cluster.store import Mirror, Store
from agentkd.collect import CollectConfig, collect
from agentkd.errors import AgentkdError
from agentkd.first_thought import FOLDER
from agentkd.record import load_tasks
from agentkd.shard import Shard
from agentkd.spend import Budget

__all__ = ["INPUTS", "Outcome", "fetch_tries", "is_url", "run_shard"]

INPUTS = ("tasks.jsonl", "passages.jsonl")
_LOG = "trajectories.jsonl"


class Outcome(NamedTuple):
    """How a shard ended."""

    number: int
    missing: int
    """Rollouts that ended by errors."""
    problem: str | None
    exit_code: int = 0
    stopped: str | None = None
    """The limit of whose part nothing is left, in words."""


def run_shard(
    config: CollectConfig, url: str, number: int, of: int, copy_seconds: float, until: float | None = None
) -> Outcome:
    """Collect one shard on this node, going on from the best copy of it in the store.

    Every try has a folder of its own in the store, so that a node that was given up but still
    writes does no harm; the merge takes each trajectory once.

    Args:
        config: of the whole run; the shard gets as much of its budget as it has of the tasks.
        url: of the store.
        number: of the shard, from 1.
        of: shards.
        copy_seconds: between two copies to the store.
        until: end of ``--max-hours`` as seconds since 1970, by clocks that the nodes agree on.
    """
    place = Store(url)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="agentkd-shard-") as scratch:
        os.chdir(scratch)  # the settings of a shard then name no place of this node
        try:
            run = Path("run")
            for name in INPUTS:
                place.get(name, Path(name))
            tasks = load_tasks(Path("tasks.jsonl"))
            part = Shard(number, of).take(tasks)
            if not part:
                return Outcome(number, 0, None)
            budget = _part(config.budget, len(part) / len(tasks), until)
            if budget is None:
                return Outcome(number, 0, None, stopped=_whole(config.budget, "--max-hours"))
            for name in _best_try(place, number):
                place.get(name, run / _in_try(name))
            mine = f"{_folder(number)}/{uuid.uuid4().hex}"
            with Mirror(run, place, mine, copy_seconds, leave=INPUTS):
                done = collect(_local(config, f"{number}/{of}", budget), run)
            stopped = _whole(config.budget, done.stopped) if done.stopped else None
            return Outcome(number, done.missing, None, stopped=stopped)
        except AgentkdError as exc:
            return Outcome(number, 0, str(exc), exc.exit_code)
        finally:
            os.chdir(before)


def _part(budget: Budget, share: float, until: float | None) -> Budget | None:
    """What a shard may spend; None when the time is over."""
    if until is None:
        return budget.part(share)
    hours = (until - time.time()) / 3600
    return budget.part(share).model_copy(update={"max_hours": hours}) if hours > 0 else None


def _whole(budget: Budget, limit: str) -> str:
    """A limit that a shard has reached, with the value that was asked for."""
    option = limit.split()[0]
    return f"{option} {getattr(budget, option.removeprefix('--').replace('-', '_'))}"


def _local(config: CollectConfig, shard: str, budget: Budget) -> CollectConfig:
    corpus: str | Path | None = Path("passages.jsonl") if Path("passages.jsonl").stat().st_size else None
    if corpus is None and config.corpus is not None and is_url(config.corpus):
        corpus = config.corpus
    inputs = {"tasks": "tasks.jsonl", "split": "all", "n": None, "seed": 0, "corpus": corpus}
    return config.model_copy(update={**inputs, "shard": shard, "budget": budget})


def _folder(number: int) -> str:
    return f"shards/{number:05d}"


def _tries(place: Store, folder: str) -> dict[str, dict[str, int]]:
    """The files of each try of a shard, with their sizes."""
    tries: dict[str, dict[str, int]] = {}
    for name, size in place.files(folder).items():
        tries.setdefault(name.removesuffix(_in_try(name)).rstrip("/"), {})[name] = size
    return tries


def _in_try(name: str) -> str:
    """The path of a file below the folder of its try, ``shards/NUMBER/TRY``."""
    return "/".join(name.split("/")[3:])


def _best_try(place: Store, number: int) -> list[str]:
    """The files of the try that had finished most, or else had asked most."""
    tries = _tries(place, _folder(number))

    def done(name: str) -> tuple[int, int]:
        return tries[name].get(f"{name}/{_LOG}", 0), sum(tries[name].values())

    best = max(tries, key=done, default=None)
    return list(tries[best]) if best else []


def fetch_tries(place: Store, scratch: Path) -> list[Path]:
    """Copies of all tries that have finished something, if only chains of thought, one folder each."""
    runs = []
    for number, (name, files) in enumerate(_tries(place, "shards").items()):
        if files.keys() & {f"{name}/{_LOG}", f"{name}/{FOLDER}/{_LOG}"}:
            runs.append(scratch / str(number))
            for file in files:
                place.get(file, runs[-1] / _in_try(file))
    return runs


def is_url(source: str | Path) -> bool:
    """Whether a corpus is served, so that every node can reach it."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))
