"""The driver of a run on Ray, and what each node does."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentkd.cluster.store import Mirror, Store
from agentkd.collect import CollectConfig, collect
from agentkd.errors import AgentkdError, ConfigError, DataError, ProviderError, boundary
from agentkd.merge import merge_runs
from agentkd.record import load_tasks, read_json, write_json, write_jsonl
from agentkd.retrieval.source import open_corpus
from agentkd.shard import Shard
from agentkd.taskset import load_taskset

__all__ = ["ClusterConfig", "Clustered", "collect_on_ray"]

_INPUTS = ("tasks.jsonl", "passages.jsonl")
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
    """Trajectories that two tries of a shard had both finished."""
    problems: tuple[str, ...]
    """Shards that did not end well, and why."""


class _Outcome(NamedTuple):
    """How a shard ended."""

    number: int
    missing: int
    """Rollouts that ended by errors."""
    problem: str | None
    exit_code: int = 0


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
        ConfigError: no endpoint, Ray is not installed or not reachable, or the store holds another run.
        ProviderError: no shard finished anything because the endpoint failed.
        StorageError: the store cannot be read or written.
    """
    cluster = cluster or ClusterConfig()
    if config.agent.api_base is None:
        raise ConfigError("No endpoint was given.", "Pass --api-base http://HOST:PORT/v1.")
    if config.shard is not None:
        raise ConfigError("--shard and --engine ray exclude each other.", "Leave --shard out.")
    url = store or str((out / "store").resolve())
    place = Store(url)
    _prepare(config, place, cluster)
    with _ray(cluster) as ray:
        outcomes = _run(ray, config, url, cluster, on_progress)
    return _gather(config, place, out, outcomes)


def _prepare(config: CollectConfig, place: Store, cluster: ClusterConfig) -> None:
    """Put the inputs into the store, so that no node needs the files or packages they come from."""
    taskset = load_taskset(config.tasks, config.split, config.n, config.seed)
    if not taskset.tasks:
        raise DataError(f"The taskset {config.tasks!r} has no tasks.", "Check --tasks, --split and --n.")
    corpus = open_corpus(config.corpus, taskset.passages)
    if config.corpus is not None and not corpus.passages and not _is_url(config.corpus):
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
            for name in ("cluster.json", *_INPUTS):
                place.get(name, scratch / "theirs" / name)
                if (scratch / "theirs" / name).read_bytes() != (scratch / name).read_bytes():
                    raise ConfigError(
                        f"{place.url} holds a run with other settings ({name} differs).",
                        "Choose another --store, or give the settings of that run.",
                    )
            return
        for name in (*_INPUTS, "cluster.json"):
            place.put(scratch / name, name)


def _is_url(source: str | Path) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _lasting(config: CollectConfig) -> dict[str, Any]:
    """What a run must go on with: not where the model is served, nor how fast it is asked."""
    agent = config.agent.model_dump(mode="json", exclude={"api_base", "timeout"})
    return {"agent": agent, "samples": config.samples, "labels": config.labels}


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
) -> list[_Outcome]:
    remote = ray.remote(num_cpus=cluster.cpus, max_retries=cluster.restarts)(run_shard)
    numbers = {
        remote.remote(config, url, number, cluster.shards, cluster.copy_seconds): number
        for number in range(1, cluster.shards + 1)
    }
    outcomes: list[_Outcome] = []
    waiting = list(numbers)
    while waiting:
        if on_progress:
            on_progress(len(outcomes), len(numbers))
        ready, waiting = ray.wait(waiting, timeout=1.0)
        for reference in ready:
            try:
                outcomes.append(ray.get(reference))
            except ray.exceptions.RayError as exc:
                reason = f"{type(exc).__name__}: {str(exc).strip().splitlines()[-1]}"
                outcomes.append(_Outcome(numbers[reference], 0, reason, AgentkdError.exit_code))
    if on_progress:
        on_progress(len(outcomes), len(numbers))
    return outcomes


