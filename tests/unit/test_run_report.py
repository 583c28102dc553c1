"""The report of any evaluation folders: labels, differences, notes on what is broken, the paper's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, DataError
from agentkd.evaluate import summarise
from agentkd.record import write_json
from agentkd.report import PAPER_SETS, beside_published, size_of
from agentkd.run_report import paper_rows, report_runs, tool_use_of
from tests.unit.test_report import make_run
from tests.unit.test_view import write_run


def document(page: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.with_name("report.json").read_text())
    return found


def test_any_evaluations_and_any_names(tmp_path: Path) -> None:
    good = write_run(tmp_path / "my student", [make_run(i, i < 9) for i in range(10)])
    poor = write_run(tmp_path / "plain", [make_run(i, i < 2) for i in range(10)])
    page = report_runs(
        [good, poor], tmp_path / "report", main="my student", groups={"all of it": ["products"]}
    )
    told = document(page)
    assert list(told["systems"]) == ["my student", "plain"]
    assert told["systems"]["plain"]["groups"]["all of it"]["correct"] == 2
    [(name, difference)] = told["differences"].items()
    assert (name, difference["mean"], difference["n_pairs"]) == (
        "my student minus plain",
        pytest.approx(0.7),
        10,
    )
    assert told["tool_use"] == {"my student": {"search": 1.0}, "plain": {"search": 1.0}}
    assert told["published"] == []
    html = page.read_text()
    assert 'href="trajectories.html#run=my%20student&amp;id=products-0%230"' in html
    assert "Kinds of failure" in html and "Tool use" in html
    assert (page.parent / "trajectories.html").is_file()
    assert "| search | 100% | 100% |" in (page.parent / "report.md").read_text()
    again = document(report_runs([good, poor], tmp_path / "again"))
    assert list(again["differences"]) == ["plain minus my student"]


def test_a_recipes_folder_finds_students_groups_and_notes(tmp_path: Path) -> None:
    for name in ("agent-x", "base", "cot-x"):
        write_run(tmp_path / "evaluate" / name, [make_run(0, True)])
    student = tmp_path / "students" / "agent-x"
    write_json(student / "student.json", {"base": "smollm2-135m"})
    (student / "loss.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    write_json(tmp_path / "recipe.json", {"groups": {"p": ["products"]}, "notes": ["Read me."]})
    told = document(report_runs([tmp_path], tmp_path / "report"))
    assert list(told["systems"]) == ["base", "cot-x", "agent-x"]
    assert list(told["differences"]) == ["agent-x minus base", "agent-x minus cot-x"]
    assert told["losses"] == {"agent-x": [[1, 2.5]]}
    assert told["notes"] == ["Read me."]
    assert "p" in told["systems"]["base"]["groups"]


def test_what_is_unfinished_of_another_version_or_without_gold_is_said(tmp_path: Path) -> None:
    run = make_run(0, True)
    no_gold = make_run(1, True)
    changed = {"task": no_gold.task.model_copy(update={"answer": None}), "score": None}
    no_gold = no_gold.model_copy(update={**changed, "versions": {"agentkd": "9"}})
    folder = write_run(tmp_path / "a", [run, no_gold], closed=False)
    (folder / "tasks.jsonl").write_text("{}\n" * 5)
    other = json.dumps({**json.loads(run.model_dump_json()), "schema_version": 7})
    with (folder / "trajectories.jsonl").open("a") as file:
        file.write(other + "\n" + other[:50])
    told = document(report_runs([folder], tmp_path / "report"))
    assert told["systems"]["a"]["overall"]["n"] == 2
    unread, unfinished, ungraded = told["notes"]
    assert "1 lines could not be read" in unread and "schema_version" in unread
    assert "2 of 5 tasks" in unfinished
    assert "1 runs have no gold answer" in ungraded


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no folder"):
        report_runs([tmp_path / "x"], tmp_path / "r")
    with pytest.raises(DataError, match="no evaluation"):
        report_runs([tmp_path], tmp_path / "r")
    folder = write_run(tmp_path / "a", [make_run(0, True)])
    with pytest.raises(ConfigError, match="no system 'b'"):
        report_runs([folder], tmp_path / "r", main="b")
    with pytest.raises(ConfigError, match="named twice"):
        report_runs([folder, folder], tmp_path / "r")
    with pytest.raises(ConfigError, match="no students of size"):
        report_runs([folder], tmp_path / "r", paper="70B")


def test_the_papers_table_only_where_its_sets_were_run() -> None:
    runs = [make_run(i, i % 2 == 0, family=name) for name in PAPER_SETS for i in range(4)]
    results = [summarise("agent-distilled + first thought", runs), summarise("CoT-distilled", runs[:8])]
    rows = {row.method: row for row in beside_published(results, "0.5B")}
    assert rows["agent distilled, first thought"][1:] == (19.99, "agent-distilled + first thought", 50.0)
    assert rows["CoT distilled"][1:] == (13.64, "CoT-distilled", None)
    assert rows["agent distilled"][2:] == (None, None)
    assert [row.method for row in beside_published([], "32B")] == ["CoT prompt", "agent prompt"]
    assert size_of("Qwen/Qwen2.5-1.5B-Instruct") == "1.5B"
    assert size_of("Qwen/Qwen2.5-14B-Instruct") is None
    assert len(paper_rows(results, ["Qwen/Qwen2.5-0.5B-Instruct"])) == 8
    assert paper_rows(results, ["smollm2-135m"]) == []
    assert paper_rows(results[1:], ["Qwen/Qwen2.5-0.5B-Instruct"]) == []


def test_tool_use_counts_runs_not_calls() -> None:
    run = make_run(0, True)
    twice = run.model_copy(update={"steps": (run.steps[0], run.steps[0])})
    none = make_run(1, True)
    none = none.model_copy(update={"steps": (none.steps[0].model_copy(update={"tool_uses": ()}),)})
    assert tool_use_of([twice, none]) == {"search": 0.5}
    assert tool_use_of([]) == {}
