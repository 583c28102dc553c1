"""``agentkd evaluate`` on the command line, against an endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from agentkd.cli import app
from agentkd.errors import ConfigError, DataError
from agentkd.record import read_trajectories, write_jsonl
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.unit.test_measures import run

ACTION = "Thought: I know it.\n```python\nfinal_answer(4)\n```"
QUESTIONS = {"What is two plus two, please?": "4", "What is three plus three, please?": "6"}


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint(lambda messages: ACTION) as found:
        yield found


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    rows = [{"id": f"t{i}", "question": q, "answer": a} for i, (q, a) in enumerate(QUESTIONS.items())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(endpoint: FakeEndpoint, tasks: Path, out: Path, *options: str | Path) -> Result:
    fixed = ["evaluate", "--api-base", endpoint.url, "--model", "fake", "--sandbox", "local"]
    return CliRunner().invoke(
        app,
        [*fixed, "--tasks", str(tasks), "--split", "all", "--out", str(out), *map(str, options), "--json"],
    )


def read(done: Result) -> Any:
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def seeds(endpoint: FakeEndpoint) -> list[int]:
    """Of the requests of rollouts; the one that asks whether the endpoint is alive has none."""
    return sorted(body["seed"] for body in endpoint.requests if "seed" in body)


def test_runs_and_overlap(endpoint: FakeEndpoint, tasks: Path, tmp_path: Path) -> None:
    learnt = run("seen").model_copy(update={"task": Task(id="seen", question=next(iter(QUESTIONS)))})
    kept = tmp_path / "kept"
    write_jsonl(kept / "kept.jsonl", [learnt])
    prices = tmp_path / "prices.toml"
    prices.write_text("[fake]\ninput = 1.0\noutput = 2.0\n", encoding="utf-8")
    options = ("--temperature", "0.7", "--runs", "2", "--seed", "5", "--trained-on", kept, "--prices", prices)
    found = read(evaluate(endpoint, tasks, tmp_path / "out", *options))
    assert found["overall"]["n"] == 4
    assert (found["measures"]["runs"], found["measures"]["pass_at"]) == (2, {"1": 0.5, "2": 0.5})
    assert found["measures"]["run_accuracies"] == [0.5, 0.5]
    assert found["measures"]["cost_per_task"] > 0
    assert found["overlap"] == [{"test": "t0", "train": "seen", "kind": "exact", "share": 1.0}]
    assert json.loads((tmp_path / "out" / "overlap.json").read_text()) == found["overlap"]
    assert seeds(endpoint) == [5, 5, 6, 6]
    asked = len(endpoint.requests)
    assert read(evaluate(endpoint, tasks, tmp_path / "out", *options)) == found
    assert len(endpoint.requests) == asked  # nothing was left to run


def test_a_folder_of_one_run_goes_on_with_more(endpoint: FakeEndpoint, tasks: Path, tmp_path: Path) -> None:
    sampled = ("--temperature", "0.7")
    read(evaluate(endpoint, tasks, tmp_path / "out", *sampled))
    assert seeds(endpoint) == [0, 0]
    found = read(evaluate(endpoint, tasks, tmp_path / "out", *sampled, "--runs", "3"))
    assert found["measures"]["runs"] == 3
    assert seeds(endpoint) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--temperature", "0.9"), "another temperature"),
        (("--max-tokens", "99"), "another max_tokens"),
        (("--kind", "cot"), "another kind"),
        (("--seed", "1"), "other tasks"),  # they are drawn by it, too
        (("--actions", "4"), "another sampler"),
        (("--router", "never"), "another router"),
        (("--model", "another"), "another model"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    endpoint: FakeEndpoint, tasks: Path, tmp_path: Path, changed: tuple[str, str], said: str
) -> None:
    sampled = ("--temperature", "0.7")
    read(evaluate(endpoint, tasks, tmp_path / "out", *sampled))
    done = evaluate(endpoint, tasks, tmp_path / "out", *sampled, *changed)
    assert isinstance(done.exception, ConfigError)
    assert said in done.exception.message


def test_missing_training_trajectories_are_noticed_before_anything_is_run(
    endpoint: FakeEndpoint, tasks: Path, tmp_path: Path
) -> None:
    done = evaluate(endpoint, tasks, tmp_path / "out", "--trained-on", tmp_path / "none.jsonl")
    assert isinstance(done.exception, DataError)
    assert endpoint.requests == []


def test_the_trajectories_say_how_they_were_sampled(
    endpoint: FakeEndpoint, tasks: Path, tmp_path: Path
) -> None:
    read(evaluate(endpoint, tasks, tmp_path / "a", "--temperature", "0.7", "--seed", "3"))
    read(evaluate(endpoint, tasks, tmp_path / "b"))
    assert {item.config["seed"] for item in read_trajectories(tmp_path / "a" / "trajectories.jsonl")} == {3}
    assert all("seed" not in item.config for item in read_trajectories(tmp_path / "b" / "trajectories.jsonl"))


def test_what_counts_as_a_tool_is_a_setting_of_the_router(
    endpoint: FakeEndpoint, tasks: Path, tmp_path: Path
) -> None:
    found = read(evaluate(endpoint, tasks, tmp_path / "out", "--router", "all", "--tools", "search"))
    assert found["tools"] == "search"
    for kind in ("never", "implicit", "forced", "agreement"):
        runs = read_trajectories(tmp_path / "out" / kind / "trajectories.jsonl")
        assert {run.config["router"]["tools"] for run in runs} == {"search"}
    alone = evaluate(endpoint, tasks, tmp_path / "alone", "--tools", "search")
    assert isinstance(alone.exception, ConfigError)
    assert "Only a router" in alone.exception.message
    unknown = evaluate(endpoint, tasks, tmp_path / "unknown", "--router", "never", "--tools", "hammer")
    assert isinstance(unknown.exception, ConfigError)
    assert "no kind of tool" in unknown.exception.message
