"""A shard on a node, and the store between nodes, without Ray; with it: tests/e2e/test_ray.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkd.agent_config import AgentConfig
from agentkd.cli import app
from agentkd.cluster import ClusterConfig, Store, collect_on_ray
from agentkd.cluster.run import _bill, _gather, _prepare, _run
from agentkd.cluster.shard import Outcome, run_shard
from agentkd.cluster.store import Mirror
from agentkd.collect import CollectConfig, TeacherConfig, collect, replay
from agentkd.errors import AgentkdError, ConfigError, ProviderError, StorageError
from agentkd.first_thought import FirstThoughtConfig, load_first_thoughts
from agentkd.gate import GateConfig
from agentkd.prompt import FIRST_THOUGHT
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.spend import Budget, Price
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.unit import test_first_thought
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
        (folder / "deep").mkdir()
        for name in ("log", "errors", "tasks.jsonl", "log.partial", "deep/log", "deep/tasks.jsonl"):
            (folder / name).write_text("x")
        deadline = time.monotonic() + 10
        while set(store.files("m")) != {"m/log", "m/errors", "m/deep/log", "m/deep/tasks.jsonl"}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (folder / "errors").unlink()
        (folder / "deep" / "tasks.jsonl").unlink()
        (folder / "log").write_text("xyz")
    assert store.files("m") == {"m/log": 3, "m/deep/log": 1}


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
    cooler = settings.model_copy(update={"temperatures": (0.0, 0.7)})
    thinking = settings.model_copy(update={"first_thought": FirstThoughtConfig()})
    for other in (cooler, thinking):
        with pytest.raises(ConfigError, match=r"cluster.json differs"):
            _prepare(other, store, ClusterConfig(shards=2))
    with pytest.raises(ConfigError, match=r"tasks.jsonl differs"):
        _prepare(settings.model_copy(update={"n": 3}), store, ClusterConfig(shards=2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shard": "1/2"}, "exclude"),
        ({"agent": AgentConfig()}, "No endpoint"),
        ({"budget": Budget(max_tokens=15)}, "cannot be divided among 16 shards"),
        ({"budget": Budget(max_cost=1.0)}, "no price for fake"),
    ],
)
def test_settings_that_make_no_sense_on_a_cluster(
    changes: dict[str, Any], said: str, tasks: Path, tmp_path: Path
) -> None:
    settings = CollectConfig(**{**config(tasks, "http://127.0.0.1:9/v1").__dict__, **changes})
    with pytest.raises(ConfigError, match=said):
        collect_on_ray(settings, tmp_path / "out")


# What a run may spend, and how fast.


def run_shards(settings: CollectConfig, url: str, count: int, until: float | None = None) -> list[Outcome]:
    return [run_shard(settings, url, number, count, 5.0, until) for number in range(1, count + 1)]


def test_the_shards_have_parts_of_the_budget(tasks: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with FakeEndpoint(teacher) as endpoint:
        settings = config(tasks, endpoint.url, workers=1, prices={"fake": Price(input=1.0, output=1.0)})
        whole = collect(settings, tmp_path / "whole")
        each = whole.spent.tokens / COUNT
        limit = int(whole.spent.tokens * 0.5)
        limited = settings.model_copy(update={"budget": Budget(max_tokens=limit)})
        _prepare(limited, Store(url), ClusterConfig(shards=2))
        outcomes = run_shards(limited, url, 2)
        assert {item.stopped for item in outcomes} == {f"--max-tokens {limit}"}
        assert [item.problem for item in outcomes] == [None, None]
        done = _gather(limited, Store(url), tmp_path / "out", outcomes)
        assert done.stopped == tuple(f"shard {n}: --max-tokens {limit}" for n in (1, 2))
        bill = _bill(limited, limited.prices, tmp_path / "out")
        assert limit <= bill["spent"].tokens < limit + 2 * 1.5 * each, "each has one call in flight"
        assert bill["spent"].cost == pytest.approx(bill["spent"].tokens / 1e6)
        assert (bill["unpriced"], bill["faults"]) == ((), {})
        before = len(endpoint.requests)
        run_shards(limited, url, 2)
        assert len(endpoint.requests) - before == 2, "the check alone: what was spent before counts"
        raised = settings.model_copy(update={"budget": Budget(max_tokens=10**6)})
        assert {item.stopped for item in run_shards(raised, url, 2)} == {None}
        assert _gather(raised, Store(url), tmp_path / "out", []).missing == 0
        assert _bill(raised, {}, tmp_path / "out")["spent"].calls == whole.spent.calls


def test_the_time_is_over_for_all_shards_at_once(tasks: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with FakeEndpoint(teacher) as endpoint:
        settings = config(tasks, endpoint.url, budget=Budget(max_hours=2.0))
        _prepare(settings, Store(url), ClusterConfig(shards=2))
        first = run_shard(settings, url, 1, 2, 5.0, time.time() + 7200)
        late = run_shard(settings, url, 2, 2, 5.0, time.time() - 1)
        done = _gather(settings, Store(url), tmp_path / "out", [first, late])
        _prepare(settings, Store(f"{url}2"), ClusterConfig(shards=2))
        with pytest.raises(AgentkdError, match=r"No shard finished anything; shard 2: --max-hours 2\.0"):
            _gather(settings, Store(f"{url}2"), tmp_path / "nothing", [late])
    assert (first.stopped, late.stopped) == (None, "--max-hours 2.0")
    assert done.stopped == ("shard 2: --max-hours 2.0",)
    assert 0 < done.missing < COUNT


class OneByOne:
    """Stands for Ray: runs what it is given when it is waited for; counts how much it has at a time."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, cores: float) -> None:
        self.cores, self.most, self.configs = cores, 0, []  # type: ignore[var-annotated]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cores}

    def remote(self, **options: Any) -> Any:
        class Remote:
            @staticmethod
            def remote(config: CollectConfig, url: str, number: int, *rest: Any) -> Any:
                self.configs.append(config)
                return object(), number

        return lambda function: Remote

    def wait(self, waiting: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(waiting))
        return waiting[:1], waiting[1:]

    def get(self, reference: tuple[object, int]) -> Outcome:
        if reference[1] == 2:
            raise RuntimeError("the node is gone")
        return Outcome(reference[1], 0, None)