def run_shard(config: CollectConfig, url: str, number: int, of: int, copy_seconds: float) -> _Outcome:
    """Collect one shard on this node, going on from the best copy of it in the store.

    Every try has a folder of its own in the store, so that a node that was given up but still
    writes does no harm; the merge takes each trajectory once.
    """
    place = Store(url)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="agentkd-shard-") as scratch:
        os.chdir(scratch)  # the settings of a shard then name no place of this node
        try:
            run = Path("run")
            for name in _INPUTS:
                place.get(name, Path(name))
            if not Shard(number, of).take(load_tasks(Path("tasks.jsonl"))):
                return _Outcome(number, 0, None)
            for name in _best_try(place, number):
                place.get(name, run / Path(name).name)
            mine = f"{_folder(number)}/{uuid.uuid4().hex}"
            with Mirror(run, place, mine, copy_seconds, leave=_INPUTS):
                done = collect(_local(config, f"{number}/{of}"), run)
            return _Outcome(number, done.missing, None)
        except AgentkdError as exc:
            return _Outcome(number, 0, str(exc), exc.exit_code)
        finally:
            os.chdir(before)


def _local(config: CollectConfig, shard: str) -> CollectConfig:
    corpus: str | Path | None = Path("passages.jsonl") if Path("passages.jsonl").stat().st_size else None
    if corpus is None and config.corpus is not None and _is_url(config.corpus):
        corpus = config.corpus
    inputs = {"tasks": "tasks.jsonl", "split": "all", "n": None, "seed": 0, "corpus": corpus}
    return config.model_copy(update={**inputs, "shard": shard})


def _folder(number: int) -> str:
    return f"shards/{number:05d}"


def _tries(place: Store, folder: str) -> dict[str, dict[str, int]]:
    """The files of each try of a shard, with their sizes."""
    tries: dict[str, dict[str, int]] = {}
    for name, size in place.files(folder).items():
        tries.setdefault(name.rpartition("/")[0], {})[name] = size
    return tries


def _best_try(place: Store, number: int) -> list[str]:
    """The files of the try that had finished most."""
    tries = _tries(place, _folder(number))
    best = max(tries, key=lambda name: tries[name].get(f"{name}/{_LOG}", 0), default=None)
    return list(tries[best]) if best else []


def _gather(config: CollectConfig, place: Store, out: Path, outcomes: list[_Outcome]) -> Clustered:
    """Merge all tries of all shards into ``out``, and copy the result to the store."""
    problems = tuple(
        f"shard {item.number}: {item.problem}"
        for item in sorted(outcomes, key=lambda item: item.number)
        if item.problem
    )
    with tempfile.TemporaryDirectory(prefix="agentkd-merge-") as folder:
        scratch = Path(folder)
        runs = []
        for number, files in enumerate(_tries(place, "shards").values()):
            if any(name.endswith(f"/{_LOG}") for name in files):
                runs.append(scratch / str(number))
                for name in files:
                    place.get(name, runs[-1] / Path(name).name)
        if not runs:
            _give_up(outcomes, problems)
        for name in _INPUTS:
            place.get(name, runs[0] / name)
        merged = merge_runs(runs, scratch / "merged")
        _restore_settings(scratch / "merged" / "config.json", config)
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in (scratch / "merged").iterdir())
        for name in sorted(names, key=lambda name: name == "manifest.json"):  # it closes the run
            _install(scratch / "merged" / name, out / name)
            place.put(scratch / "merged" / name, f"merged/{name}")
        for name in {"errors.jsonl", "passages.jsonl"} - set(names):
            (out / name).unlink(missing_ok=True)
            place.remove(f"merged/{name}")
    return Clustered(
        out, merged.trajectories, merged.correct, merged.missing_tasks, merged.duplicates, problems
    )


def _give_up(outcomes: list[_Outcome], problems: tuple[str, ...]) -> None:
    codes = {item.exit_code for item in outcomes if item.problem}
    error = ProviderError if codes == {ProviderError.exit_code} else AgentkdError
    raise error(
        f"No shard finished anything; {problems[0] if problems else 'none was begun'}",
        "Mend that, then run the same command again.",
    )


def _restore_settings(path: Path, config: CollectConfig) -> None:
    """Say where the tasks came from: the nodes only knew a copy of them."""
    if path.is_file():
        asked = config.model_dump(mode="json", include={"tasks", "split", "n", "seed", "corpus"})
        settings = read_json(path)
        write_json(path, {**settings, **{key: asked[key] for key in asked if key in settings}})


def _install(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(source.read_bytes())
    partial.replace(target)
