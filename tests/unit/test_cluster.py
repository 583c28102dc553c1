"""A shard on a node, and the store between nodes, without Ray; with it: tests/e2e/test_ray.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig
from agentkd.cluster import ClusterConfig, Store, collect_on_ray
from agentkd.cluster.run import _gather, _prepare, run_shard
from agentkd.cluster.store import Mirror
from agentkd.collect import CollectConfig, collect
from agentkd.errors import ConfigError, ProviderError, StorageError
from agentkd.record import read_json, read_trajectories
from agentkd.testing import FakeEndpoint
from tests.unit.test_merge import COUNT, config, content, tasks, teacher

pytest.importorskip("fsspec")

__all__ = ["tasks"]  # the fixture

SHARDS = 3


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_a_store_gives_back_what_was_put_in(kind: str, tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}" if kind == "memory" else str(tmp_path / "store"))
    assert store.files("shards") == {}
    (tmp_path / "a").write_bytes(b"one")
    store.put(tmp_path / "a", "shards/1/a")
    (tmp_path / "a").write_bytes(b"three")
    store.put(tmp_path / "a", "shards/1/a")
    assert store.files("shards") == {"shards/1/a": 5}
    store.get("shards/1/a", tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").read_bytes() == b"three"
    store.remove("shards/1/a")
    store.remove("shards/1/a")
    assert store.files("") == {}
    with pytest.raises(StorageError, match="reading nothing"):
        store.get("nothing", tmp_path / "c")


def test_a_store_that_cannot_be_opened_says_so() -> None:
    with pytest.raises(ConfigError, match="opening"):
        Store("nosuchprotocol://x")


def test_a_mirror_follows_its_folder(tmp_path: Path) -> None:
    store, folder = Store(str(tmp_path / "store")), tmp_path / "run"
    with Mirror(folder, store, "m", every=0.02, leave=["tasks.jsonl"]):
        folder.mkdir()
        for name in ("log", "errors", "tasks.jsonl", "log.partial"):
            (folder / name).write_text("x")
        deadline = time.monotonic() + 10
        while set(store.files("m")) != {"m/log", "m/errors"}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (folder / "errors").unlink()
        (folder / "log").write_text("xyz")
    assert store.files("m") == {"m/log": 3}


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_shards_on_nodes_merge_into_the_run_of_one_machine(kind: str, tasks: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}" if kind == "memory" else str(tmp_path / "store")
    before = Path.cwd()
    with FakeEndpoint(teacher) as endpoint:
        settings = config(tasks, endpoint.url)
        collect(settings, tmp_path / "whole")
        _prepare(settings, Store(url), ClusterConfig(shards=SHARDS))
        outcomes = [run_shard(settings, url, number, SHARDS, 5.0) for number in range(1, SHARDS + 1)]
        assert [item.problem for item in outcomes] == [None] * SHARDS
        done = _gather(settings, Store(url), tmp_path / "out", outcomes)
        assert (done.trajectories, done.correct, done.missing, done.duplicates) == (COUNT, COUNT, 0, 0)
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        stored = read_json(tmp_path / "out" / "config.json")
        assert "shard" not in stored and stored.get("tasks", str(tasks)) == str(tasks)
        assert f"merged/{'manifest.json'}" in Store(url).files("merged")
        endpoint.requests.clear()
        assert collect(settings, tmp_path / "out").missing == 0  # it is an ordinary run
        assert endpoint.requests == []
    assert Path.cwd() == before


def test_a_second_try_goes_on_where_the_first_was_lost(tasks: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with FakeEndpoint(teacher) as endpoint:
        settings = config(tasks, endpoint.url)
        _prepare(settings, Store(url), ClusterConfig(shards=1))
        run_shard(settings, url, 1, 1, 5.0)
        (log,) = (tmp_path / "store").glob("shards/*/*/trajectories.jsonl")
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # what the last copy before the loss had
        (log.parent / "manifest.json").unlink()
        endpoint.requests.clear()
        outcome = run_shard(settings, url, 1, 1, 5.0)
        asked = {request["messages"][-1]["content"] for request in endpoint.requests[1:]}
        finished = {json.loads(line)["task"]["question"] for line in lines[:5]}
        assert not asked & finished and len(asked) <= COUNT - 5
        done = _gather(settings, Store(url), tmp_path / "out", [outcome])
    assert (done.trajectories, done.duplicates) == (COUNT, 5)
    names = [item.id for item in read_trajectories(tmp_path / "out" / "trajectories.jsonl")]
    assert len(set(names)) == len(names) == COUNT


def test_a_shard_without_tasks_and_one_without_an_endpoint(tasks: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with FakeEndpoint(lambda messages: (500, b"{}")) as endpoint:
        settings = config(tasks, endpoint.url)
    _prepare(settings, Store(url), ClusterConfig(shards=400))
    outcomes = [run_shard(settings, url, number, 400, 5.0) for number in (1, 2, 3)]
    empty = [item for item in outcomes if item.problem is None]
    assert empty and all(item.missing == 0 for item in empty)
    _prepare(settings, Store(f"{url}2"), ClusterConfig(shards=1))
    outcome = run_shard(settings, f"{url}2", 1, 1, 5.0)
    assert "Cannot reach" in str(outcome.problem)
    with pytest.raises(ProviderError, match="No shard finished anything; shard 1"):
        _gather(settings, Store(f"{url}2"), tmp_path / "out", [outcome])
    assert not (tmp_path / "out").exists()


def test_a_store_with_another_run_in_it_is_refused(tasks: Path, tmp_path: Path) -> None:
    settings = config(tasks, "http://127.0.0.1:9/v1")
    store = Store(str(tmp_path / "store"))
    _prepare(settings, store, ClusterConfig(shards=2))
    _prepare(settings.model_copy(update={"workers": 9}), store, ClusterConfig(shards=2))
    with pytest.raises(ConfigError, match=r"cluster.json differs"):
        _prepare(settings, store, ClusterConfig(shards=3))
    with pytest.raises(ConfigError, match=r"tasks.jsonl differs"):
        _prepare(settings.model_copy(update={"n": 3}), store, ClusterConfig(shards=2))


@pytest.mark.parametrize(
    ("changes", "said"), [({"shard": "1/2"}, "exclude"), ({"agent": AgentConfig()}, "No endpoint")]
)
def test_settings_that_make_no_sense_on_a_cluster(
    changes: dict[str, Any], said: str, tasks: Path, tmp_path: Path
) -> None:
    settings = CollectConfig(**{**config(tasks, "http://127.0.0.1:9/v1").__dict__, **changes})
    with pytest.raises(ConfigError, match=said):
        collect_on_ray(settings, tmp_path / "out")
