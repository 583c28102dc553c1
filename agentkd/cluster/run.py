"""The driver of a run on Ray; what each node does is in :mod:`.shard`."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentkd.cluster.shard import INPUTS, Outcome, fetch_tries, is_url, run_shard
from agentkd.cluster.store import Store
from agentkd.collect import CollectConfig, count_faults, price_table
from agentkd.collect.folder import check_inputs
from agentkd.errors import AgentkdError, ConfigError, DataError, ProviderError, boundary
from agentkd.first_thought import FOLDER
from agentkd.merge import merge_runs
from agentkd.record import read_json, write_json, write_jsonl
from agentkd.retrieval.source import open_corpus
from agentkd.rollouts import count_past
from agentkd.spend import Ledger, Price, Spent
from agentkd.taskset import load_taskset

__all__ = ["ClusterConfig", "Clustered", "collect_on_ray"]

_LOG = "trajectories.jsonl"


class ClusterConfig(BaseModel):
    """How a run is spread over a cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: int = Field(default=16, ge=1)
    """Parts of the taskset; what a node loss repeats is a part of one."""
    address: str | None = None
    """Of the cluster ("auto", "ray://HOST:10001"); None starts Ray on this machine, or takes the one
    that is connected."""
    cpus: float = Field(default=1.0, gt=0)
    """Cores that one shard is given; it has ``workers`` rollouts in flight on them."""
    copy_seconds: float = Field(default=10.0, gt=0)
    """Seconds between two copies of a shard to the store: what a lost node can cost."""
    restarts: int = Field(default=5, ge=0)
    """Times that a shard is started again because its node was lost."""


class Clustered(NamedTuple):
    """What a run on a cluster left."""

    folder: Path
    trajectories: int
    correct: int
    missing: int
    """Tasks without a trajectory; the same command goes on with them."""
    duplicates: int
    """Trajectories that stood there twice: two tries of a shard had both finished them, or ``out``
    had them from an earlier start."""
    problems: tuple[str, ...]
    """Shards that did not end well, and why."""
    stopped: tuple[str, ...] = ()
    """Shards that came to the end of their part of a limit, and which."""
    spent: Spent = Spent()
    """By all shards over all starts, as far as the store has their logs."""
    unpriced: tuple[str, ...] = ()
    """Models without a price: they cost ``spent.seconds`` and are not in ``spent.cost``."""
    faults: dict[str, int] = {}
    """Failed calls of endpoints, by what they were."""


