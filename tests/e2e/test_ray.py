"""A run on a real Ray cluster of several nodes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig
from agentkd.cluster import ClusterConfig, collect_on_ray
from agentkd.collect import CollectConfig, collect
from agentkd.filter import filter_run
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.conftest import action
from tests.unit.test_merge import content

ray = pytest.importorskip("ray")

COUNT = 60
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without cores, so that all work is on three nodes of one core each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.workers = [made.add_node(num_cpus=1) for _ in range(3)]
        ray.init(address=made.address, log_to_driver=False, logging_level="error")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def teacher(messages: list[dict[str, Any]]) -> str:
    if len(messages) > 1:
        time.sleep(0.3)
    number = messages[-1]["content"].split()[-1]
    return action("add", f"final_answer({number} + 1)")


def test_a_killed_node_costs_nothing_that_was_finished(cluster: Any, tmp_path: Path) -> None:
    rows = [Task(id=f"t{i}", question=f"add {i}", answer=str(i + 1), split="train") for i in range(COUNT)]
    write_jsonl(tmp_path / "tasks.jsonl", rows)
    store = tmp_path / "store"
    settings = ClusterConfig(shards=6, copy_seconds=0.5)
    killed: list[int] = []

    def kill() -> None:
        """When two shards are under way and something is finished."""
        while len(list(store.glob("shards/*/*/trajectories.jsonl"))) < 2 or finished(store) < 8:
            time.sleep(0.05)
        killed.append(finished(store))
        cluster.remove_node(cluster.workers[0], allow_graceful=False)

    with FakeEndpoint(teacher) as endpoint:
        config = CollectConfig(
            tasks=str(tmp_path / "tasks.jsonl"),
            agent=AgentConfig(model="fake", api_base=endpoint.url, sandbox="local"),
            workers=2,
        )
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        done = collect_on_ray(config, tmp_path / "out", f"file://{store}", settings)
        killer.join()
        asked = Counter(
            request["messages"][1]["content"] for request in endpoint.requests if len(request["messages"]) > 1
        )
        assert killed and killed[0] < COUNT
        assert done.problems == ()
        assert (done.trajectories, done.correct, done.missing) == (COUNT, COUNT, 0)
        names = [item.id for item in read_trajectories(tmp_path / "out" / "trajectories.jsonl")]
        assert names == [f"t{i}#0" for i in range(COUNT)]  # each once, in the order of the tasks
        repeated = sum(count - 1 for count in asked.values())
        # The lost shard's rollouts in flight, and those that its last copies did not have yet.
        assert repeated <= 10
        tries = list(store.glob("shards/*/*"))
        assert len(tries) > settings.shards  # the lost shard was begun again
        collect(config, tmp_path / "whole")
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        endpoint.requests.clear()
        again = collect_on_ray(config, tmp_path / "out", f"file://{store}", settings)
        assert again.trajectories == COUNT
        assert [r for r in endpoint.requests if len(r["messages"]) > 1] == []
    assert read_json(tmp_path / "out" / "manifest.json")["counts"]["trajectories"] == COUNT
    assert len(filter_run(tmp_path / "out", tmp_path / "kept").kept) == COUNT


def finished(store: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in store.glob("shards/*/*/trajectories.jsonl"))