def test_limits_a_minute_are_those_of_all_shards_that_run_at_once(tasks: Path) -> None:
    limits = GateConfig(requests_per_minute=120, tokens_per_minute=9000, max_in_flight=30)
    other = TeacherConfig(model="two", api_base="http://two/v1", gate=GateConfig(requests_per_minute=60))
    settings = config(tasks, "http://one/v1", gate=limits, teachers=(other,))
    ray, seen = OneByOne(cores=6.5), []
    outcomes = _run(
        ray, settings, "url", ClusterConfig(shards=10, cpus=2.0), lambda *progress: seen.append(progress)
    )
    assert ray.most == 3, "no more than the limits were divided for"
    assert sorted(item.number for item in outcomes) == list(range(1, 11))
    assert [item.problem for item in outcomes if item.problem] == ["RuntimeError: the node is gone"]
    assert seen[-1] == (10, 10)
    first, second = ray.configs[0].gate, ray.configs[0].teachers[0].gate
    assert (first.requests_per_minute, first.tokens_per_minute, first.max_in_flight) == (40, 3000, 10)
    assert (second.requests_per_minute, second.tokens_per_minute) == (20, None)
    unlimited = OneByOne(cores=3)
    _run(unlimited, config(tasks, "http://one/v1"), "url", ClusterConfig(shards=10), None)
    assert unlimited.most == 10, "the cluster may grow"


# First thoughts, logs, and a run that is gone on with elsewhere.