def collect_on_ray(
    config: CollectConfig,
    out: Path,
    store: str | None = None,
    cluster: ClusterConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Clustered:
    """Collect on a Ray cluster; goes on where an earlier run of the same ``store`` stopped.

    Args:
        config: of the run. Its endpoint must be reachable from every node.
        out: folder on this machine for the merged run.
        store: what fsspec takes, reachable from every node; ``out/store`` by default, which must
            then lie on a file system that the nodes share. The merged run is copied there too.
        cluster: how it is spread.
        on_progress: called with the number of shards that have ended, and of all.

    Raises:
        ConfigError: no endpoint, a limit that cannot be kept or divided, Ray is not installed or not
            reachable, or ``out`` or the store holds another run.
        ProviderError: no shard finished anything because the endpoint failed.
        StorageError: the store cannot be read or written.
    """
    cluster = cluster or ClusterConfig()
    prices = price_table(config)
    if config.shard is not None:
        raise ConfigError("--shard and --engine ray exclude each other.", "Leave --shard out.")
    if config.budget.max_tokens is not None and config.budget.max_tokens < cluster.shards:
        raise ConfigError(
            f"--max-tokens {config.budget.max_tokens} cannot be divided among {cluster.shards} shards.",
            "Each gets its part of the limit: raise it, or use fewer --shards.",
        )
    check_inputs(config, out)  # it may hold another run
    url = store or str((out / "store").resolve())
    place = Store(url)
    _prepare(config, place, cluster)
    with _ray(cluster) as ray:
        outcomes = _run(ray, config, url, cluster, on_progress)
    return _gather(config, place, out, outcomes)._replace(**_bill(config, prices, out))


def _bill(config: CollectConfig, prices: dict[str, Price], out: Path) -> dict[str, Any]:
    """What the merged logs say that the run has cost."""
    ledger = Ledger(prices=prices)
    for folder in (out, out / FOLDER):
        count_past(folder, ledger)
    unpriced = sorted({teacher.model for teacher in config.everyone()} - set(prices))
    return {"spent": ledger.spent(), "unpriced": tuple(unpriced), "faults": count_faults(out)}


def _prepare(config: CollectConfig, place: Store, cluster: ClusterConfig) -> None:
    """Put the inputs into the store, so that no node needs the files or packages they come from."""
    taskset = load_taskset(config.tasks, config.split, config.n, config.seed)
    if not taskset.tasks:
        raise DataError(f"The taskset {config.tasks!r} has no tasks.", "Check --tasks, --split and --n.")
    corpus = open_corpus(config.corpus, taskset.passages)
    if config.corpus is not None and not corpus.passages and not is_url(config.corpus):
        raise ConfigError(
            f"The index {config.corpus} is not on the nodes of the cluster.",
            "Give its passages (.jsonl), or serve it by `agentkd retriever` and give the URL.",
        )
    settings = {"shards": cluster.shards, "collect": _lasting(config)}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_jsonl(scratch / "tasks.jsonl", taskset.tasks)
        write_jsonl(scratch / "passages.jsonl", corpus.passages)
        write_json(scratch / "cluster.json", settings)
        present = place.files("")
        if "cluster.json" in present:
            for name in ("cluster.json", *INPUTS):
                place.get(name, scratch / "theirs" / name)
                if (scratch / "theirs" / name).read_bytes() != (scratch / name).read_bytes():
                    raise ConfigError(
                        f"{place.url} holds a run with other settings ({name} differs).",
                        "Choose another --store, or give the settings of that run.",
                    )
            return
        for name in (*INPUTS, "cluster.json"):
            place.put(scratch / name, name)


def _lasting(config: CollectConfig) -> dict[str, Any]:
    """What a run must go on with: not where the model is served, nor how fast it is asked."""
    return {**config.lasting(), "samples": config.samples}


@contextmanager
def _ray(cluster: ClusterConfig) -> Iterator[Any]:
    with boundary(ConfigError, "importing ray", "Install it by: pip install 'agentkd[ray]'."):
        import ray
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unasked
    with boundary(ConfigError, "connecting to Ray", "Is the cluster up? See --ray-address."):
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        yield ray
    finally:
        ray.shutdown()


def _run(
    ray: Any,
    config: CollectConfig,
    url: str,
    cluster: ClusterConfig,
    on_progress: Callable[[int, int], None] | None,
) -> list[Outcome]:
    remote = ray.remote(num_cpus=cluster.cpus, max_retries=cluster.restarts)(run_shard)
    at_once = _at_once(ray, cluster)
    shared = _shared(config, at_once)
    # Where limits a minute are divided, no more shards may begin than they were divided for.
    most = at_once if _has_rates(config) else cluster.shards
    until = time.time() + 3600 * config.budget.max_hours if config.budget.max_hours else None
    todo = deque(range(1, cluster.shards + 1))
    numbers: dict[Any, int] = {}
    outcomes: list[Outcome] = []
    waiting: list[Any] = []
    while todo or waiting:
        while todo and len(waiting) < most:
            number = todo.popleft()
            waiting.append(remote.remote(shared, url, number, cluster.shards, cluster.copy_seconds, until))
            numbers[waiting[-1]] = number
        if on_progress:
            on_progress(len(outcomes), cluster.shards)
        ready, waiting = ray.wait(waiting, timeout=1.0)
        for reference in ready:
            try:
                outcomes.append(ray.get(reference))
            except ray.exceptions.RayError as exc:
                reason = f"{type(exc).__name__}: {str(exc).strip().splitlines()[-1]}"
                outcomes.append(Outcome(numbers[reference], 0, reason, AgentkdError.exit_code))
    if on_progress:
        on_progress(len(outcomes), cluster.shards)
    return outcomes


def _at_once(ray: Any, cluster: ClusterConfig) -> int:
    """Shards that the cluster has cores for now."""
    cores = float(ray.cluster_resources().get("CPU", 0.0))
    return max(1, min(cluster.shards, int(cores // cluster.cpus)))


def _has_rates(config: CollectConfig) -> bool:
    gates = [teacher.gate for teacher in config.everyone()]
    return any(gate.requests_per_minute or gate.tokens_per_minute for gate in gates)


def _shared(config: CollectConfig, count: int) -> CollectConfig:
    """The settings of one of ``count`` shards that ask the same endpoints at a time."""
    teachers = tuple(
        teacher.model_copy(update={"gate": teacher.gate.share(count)}) for teacher in config.teachers
    )
    return config.model_copy(update={"gate": config.gate.share(count), "teachers": teachers})


def _gather(config: CollectConfig, place: Store, out: Path, outcomes: list[Outcome]) -> Clustered:
    """Merge all tries of all shards into ``out``, and copy the result to the store."""
    ordered = sorted(outcomes, key=lambda item: item.number)
    problems = tuple(f"shard {item.number}: {item.problem}" for item in ordered if item.problem)
    stopped = tuple(f"shard {item.number}: {item.stopped}" for item in ordered if item.stopped)
    with tempfile.TemporaryDirectory(prefix="agentkd-merge-") as folder:
        scratch = Path(folder)
        runs = fetch_tries(place, scratch)
        if not any((run / _LOG).is_file() for run in runs):
            _give_up(outcomes, problems or stopped)
        for name in INPUTS:
            place.get(name, runs[0] / name)
        for run in runs:
            (run / _LOG).touch()  # of one that had chains of thought only
            _restore_settings(run / "config.json", config)
        if (out / _LOG).is_file():  # of an earlier start, and perhaps gone on with on this machine
            runs.append(out)
        merged = merge_runs(runs, scratch / "merged")
        _publish(scratch / "merged", place, out)
    return Clustered(
        out,
        merged.trajectories,
        merged.correct,
        merged.missing_tasks,
        merged.duplicates,
        problems,
        stopped,
    )


def _publish(merged: Path, place: Store, out: Path) -> None:
    """Put the merged run into ``out`` and into the store, and take away what an earlier one left there."""
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == "manifest.json"):  # it closes the run
        _install(merged / name, out / name)
        place.put(merged / name, f"merged/{name}")
    single = {"errors.jsonl", "passages.jsonl", f"{FOLDER}/errors.jsonl"}
    logs = {
        path.relative_to(out).as_posix()
        for folder in (out, out / FOLDER)
        for pattern in ("calls-*.jsonl", "faults-*.jsonl")
        for path in folder.glob(pattern)
    }
    for name in (single | logs) - set(names):
        (out / name).unlink(missing_ok=True)
        place.remove(f"merged/{name}")


def _give_up(outcomes: list[Outcome], reasons: tuple[str, ...]) -> None:
    codes = {item.exit_code for item in outcomes if item.problem}
    error = ProviderError if codes == {ProviderError.exit_code} else AgentkdError
    raise error(
        f"No shard finished anything; {reasons[0] if reasons else 'none was begun'}",
        "Mend that, then run the same command again.",
    )


def _restore_settings(path: Path, config: CollectConfig) -> None:
    """Say where the tasks came from: the nodes only knew a copy of them."""
    if path.is_file():
        asked = config.model_dump(mode="json", include={"tasks", "split", "n", "seed", "corpus"})
        settings = read_json(path)
        write_json(path, {**settings, **{key: asked[key] for key in asked if key in settings}})


def _install(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(source.read_bytes())
    partial.replace(target)
