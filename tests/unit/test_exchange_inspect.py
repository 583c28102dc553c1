"""Inspect's logs: what its own reader finds in ours, and what we find in one of its own making."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentkd.errors import DataError
from agentkd.exchange import export_run, import_run
from agentkd.record import read_trajectories
from agentkd.trajectory import StopReason, Trajectory
from tests.unit.test_report import make_run
from tests.unit.test_view import write_run


def runs() -> list[Trajectory]:
    errored = make_run(2, False).model_copy(
        update={"stop_reason": StopReason.PROVIDER_ERROR, "score": None, "answer": None}
    )
    again = make_run(0, False).model_copy(update={"id": "products-0#1", "sample": 1})
    return [make_run(0, True), again, make_run(1, False), errored]


def test_a_log_that_comes_back_whole(tmp_path: Path) -> None:
    mine = runs()
    done = export_run(write_run(tmp_path / "run", mine), tmp_path / "log.json", "inspect")
    assert not done.lost
    log = json.loads((tmp_path / "log.json").read_text())
    assert (log["version"], log["status"], len(log["samples"])) == (2, "success", 4)
    assert log["eval"]["dataset"]["sample_ids"] == ["products-0", "products-1", "products-2"]
    assert log["results"]["scores"][0]["metrics"]["mean"]["value"] == pytest.approx(1 / 3)
    assert log["results"]["completed_samples"] == 3
    first = log["samples"][0]
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant", "tool"]
    assert first["messages"][2]["tool_calls"][0]["arguments"] == {"code": mine[0].steps[0].code}
    assert [sample["epoch"] for sample in log["samples"]] == [1, 2, 1, 1]
    import_run(tmp_path / "log.json", tmp_path / "back", "inspect")
    assert read_trajectories(tmp_path / "back" / "trajectories.jsonl") == mine


def test_inspects_own_reader_takes_it(tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    export_run(write_run(tmp_path / "run", runs()), tmp_path / "log.json", "inspect")
    read = log.read_eval_log(str(tmp_path / "log.json"))
    assert [sample.epoch for sample in read.samples] == [1, 2, 1, 1]
    assert read.samples[0].scores["score"].value == 1.0
    assert read.samples[0].messages[-1].role == "tool"
    assert read.samples[3].error is not None


def test_a_log_of_another_agent(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "How warm is it in Oslo?"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I ask."}],
            "tool_calls": [
                {"id": "1", "function": "weather", "arguments": {"city": "Oslo"}, "type": "function"}
            ],
        },
        {"role": "tool", "content": "7 degrees", "tool_call_id": "1", "function": "weather"},
        {"role": "assistant", "content": "Answer: 7"},
    ]
    sample = {
        "id": 5, "epoch": 1, "input": [messages[0]], "target": ["7", "seven"], "messages": messages,
        "output": {"model": "m", "choices": [], "completion": "7"}, "events": [{"event": "x"}],
    }  # fmt: skip
    (tmp_path / "log.json").write_text(json.dumps({"version": 2, "samples": [sample]}))
    done = import_run(tmp_path / "log.json", tmp_path / "run", "inspect")
    [run] = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    assert (run.id, run.task.question, run.answer) == ("5#0", "How warm is it in Oslo?", "7")
    assert run.steps[0].code == "print(weather(city='Oslo'))"
    assert run.steps[0].observation == "Observation:\n7 degrees"
    assert done.lost["events.event"] == 1


@pytest.mark.parametrize("text", ["{}", '{"samples": null}', "[1]", '{"samples": [{"id": 1}]}'])
def test_what_is_no_log(text: str, tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(DataError, match=r"log\.json, (file|row 1|sample 1)"):
        import_run(tmp_path / "log.json", tmp_path / "run", "inspect")