def test_shards_keep_their_chains_of_thought(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "tasks.jsonl",
        [Task(id=str(i), question=f"add {i}", answer=str(i + 1), split="train") for i in range(6)],
    )
    url = str(tmp_path / "store")
    with FakeEndpoint(test_first_thought.Teacher(), continues=True) as endpoint:
        settings = test_first_thought.config(tmp_path / "tasks.jsonl", endpoint.url)
        whole = collect(settings, tmp_path / "whole")
        _prepare(settings, Store(url), ClusterConfig(shards=2))
        outcomes = run_shards(settings, url, 2)
        for log in (tmp_path / "store").glob("shards/*/*/trajectories.jsonl"):
            log.unlink()  # lost when only the chains of thought were had
        for log in (tmp_path / "store").glob("shards/*/*/calls-0.jsonl"):
            log.unlink()
        endpoint.requests.clear()
        outcomes = run_shards(settings, url, 2)
        asked = [body["messages"][0]["content"] for body in endpoint.requests]
        assert asked.count(FIRST_THOUGHT) == 0, "they were copied with the shard"
        assert len([body for body in endpoint.requests if body["messages"][0]["role"] == "system"]) == 6
        done = _gather(settings, Store(url), tmp_path / "out", outcomes)
        assert (done.trajectories, done.missing, done.problems) == (6, 0, ())
        assert load_first_thoughts(tmp_path / "out") == whole.first_thoughts
        assert "merged/first-thought/prefixes.jsonl" in Store(url).files("merged")
        endpoint.requests.clear()
        assert collect(settings, tmp_path / "out").spent.usage == whole.spent.usage
        assert endpoint.requests == []
    assert len(replay(tmp_path / "out", tmp_path / "replayed").trajectories) == 6


def test_a_shard_that_was_lost_within_its_pass_is_in_the_bill(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "tasks.jsonl",
        [Task(id=str(i), question=f"add {i}", answer=str(i + 1), split="train") for i in range(6)],
    )
    url = str(tmp_path / "store")
    with FakeEndpoint(test_first_thought.Teacher(), continues=True) as endpoint:
        settings = test_first_thought.config(tmp_path / "tasks.jsonl", endpoint.url)
        _prepare(settings, Store(url), ClusterConfig(shards=2))
        outcomes = run_shards(settings, url, 2)
        first = next((tmp_path / "store").glob("shards/00001/*"))
        for name in ("trajectories.jsonl", "calls-0.jsonl", "manifest.json"):
            (first / name).unlink()
        done = _gather(settings, Store(url), tmp_path / "out", outcomes)
    assert 0 < done.missing < 6
    calls = _bill(settings, {}, tmp_path / "out")["spent"].calls
    assert calls == 12 - done.missing, "six thoughts, and the rollouts of the other shard"


def test_what_was_gone_on_with_on_this_machine_is_kept(tasks: Path, tmp_path: Path) -> None:
    url, failing = str(tmp_path / "store"), True

    def flaky(messages: list[dict[str, Any]]) -> Any:
        if failing and messages[-1]["content"] in ("add 1", "add 2"):
            return 400, b'{"error": {"message": "no"}}'
        return teacher(messages)

    with FakeEndpoint(flaky) as endpoint:
        settings = config(tasks, endpoint.url)
        _prepare(settings, Store(url), ClusterConfig(shards=2))
        assert _gather(settings, Store(url), tmp_path / "out", run_shards(settings, url, 2)).missing == 2
        failing = False
        (tmp_path / "out" / "calls-0.jsonl").rename(tmp_path / "out" / "calls-7.jsonl")
        local = collect(settings, tmp_path / "out")
        assert local.missing == 0
        again = _gather(settings, Store(url), tmp_path / "out", [])
        assert (again.trajectories, again.missing) == (COUNT, 0)
        assert [path.name for path in (tmp_path / "out").glob("calls-*")] == ["calls-0.jsonl"]
        assert _bill(settings, {}, tmp_path / "out")["spent"].usage == local.spent.usage
        with pytest.raises(ConfigError, match="other tasks"):
            collect_on_ray(settings.model_copy(update={"n": 3}), tmp_path / "out", url)


def test_an_estimate_needs_no_cluster_and_a_comparison_has_none(tasks: Path, tmp_path: Path) -> None:
    command = ["collect", "--engine", "ray", "--tasks", str(tasks), "--out", str(tmp_path / "out")]
    command += ["--api-base", "http://127.0.0.1:9/v1", "--model", "fake", "--sandbox", "local"]
    done = CliRunner().invoke(app, [*command, "--estimate", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["rollouts"] == COUNT
    with pytest.raises(ConfigError, match="--compare and --engine ray exclude"):
        CliRunner().invoke(app, [*command, "--first-thought", "--compare"], catch_exceptions=False)
    assert not (tmp_path / "out").exists()
