"""What goes along when runs are merged: their logs, their bill, their first thoughts, their corpus."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkd.calls import VOID, Call, call_log, iter_calls
from agentkd.cli import app
from agentkd.collect import CollectConfig, collect, replay
from agentkd.crew import FaultNote, iter_faults
from agentkd.errors import ConfigError, ProviderError
from agentkd.first_thought import load_first_thoughts
from agentkd.merge import merge_runs
from agentkd.merge.logs import merge_calls, merge_faults, plan_calls
from agentkd.prompt import FIRST_THOUGHT
from agentkd.record import read_json, write_json, write_jsonl
from agentkd.retrieval import Passage
from agentkd.spend import Budget
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import Usage
from tests.unit import test_first_thought as thinking
from tests.unit.test_merge import COUNT, config, content, tasks, teacher

__all__ = ["tasks"]  # the fixture


def asked(endpoint: FakeEndpoint) -> list[str]:
    """What was asked, without the check before the start and the probe."""
    talks = [body["messages"] for body in endpoint.requests]
    return [talk[0]["content"] for talk in talks if talk[0]["role"] == "system"]


# Whose calls are taken.


def call(rollout: str, step: int, answer: str, restart: int = 0) -> Call:
    return Call(
        rollout=rollout,
        restart=restart,
        kind="model",
        step=step,
        answer={"content": answer, "raw": None},
        model="m",
        usage=Usage(input_tokens=1),
    )


def runs(folder: Path, *logs: list[Call]) -> list[Path]:
    found = []
    for number, calls in enumerate(logs):
        found.append(folder / str(number))
        write_jsonl(call_log(found[-1], 0), calls[:1])
        write_jsonl(call_log(found[-1], 1), calls[1:])
    return found


def merged(folders: list[Path], taken: dict[str, Path], out: Path) -> Counter[tuple[str, int, str]]:
    merge_calls(folders, plan_calls(folders, taken), out)
    return Counter((item.rollout, item.restart, item.answer["content"]) for item in iter_calls(out))


def test_a_rollout_has_the_calls_of_one_run_and_the_others_are_paid(tmp_path: Path) -> None:
    one, two = [call("t#0", 1, "a"), call("t#0", 2, "b")], [call("t#0", 1, "x")]
    folders = runs(tmp_path, one, two)
    of_one = {("t#0", 0, "a"): 1, ("t#0", 0, "b"): 1, ("t#0", VOID, "x"): 1}
    assert merged(folders, {"t#0": folders[0]}, tmp_path / "a") == of_one
    of_two = {("t#0", VOID, "a"): 1, ("t#0", VOID, "b"): 1, ("t#0", 0, "x"): 1}
    assert merged(folders, {"t#0": folders[1]}, tmp_path / "b") == of_two
    assert merged(folders, {}, tmp_path / "c") == of_one, "of an unfinished one, who came farther"
    assert merged(folders, {"t#0": tmp_path / "nowhere"}, tmp_path / "d") == {
        ("t#0", VOID, name): 1 for name in "abx"
    }


def test_a_copy_that_went_on_is_no_second_bill(tmp_path: Path) -> None:
    before = [call("t#0", 1, "a"), call("u#0", 1, "c")]
    lost, later = [*before, call("t#0", 2, "lost")], [*before, call("t#0", 2, "b"), call("t#0", 3, "d")]
    folders = runs(tmp_path, lost, later)
    found = merged(folders, {"t#0": folders[1]}, tmp_path / "out")
    assert found == {
        **{("t#0", 0, name): 1 for name in "abd"},
        ("u#0", 0, "c"): 1,
        ("t#0", VOID, "lost"): 1,
    }
    both = [tmp_path / "out", *folders]
    assert merged(both, {"t#0": tmp_path / "out"}, tmp_path / "again") == found, "merged again, the same"


def test_a_later_beginning_counts_more_than_a_longer_one(tmp_path: Path) -> None:
    anew = Call(
        rollout="t#0", restart=1, kind="restart", error=("Diverged", "it did"), answer={"content": ""}
    )
    one = [call("t#0", 1, "a"), call("t#0", 2, "b"), call("t#0", 3, "c")]
    folders = runs(tmp_path, one, [call("t#0", 1, "a"), anew, call("t#0", 1, "x", restart=1)])
    found = merged(folders, {}, tmp_path / "out")
    assert found["t#0", 1, "x"] == found["t#0", VOID, "b"] == found["t#0", 0, "a"] == 1


def test_the_same_fault_in_two_copies_is_one(tmp_path: Path) -> None:
    notes = [
        FaultNote(at=f"2030-01-01T00:00:0{k}", endpoint="e", kind="final", what="429", message="", wait=None)
        for k in range(3)
    ]
    write_jsonl(tmp_path / "a" / "faults-0.jsonl", [notes[1], notes[0], notes[0]])
    write_jsonl(tmp_path / "b" / "faults-3.jsonl", [notes[0], notes[2]])
    merge_faults([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert list(iter_faults(tmp_path / "out")) == [notes[0], notes[0], notes[1], notes[2]]
    merge_faults([tmp_path / "c"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Whole runs.


def test_a_merged_run_can_be_replayed_and_knows_its_bill(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        whole = collect(config(tasks, endpoint.url), tmp_path / "whole")
        for number in (1, 2):
            collect(config(tasks, endpoint.url, shard=f"{number}/2"), tmp_path / str(number))
        logged = merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged").logged
        assert logged == sum(1 for _ in iter_calls(tmp_path / "merged")) > COUNT
        again = replay(tmp_path / "merged", tmp_path / "replayed")
        assert (len(again.trajectories), again.unfinished) == (COUNT, 0)
        assert content(tmp_path / "replayed") == content(tmp_path / "whole")
        limited = config(tasks, endpoint.url, budget=Budget(max_tokens=10**6))
        assert collect(limited, tmp_path / "merged").spent.usage == whole.spent.usage
        # Two runs of the same tasks: each trajectory once, and both are paid.
        twice = merge_runs([tmp_path / "whole", tmp_path / "1"], tmp_path / "twice")
        assert twice.trajectories == COUNT
        spent = collect(limited, tmp_path / "twice").spent
        ones = read_json(tmp_path / "1" / "manifest.json")["counts"]
        assert spent.calls == whole.spent.calls + ones["calls"]
        assert len(replay(tmp_path / "twice", tmp_path / "replayed-twice").trajectories) == COUNT


def test_a_rollout_goes_on_in_the_merged_run_where_it_stopped(tasks: Path, tmp_path: Path) -> None:
    def two_steps(messages: list[dict[str, Any]]) -> Any:
        if failing and len(messages) > 2:
            return 400, b'{"error": {"message": "no"}}'
        if len(messages) == 1:
            return "ok"  # the check before the start
        if len(messages) == 2:
            return "Thought: look\n```python\nprint(1)\n```"
        return teacher([messages[1]])

    with FakeEndpoint(two_steps) as endpoint:
        failing = False
        collect(config(tasks, endpoint.url, shard="1/2"), tmp_path / "1")
        failing = True
        with pytest.raises(ProviderError):
            collect(config(tasks, endpoint.url, shard="2/2"), tmp_path / "2")
        merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
        failing = False
        endpoint.requests.clear()
        done = collect(config(tasks, endpoint.url), tmp_path / "merged")
        assert done.missing == 0
        talks = [body["messages"] for body in endpoint.requests if len(body["messages"]) > 1]
        assert talks
        assert all(len(talk) > 2 for talk in talks), "the first steps are in the merged log"


def test_runs_without_a_log_are_merged_and_the_command_says_so(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url), tmp_path / "run")
    (tmp_path / "run" / "calls-0.jsonl").unlink()
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    assert "No run has a call log" in done.output
    assert list(tmp_path.glob("merged/calls-*")) == []


def test_the_corpus_that_all_runs_searched_goes_along(tasks: Path, tmp_path: Path) -> None:
    passages = tmp_path / "passages.jsonl"
    write_jsonl(passages, [Passage(id="1", title="one", text="one stands here")])
    with FakeEndpoint(teacher) as endpoint:
        settings = config(tasks, endpoint.url, corpus=passages)
        collect(settings, tmp_path / "a")
        merge_runs([tmp_path / "a"], tmp_path / "merged")
        assert read_json(tmp_path / "merged" / "corpus.json") == read_json(tmp_path / "a" / "corpus.json")
        assert collect(settings, tmp_path / "merged").missing == 0


# First thoughts.


def with_thoughts(tasks: Path, url: str, **changes: Any) -> CollectConfig:
    return thinking.config(tasks, url, **changes)


@pytest.fixture
def six(tmp_path: Path) -> Path:
    found: Path = thinking.tasks.__wrapped__(tmp_path)  # type: ignore[attr-defined]
    return found


def test_a_complete_merged_run_has_its_first_thoughts(six: Path, tmp_path: Path) -> None:
    with FakeEndpoint(thinking.Teacher(), continues=True) as endpoint:
        whole = collect(with_thoughts(six, endpoint.url), tmp_path / "whole")
        shards = [tmp_path / "1", tmp_path / "2"]
        for number, run in enumerate(shards, 1):
            collect(with_thoughts(six, endpoint.url, shard=f"{number}/2"), run)
        merge_runs(shards, tmp_path / "merged")
        assert load_first_thoughts(tmp_path / "merged") == whole.first_thoughts
        endpoint.requests.clear()
        done = collect(with_thoughts(six, endpoint.url), tmp_path / "merged")
        assert endpoint.requests == [], "no chain of thought is asked for again"
        assert done.spent.usage == whole.spent.usage
        assert done.first_thoughts == whole.first_thoughts
        again = replay(tmp_path / "merged", tmp_path / "replayed")
        assert (len(again.trajectories), again.unfinished) == (6, 0)
        assert all(item.steps[0].first_thought for item in again.trajectories)


def test_of_an_unfinished_merged_run_only_what_is_missing_is_thought(six: Path, tmp_path: Path) -> None:
    with FakeEndpoint(thinking.Teacher(), continues=True) as endpoint:
        collect(with_thoughts(six, endpoint.url, shard="1/2"), tmp_path / "1")
        done = merge_runs([tmp_path / "1"], tmp_path / "merged")
        assert 0 < done.missing_tasks < 6
        endpoint.requests.clear()
        assert collect(with_thoughts(six, endpoint.url), tmp_path / "merged").missing == 0
        assert asked(endpoint).count(FIRST_THOUGHT) == done.missing_tasks
        assert len(asked(endpoint)) == 2 * done.missing_tasks


def test_a_task_has_the_prefix_that_its_trajectory_was_given(six: Path, tmp_path: Path) -> None:
    one, two = thinking.Teacher(), thinking.Teacher()
    two.thoughts = dict.fromkeys(two.thoughts, "Let me count.\n\nAnswer: 1")
    with FakeEndpoint(one, continues=True) as first, FakeEndpoint(two, continues=True) as second:
        one.broken = {"0", "1"}
        collect(with_thoughts(six, first.url), tmp_path / "a")
        collect(with_thoughts(six, second.url), tmp_path / "b")
        (tmp_path / "a" / "trajectories.jsonl").write_text("")  # its thoughts are there, its rollouts are not
        merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    found = load_first_thoughts(tmp_path / "merged")
    assert found is not None
    assert {line.prefix for line in found.lines.values()} == {"Let me count."}
    assert replay(tmp_path / "merged", tmp_path / "replayed").unfinished == 0


def test_first_thoughts_given_in_two_ways_are_refused_unless_told(six: Path, tmp_path: Path) -> None:
    with FakeEndpoint(thinking.Teacher(), continues=True) as endpoint:
        for number in (1, 2):
            collect(with_thoughts(six, endpoint.url, shard=f"{number}/2"), tmp_path / str(number))
    way = tmp_path / "2" / "first-thought" / "endpoint.json"
    write_json(way, {**read_json(way), "via": "instruction"})
    shards = [tmp_path / "1", tmp_path / "2"]
    with pytest.raises(ConfigError, match=r"different ways \(prefill, instruction\)"):
        merge_runs(shards, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge_runs(shards, tmp_path / "merged", any_settings=True).trajectories == 6
    assert not (tmp_path / "merged" / "first-thought").exists()
