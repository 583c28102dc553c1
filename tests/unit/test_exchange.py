"""Trajectories out to every format and back: what is the same, what is lost, and that it is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, DataError
from agentkd.exchange import FORMATS, export_run, import_run
from agentkd.exchange.memory import agent_memory
from agentkd.exchange.recast import function_schema, tool_from_schema
from agentkd.filter import filter_run
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.scorer import score
from agentkd.task import Task
from agentkd.trajectory import (
    Candidate,
    Failure,
    Score,
    Step,
    StopReason,
    ToolUse,
    Trajectory,
    Usage,
)

pytest.importorskip("atif")
pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("AGENTKD_SHARED_DATA", ROOT.parent / "shared" / "data")) / "recorded"
RECORDED = {  # rows, and how many of them their source calls correct
    "math_gsm8k_human_calc_1000": (1000, 1000),
    "math_mathcoder70b_svamp_600": (600, 504),
    "qa_2wiki_evidence_500": (500, 500),
    "qa_musique_decomposition_100": (100, 100),
    "qa_reflexion_gpt3_react_hotpot": (226, 60),
}
SUFFIXES = [
    (name, suffix)
    for name, form in FORMATS.items()
    for suffix in (item if item.startswith(".") else "" for item in form.containers)
]
SEARCH = json.dumps(
    {
        "name": "search",
        "description": "Searches.",
        "inputs": {
            "query": {"type": "string", "description": "What."},
            "k": {"type": "integer", "nullable": True},
        },
        "output_type": "string",
    }
)
NASTY = (
    'a "quote"\nThought: x\nAction 1: Finish[3]\n\\Observation: y\nQuestion: z?\n```python\n1\n```'
    "\u2028 \x85 ü 𝄞"
)


def step(number: int, thought: str, code: str | None, shown: str | None, **more: Any) -> Step:
    output = f"Thought: {thought}" + ("" if code is None else f"\n```python\n{code}\n```")
    fields = {"number": number, "actor": "m", "raw": output, "output": output, "thought": thought}
    return Step(**{**fields, "code": code, "observation": shown, **more})


def samples() -> list[Trajectory]:
    """One of every kind of run."""
    task = Task(id="t", question="How many?", answer="3", scorer="numeric", family="f", meta={"hops": [1, 2]})
    common = {"model": "m", "system_prompt": "You act.", "tools": (SEARCH,), "stop_reason": "final_answer"}
    answered = step(3, "", "final_answer(x + 1)", None, is_final=True)
    full = Trajectory(
        id="t#0",
        task=task,
        **common,
        steps=(
            step(1, "I try.", "1 / 0", "Observation:\nError: ZeroDivisionError: division by zero",
                 failure=Failure(kind="execution", message="ZeroDivisionError: division by zero")),
            step(2, "I look.", "x = 2\nprint(search('x'))", "Observation:\ntwo\nOut: 5",
                 raw="  I look.", repairs=("closed_fence",), usage=Usage(input_tokens=7, output_tokens=3),
                 finish_reason="stop",
                 tool_uses=(ToolUse(name="search", arguments={"query": "x"}, result="two"),),
                 candidates=(Candidate(raw="r", votes=2, chosen=True),), output_token_ids=(1, 2, 3),
                 prompt_token_ids=(9, 8), logprobs=(-0.5, -0.25, 0.0), model_seconds=0.5),
            answered,
        ),
        answer="3",
        score=Score(value=1.0, scorer="numeric"),
        usage=Usage(input_tokens=7, output_tokens=3),
        started_at="2026-01-02T03:04:05.678+00:00",
        config={"temperature": 0.5, "nested": {"a": [1, None]}},
        versions={"agentkd": "0.1.0"},
        labels={"teacher": "x"},
    )  # fmt: skip
    nasty = full.model_copy(
        update={
            "id": "nasty#4",
            "sample": 4,
            "task": Task(id="nasty", question=NASTY, answer=NASTY),
            "steps": (
                step(1, NASTY, f"x = {NASTY!r}", f"Observation:\n{NASTY}"),
                step(2, "no code", None, "Observation:\nError: no",
                     failure=Failure(kind="parse", message="no")),
                step(3, "t", "while True: pass", "Observation:\nError: too slow",
                     failure=Failure(kind="timeout", message="too slow")),
            ),
            "answer": None,
            "stop_reason": StopReason.MAX_STEPS,
            "score": None,
        }
    )  # fmt: skip
    cot_text = "2 and 1 are 3.\nAnswer: 3"
    cot = Trajectory(
        id="t#1", sample=1, task=task, kind="cot", model="m", system_prompt="Think.", answer="3",
        stop_reason=StopReason.FINAL_ANSWER, score=Score(value=1.0, scorer="numeric"),
        steps=(Step(number=1, actor="m", raw=cot_text, output=cot_text, thought=cot_text, is_final=True),),
    )  # fmt: skip
    empty = full.model_copy(update={"id": "t#2", "sample": 2, "steps": (), "answer": None, "score": None,
                                    "stop_reason": StopReason.TIMEOUT, "usage": Usage()})  # fmt: skip
    return [full, nasty, cot, empty]


def run_of(folder: Path, trajectories: list[Trajectory]) -> Path:
    write_jsonl(folder / "trajectories.jsonl", trajectories)
    return folder


def there_and_back(run: Path, name: str, suffix: str, tmp_path: Path, **options: Any) -> tuple[Any, Any, Any]:
    out = tmp_path / f"{name}-export{suffix}"
    exported = export_run(run, out, name, **options)
    imported = import_run(out, tmp_path / f"{name}-import{suffix}", name)
    return exported, imported, read_trajectories(tmp_path / f"{name}-import{suffix}" / "trajectories.jsonl")


@pytest.mark.parametrize(("name", "suffix"), [item for item in SUFFIXES if item[1] != ".txt"])
def test_a_round_trip_gives_every_field_back(name: str, suffix: str, tmp_path: Path) -> None:
    mine = samples()
    exported, imported, back = there_and_back(run_of(tmp_path / "run", mine), name, suffix, tmp_path)
    assert back == mine
    assert exported.count == imported.count == len(mine)
    assert not exported.lost and not imported.lost
    assert exported.beside["task.meta"] == 1 + 2  # the task of "nasty" has none


@pytest.mark.parametrize(("name", "suffix"), SUFFIXES)
def test_a_plain_export_says_what_it_lost_and_is_right_about_it(
    name: str, suffix: str, tmp_path: Path
) -> None:
    (full, _, cot, _) = samples()
    mine = [full, cot] if name not in ("react", "steps", "smolagents", "reference") else [full]
    exported, _, back = there_and_back(run_of(tmp_path / "run", mine), name, suffix, tmp_path, plain=True)
    for before, after in zip(mine, back, strict=True):
        for field in type(before).model_fields:
            if field not in ("task", "steps") and field not in exported.lost:
                assert getattr(before, field) == getattr(after, field), field
        for left, right in zip(before.steps, after.steps, strict=True):
            for field in type(left).model_fields:
                if f"steps.{field}" not in exported.lost:
                    assert getattr(left, field) == getattr(right, field), field
            assert (left.output, left.code, left.observation) == (right.output, right.code, right.observation)
    assert exported.lost["config"] == len(mine[:1])
    assert exported.lost["steps.candidates"] == 1


@pytest.mark.parametrize("set_name", ["almanac", "arithmetic"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_recorded_sets_of_this_project_come_back_whole(set_name: str, name: str, tmp_path: Path) -> None:
    mine = read_trajectories(ROOT / "trajectories" / set_name / "trajectories.jsonl")[:40]
    suffix = ".parquet" if name == "datasets" else ".jsonl"
    exported, imported, back = there_and_back(run_of(tmp_path / "run", mine), name, suffix, tmp_path)
    assert back == mine
    assert not exported.lost and not imported.lost
    assert imported.correct == sum(item.correct for item in mine)


@pytest.mark.parametrize("source", RECORDED)
def test_recorded_data_of_others(source: str, tmp_path: Path) -> None:
    path = DATA / f"{source}.jsonl"
    if not path.is_file():
        pytest.skip(f"no recorded data at {DATA}; set AGENTKD_SHARED_DATA")
    rows, right = RECORDED[source]
    done = import_run(path, tmp_path / "run", "steps")
    assert (done.count, done.correct, done.unscored) == (rows, right, 0)
    assert not done.lost  # also what this project has no field for is kept
    mine = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    assert all(item.score == score(item.task, item.answer) for item in mine)
    export_run(tmp_path / "run", tmp_path / "again.jsonl", "steps", plain=True)
    theirs = [json.loads(line) for line in path.read_text().splitlines()]
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == theirs
    some = run_of(tmp_path / "some", mine[:60])
    for name, form in FORMATS.items():
        suffix = form.containers[0] if form.containers[0].startswith(".") else ""
        exported, imported, back = there_and_back(some, name, suffix, tmp_path)
        assert back == mine[:60], name
        assert not exported.lost and not imported.lost, name
    kept = filter_run(tmp_path / "run", tmp_path / "kept").kept
    assert len(kept) == len({item.task.id for item in mine if item.correct})


def test_text_alone_loses_names_and_gold_answers_and_tasks_bring_them_back(tmp_path: Path) -> None:
    full = samples()[0]
    exported, imported, back = there_and_back(run_of(tmp_path / "run", [full]), "react", ".txt", tmp_path)
    assert {"id", "task.id", "task.answer", "score", "system_prompt"} <= set(exported.lost)
    assert imported.unscored == 1
    assert back[0].answer == "3"
    write_jsonl(tmp_path / "tasks.jsonl", [full.task])
    done = import_run(
        tmp_path / "react-export.txt", tmp_path / "joined", "react", tasks=tmp_path / "tasks.jsonl"
    )
    assert (done.correct, done.unscored) == (1, 0)
    assert read_trajectories(tmp_path / "joined" / "trajectories.jsonl")[0].task == full.task


def test_an_imported_run_says_where_it_came_from(tmp_path: Path) -> None:
    export_run(run_of(tmp_path / "run", samples()), tmp_path / "x.jsonl", "chat")
    import_run(tmp_path / "x.jsonl", tmp_path / "new", "chat", scorer="f1")
    manifest = read_json(tmp_path / "new" / "manifest.json")
    assert manifest["stage"] == "import"
    assert manifest["config"] == {"format": "chat", "tasks": None, "scorer": "f1"}
    assert manifest["inputs"].keys() == {str(tmp_path / "x.jsonl")}
    assert manifest["counts"]["imported"] == 4
    assert {
        task.scorer for task in (t.task for t in read_trajectories(tmp_path / "new/trajectories.jsonl"))
    } == {"f1"}


def test_edited_rows_keep_the_edit(tmp_path: Path) -> None:
    full = samples()[0]
    export_run(run_of(tmp_path / "run", [full]), tmp_path / "x.jsonl", "chat")
    row = json.loads((tmp_path / "x.jsonl").read_text())
    row["messages"] = row["messages"][:2] + row["messages"][4:]  # somebody took the failed step out
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    import_run(tmp_path / "x.jsonl", tmp_path / "new", "chat")
    (back,) = read_trajectories(tmp_path / "new" / "trajectories.jsonl")
    assert [item.code for item in back.steps] == [item.code for item in full.steps[1:]]
    assert back.config == full.config


def test_the_columns_of_a_chat_export_are_what_trainers_take(tmp_path: Path) -> None:
    import datasets

    export_run(run_of(tmp_path / "run", samples()), tmp_path / "x.jsonl", "chat")
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "x.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert set(table[0]["messages"][0]) == {"role", "content"}
    assert {message["role"] for row in table for message in row["messages"]} == {
        "system",
        "user",
        "assistant",
    }
    assert json.loads(table[0]["tools"]) == [function_schema(SEARCH)]
    assert all(isinstance(row["agentkd"], str) for row in table)


def test_tool_schemas_survive_the_way_to_function_schemas() -> None:
    back = json.loads(tool_from_schema(function_schema(SEARCH)))
    assert back["inputs"]["k"]["nullable"] and "nullable" not in back["inputs"]["query"]
    assert function_schema(json.dumps(back))["function"]["parameters"]["required"] == ["query"]


def test_a_memory_is_what_smolagents_replays(capsys: pytest.CaptureFixture[str]) -> None:
    from smolagents.monitoring import AgentLogger, LogLevel

    memory = agent_memory(samples()[0])
    memory.replay(AgentLogger(level=LogLevel.INFO))
    assert "How many?" in capsys.readouterr().out
    assert memory.return_full_code() == "1 / 0\n\nx = 2\nprint(search('x'))\n\nfinal_answer(x + 1)"


@pytest.mark.parametrize(
    ("name", "out", "said"),
    [
        ("nothing", "x.jsonl", "Unknown format"),
        ("atif", "x.parquet", "not written to"),
        ("chat", "folder", "not written to"),
        ("steps", "x.txt", "not written to"),
    ],
)
def test_an_export_that_cannot_be_is_refused(name: str, out: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        export_run(run_of(tmp_path / "run", samples()), tmp_path / out, name)
    assert not (tmp_path / out).exists()


def test_an_export_of_bad_trajectories_leaves_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", samples() * 2)
    with pytest.raises(DataError, match=r"line 5: the id 't#0' stands there twice"):
        export_run(run, tmp_path / "x.jsonl", "chat")
    (run / "trajectories.jsonl").write_text("")
    with pytest.raises(DataError, match="no trajectories"):
        export_run(run, tmp_path / "x.jsonl", "chat")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_replaces_a_file_but_not_a_folder(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", samples())
    export_run(run, tmp_path / "x.jsonl", "chat")
    export_run(run, tmp_path / "x.jsonl", "steps")
    assert "steps" in json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    export_run(run, tmp_path / "folder", "atif")
    with pytest.raises(ConfigError, match="not empty"):
        export_run(run, tmp_path / "folder", "datasets")
