from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig
from agentkd.collect import CollectConfig, collect
from agentkd.errors import ConfigError, DataError
from agentkd.filter import filter_run
from agentkd.merge import merge_runs
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.shard import Shard
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.conftest import action

COUNT = 12


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    write_jsonl(
        path, [Task(id=f"t{i}", question=f"add {i}", answer=str(i + 1), split="train") for i in range(COUNT)]
    )
    return path


def teacher(messages: list[dict[str, Any]]) -> str:
    number = messages[-1]["content"].split()[-1]
    return action("add", f"final_answer({number} + 1)")


def config(tasks: Path, url: str, **changes: Any) -> CollectConfig:
    agent = AgentConfig(model="fake", api_base=url, sandbox="local")
    return CollectConfig(**{"tasks": str(tasks), "agent": agent, "workers": 2, **changes})


def content(path: Path) -> list[dict[str, Any]]:
    """The trajectories of a run without what differs from run to run."""
    rows = [item.model_dump(mode="json") for item in read_trajectories(path / "trajectories.jsonl")]
    for row in rows:
        row["config"].pop("api_base")
        for name in ("seconds", "started_at"):
            row.pop(name)
        for step in row["steps"]:
            for name in ("model_seconds", "code_seconds"):
                step.pop(name)
    return sorted(rows, key=lambda row: int(row["task"]["id"][1:]))


def test_the_parts_are_disjoint_and_complete_and_depend_on_the_id_alone() -> None:
    names = [Task(id=f"task {i}", question="q") for i in range(1000)]
    parts = [Shard(i, 7).take(names) for i in range(1, 8)]
    assert sorted(task.id for part in parts for task in part) == sorted(task.id for task in names)
    assert all(100 < len(part) < 190 for part in parts)
    assert Shard(3, 7).take(reversed(names)) == parts[2][::-1]
    assert Shard.parse("3/7") == Shard(3, 7)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "a/b", "-1/4", "1/4/2", "1.5/4"])
def test_what_is_not_a_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a shard"):
        Shard.parse(text)


def test_shards_merge_into_the_run_that_one_machine_would_have_made(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url), tmp_path / "whole")
        runs = []
        for number in (3, 1, 2):
            runs.append(tmp_path / f"shard-{number}")
            done = collect(config(tasks, endpoint.url, shard=f"{number}/3"), runs[-1])
            assert 0 < done.wanted < COUNT
            assert read_json(runs[-1] / "manifest.json")["config"]["shard"] == f"{number}/3"
        merged = merge_runs(runs, tmp_path / "merged")
        assert (merged.trajectories, merged.duplicates, merged.missing_shards) == (COUNT, 0, ())
        assert [item.task.id for item in read_trajectories(tmp_path / "merged" / "trajectories.jsonl")] == [
            f"t{i}" for i in range(COUNT)
        ]
        assert content(tmp_path / "merged") == content(tmp_path / "whole")
        endpoint.requests.clear()
        assert collect(config(tasks, endpoint.url), tmp_path / "merged").missing == 0
        assert endpoint.requests == []
    assert len(filter_run(tmp_path / "merged", tmp_path / "kept").kept) == COUNT


def test_a_merge_says_what_is_missing_and_collect_goes_on_with_it(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url, shard="1/2"), tmp_path / "a")
        merged = merge_runs([tmp_path / "a", tmp_path / "a"], tmp_path / "merged")
        assert merged.duplicates == merged.trajectories > 0
        assert merged.missing_shards == ("2/2",)
        assert merged.missing_tasks == COUNT - merged.trajectories
        done = collect(config(tasks, endpoint.url), tmp_path / "merged")
    assert len(done.trajectories) == COUNT


def test_errors_go_along_unless_another_run_finished_the_task(tasks: Path, tmp_path: Path) -> None:
    def flaky(messages: list[dict[str, Any]]) -> Any:
        if messages[-1]["content"] in broken:
            return 400, b'{"error": {"message": "no"}}'
        return teacher(messages)

    with FakeEndpoint(flaky) as endpoint:
        broken = {"add 1", "add 2"}
        collect(config(tasks, endpoint.url), tmp_path / "a")
        broken = {"add 2"}
        collect(config(tasks, endpoint.url), tmp_path / "b")
    merged = merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert merged.missing_tasks == 1
    assert [item.id for item in read_trajectories(tmp_path / "merged" / "errors.jsonl")] == ["t2#0"]


def test_runs_with_different_settings_are_refused_unless_told(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        first = config(tasks, endpoint.url)
        collect(first, tmp_path / "a")
        hotter = first.agent.model_copy(update={"temperature": 1.0})
        collect(config(tasks, endpoint.url, agent=hotter), tmp_path / "b")
    with pytest.raises(ConfigError, match=r"different settings \(agent.temperature\)"):
        merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "m", any_settings=True).duplicates == COUNT


def test_a_shard_does_not_go_on_in_the_folder_of_another(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url, shard="1/2"), tmp_path / "run")
        with pytest.raises(ConfigError, match="other settings"):
            collect(config(tasks, endpoint.url, shard="2/2"), tmp_path / "run")


def test_a_torn_line_is_left_out_and_a_broken_one_is_named(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url), tmp_path / "run")
    log = tmp_path / "run" / "trajectories.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-30])
    assert merge_runs([tmp_path / "run"], tmp_path / "a").trajectories == COUNT - 1
    log.write_bytes(b'{"id": 3}\n' + whole)
    with pytest.raises(DataError, match="line 1"):
        merge_runs([tmp_path / "run"], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_other_tasks_under_the_same_ids_and_folders_that_are_no_runs_are_refused(
    tasks: Path, tmp_path: Path
) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url), tmp_path / "a")
        rows = [json.loads(line) for line in tasks.read_text().splitlines()]
        write_jsonl(tasks, [Task(**{**row, "question": f"please {row['question']}"}) for row in rows])
        collect(config(tasks, endpoint.url), tmp_path / "b")
    with pytest.raises(DataError, match="another task"):
        merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    with pytest.raises(DataError, match="not a run"):
        merge_runs([tmp_path / "nothing"], tmp_path / "merged")
    merge_runs([tmp_path / "a"], tmp_path / "merged")
    with pytest.raises(ConfigError, match="holds a run already"):
        merge_runs([tmp_path / "a"], tmp_path / "merged")
