"""A run on a real Ray cluster of several nodes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig
from agentkd.cluster import ClusterConfig, collect_on_ray
from agentkd.collect import CollectConfig, collect
from agentkd.filter import filter_run
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.shard import Shard
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.conftest import action
from tests.unit.test_merge import content

ray = pytest.importorskip("ray")

COUNT, SHARDS = 60, 6
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
    number = messages[-1]["content"].split()[-1]
    return action("add", f"final_answer({number} + 1)")


class Held:
    """A teacher that answers the first three tasks of each shard, and the others when it is let go."""

    def __init__(self, tasks: list[Task]) -> None:
        parts = [Shard(number, SHARDS).take(tasks) for number in range(1, SHARDS + 1)]
        self.free = {task.question for part in parts for task in part[:3]}
        self.go = threading.Event()

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        if len(messages) > 1 and messages[1]["content"] not in self.free:
            self.go.wait(60)
        return teacher(messages)


def finished(store: Path) -> list[int]:
    """Trajectories in the store, for each shard that has been begun."""
    return [path.read_bytes().count(b"\n") for path in store.glob("shards/*/*/trajectories.jsonl")]


def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_killed_node_costs_nothing_that_was_finished(cluster: Any, tmp_path: Path) -> None:
    rows = [Task(id=f"t{i}", question=f"add {i}", answer=str(i + 1), split="train") for i in range(COUNT)]
    write_jsonl(tmp_path / "tasks.jsonl", rows)
    store, held = tmp_path / "store", Held(rows)
    settings = ClusterConfig(shards=SHARDS, copy_seconds=0.5)

    with FakeEndpoint(held) as endpoint, ThreadPoolExecutor(1) as pool:
        config = CollectConfig(
            tasks=str(tmp_path / "tasks.jsonl"),
            agent=AgentConfig(model="fake", api_base=endpoint.url, sandbox="local"),
            workers=2,
        )
        run = pool.submit(collect_on_ray, config, tmp_path / "out", f"file://{store}", settings)
        until(lambda: finished(store) == [3, 3, 3])  # each node is in the middle of a shard
        cluster.remove_node(cluster.workers[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        until(lambda: len(finished(store)) == 4)  # the new node works, and nothing of the old one is alive
        held.go.set()
        done = run.result(timeout=120)
        talks = [request["messages"] for request in endpoint.requests if len(request["messages"]) > 1]
        asked = Counter(talk[1]["content"] for talk in talks)
        assert done.problems == ()
        assert (done.trajectories, done.correct, done.missing) == (COUNT, COUNT, 0)
        names = [item.id for item in read_trajectories(tmp_path / "out" / "trajectories.jsonl")]
        assert names == [f"t{i}#0" for i in range(COUNT)]  # each once, in the order of the tasks
        assert len(list(store.glob("shards/*/*"))) == SHARDS + 1  # the lost one was begun again,
        assert done.duplicates == 3  # went on from its copy,
        assert sum(asked.values()) - COUNT <= config.workers  # and repeated only what was in flight
        collect(config, tmp_path / "whole")
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        endpoint.requests.clear()
        again = collect_on_ray(config, tmp_path / "out", f"file://{store}", settings)
        assert again.trajectories == COUNT
        assert [request for request in endpoint.requests if len(request["messages"]) > 1] == []
    assert read_json(tmp_path / "out" / "manifest.json")["counts"]["trajectories"] == COUNT
    assert len(filter_run(tmp_path / "out", tmp_path / "kept").kept) == COUNT


def test_the_command_on_one_machine(tmp_path: Path) -> None:
    rows = [Task(id=f"t{i}", question=f"add {i}", answer=str(i + 1), split="train") for i in range(6)]
    write_jsonl(tmp_path / "tasks.jsonl", rows)
    with FakeEndpoint(teacher) as endpoint:
        command = [sys.executable, "-m", "agentkd", "collect", "--engine", "ray", "--shards", "2", "--json"]
        options = ["--tasks", f"{tmp_path / 'tasks.jsonl'}", "--out", f"{tmp_path / 'run'}"]
        agent = ["--api-base", endpoint.url, "--model", "fake", "--sandbox", "local"]
        done = subprocess.run([*command, *options, *agent], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert (figures["trajectories"], figures["missing"], figures["problems"]) == (6, 0, [])
        assert (figures["calls"], figures["faults"], figures["stopped"]) == (6, {}, [])
        assert figures["usage"]["output_tokens"] > 0
        assert len(read_trajectories(tmp_path / "run" / "trajectories.jsonl")) == 6
        options += ["--shard", "1/2"]
        done = subprocess.run([*command, *options, *agent], capture_output=True, text=True, timeout=240)
        assert done.returncode == 2 and "exclude each other" in done.stderr
