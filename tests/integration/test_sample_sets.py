"""The sample sets under trajectories/: they load, are what their manifest says, and replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentkd.prompt import observation_text
from agentkd.record import file_hash, read_json, read_trajectories
from agentkd.sandbox import CodeFailure, open_sandbox
from agentkd.scorer import score
from agentkd.trajectory import Step, Trajectory

ROOT = Path(__file__).resolve().parents[2] / "trajectories"
SETS = sorted(path.parent for path in ROOT.glob("*/manifest.json"))


class Recorded:
    """A tool that answers as it did when the trajectory was recorded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs = {"query": {"type": "string"}}
        self.results: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self.results.pop(0)


def observed(session: Any, step: Step) -> tuple[str | None, Any]:
    try:
        done = session(step.code)
    except CodeFailure as exc:
        return observation_text(exc.printed, error=exc.message), None
    if done.is_final_answer:
        return None, done.output
    return observation_text(done.logs, done.output), None


def replay(trajectory: Trajectory) -> str | None:
    session = open_sandbox()
    tools = {"search": Recorded("search"), "final_answer": object()}
    session.send_tools(tools)
    answer = None
    try:
        for step in trajectory.steps:
            if step.code is None:
                continue
            tools["search"].results = [str(use.result) for use in step.tool_uses]  # type: ignore[attr-defined]
            shown, answer = observed(session, step)
            assert shown == step.observation, f"{trajectory.id}, step {step.number}"
    finally:
        session.cleanup()
    return None if answer is None else str(answer)


def test_there_is_one_set_with_search_and_one_with_code() -> None:
    assert [path.name for path in SETS] == ["almanac", "arithmetic"]


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_a_set_is_what_its_manifest_says(folder: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    records = read_trajectories(folder / "trajectories.jsonl")
    assert 50 <= len(records) <= 200
    assert manifest["outputs"]["trajectories.jsonl"] == file_hash(folder / "trajectories.jsonl")
    assert manifest["counts"]["finished"] == len(records)
    assert manifest["counts"]["correct"] == sum(record.correct for record in records)
    assert {record.labels["teacher"] for record in records} == {"offline expert (programmatic)"}
    assert "programmatic" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_a_set_replays(folder: Path) -> None:
    for record in read_trajectories(folder / "trajectories.jsonl"):
        answer = replay(record)
        assert answer == record.answer
        assert record.score is not None
        assert score(record.task, answer).value == record.score.value
