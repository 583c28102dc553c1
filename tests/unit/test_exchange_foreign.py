"""Trajectories as other programs write them, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import AgentkdError, ConfigError, DataError
from agentkd.exchange import FORMATS, import_run, rows
from agentkd.filter import filter_run
from agentkd.record import read_trajectories, write_jsonl
from agentkd.task import Task
from agentkd.testing import ScriptedModel
from agentkd.trajectory import StopReason, Trajectory

pytest.importorskip("atif")
pytest.importorskip("datasets")

CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Oslo?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [WEATHER],
    "answer": "It rains.",
}  # fmt: skip
SWIFT = {
    "tools": json.dumps([WEATHER]),
    "messages": [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "tool_call", "content": json.dumps(CALL)},
        {"role": "tool_response", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
}
SHAREGPT = {
    "system": "You help.",
    "tools": json.dumps([WEATHER["function"]]),
    "conversations": [
        {"from": "human", "value": "Weather in Oslo?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ],
}
ATIF = {
    "schema_version": "ATIF-v1.8",
    "session_id": "s1",
    "agent": {"name": "other", "version": "2", "model_name": "m1", "tool_definitions": [WEATHER]},
    "steps": [
        {"step_id": 1, "source": "user", "message": "Weather in Oslo?"},
        {
            "step_id": 2,
            "source": "agent",
            "model_name": "m2",
            "message": "I look.",
            "tool_calls": [
                {"tool_call_id": "1", "function_name": "get_weather", "arguments": {"city": "Oslo"}}
            ],
            "observation": {
                "results": [{"source_call_id": "1", "content": [{"type": "text", "text": "rain"}]}]
            },
            "metrics": {"prompt_tokens": 5, "completion_tokens": 2, "completion_token_ids": [4, 5]},
        },
        {"step_id": 3, "source": "agent", "message": "It rains.", "extra": {"x": 1}},
    ],
    "extra": {"y": 2},
}  # fmt: skip


def imported(path: Path, name: str, content: Any, suffix: str = ".jsonl", **options: Any) -> list[Trajectory]:
    source = path / f"source{suffix}"
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        source.write_text(text, encoding="utf-8")
    import_run(source, path / "run", name, **options)
    return read_trajectories(path / "run" / "trajectories.jsonl")


@pytest.mark.parametrize(
    ("name", "row"), [("chat", OPENAI), ("chat", SWIFT), ("chat", SHAREGPT), ("atif", ATIF)]
)
def test_a_tool_calling_agent_becomes_a_code_agent(name: str, row: Any, tmp_path: Path) -> None:
    (item,) = imported(tmp_path, name, [row])
    assert item.task.question == "Weather in Oslo?"
    assert [step.code for step in item.steps] == [
        "print(get_weather(city='Oslo'))",
        "final_answer('It rains.')",
    ]
    assert item.steps[0].output.endswith("```python\nprint(get_weather(city='Oslo'))\n```")
    assert item.steps[0].observation == "Observation:\nrain"
    assert (item.answer, item.stop_reason) == ("It rains.", StopReason.FINAL_ANSWER)
    assert [json.loads(tool)["name"] for tool in item.tools] == ["get_weather"]
    assert all(step.failure is None and "recast" in step.repairs for step in item.steps)


def test_what_atif_measured_is_kept_and_what_has_no_place_is_counted(tmp_path: Path) -> None:
    source = tmp_path / "one.json"
    source.write_text(json.dumps(ATIF))
    done = import_run(source, tmp_path / "run", "atif")
    (item,) = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    assert (item.model, item.steps[0].actor, item.steps[0].usage.input_tokens) == ("m1", "m2", 5)
    assert item.steps[0].output_token_ids == (4, 5)
    assert (done.lost["steps.extra.x"], done.lost["extra.y"]) == (1, 1)


def test_a_chain_of_thought_is_one(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "f?"}, {"role": "assistant", "content": "Add.\nAnswer: f(2)"}]
    (item,) = imported(tmp_path, "chat", [{"messages": talk, "answer": "f(2)"}])
    assert (item.kind, item.answer, item.correct, item.stop_reason) == ("cot", "f(2)", True, "final_answer")


def test_runs_of_one_task_are_numbered(tmp_path: Path) -> None:
    row = {"task_id": "t", "question": "q", "answer": "1", "steps": [
        {"thought": "", "code": "final_answer(1)", "observation": ""}]}  # fmt: skip
    items = imported(tmp_path, "steps", [row, row, {**row, "task_id": "u"}])
    assert [item.id for item in items] == ["t#0", "t#1", "u#0"]
    assert len(filter_run(tmp_path / "run", tmp_path / "kept").kept) == 2


def test_a_run_of_smolagents_itself(tmp_path: Path) -> None:
    from smolagents import CodeAgent

    outputs = [
        "Thought: I divide.\n<code>\nprint(1 / 0)\n</code>",
        "Thought: I add.\n<code>\nx = 1 + 2\nprint(x)\nx\n</code>",
        "Thought: Done.\n<code>\nfinal_answer(x)\n</code>",
    ]
    agent = CodeAgent(tools=[], model=ScriptedModel(outputs), verbosity_level=0)
    agent.run("How much is 1 + 2?")
    source = tmp_path / "memory.json"
    source.write_text(json.dumps(agent.memory.get_full_steps()))
    write_jsonl(tmp_path / "tasks.jsonl", [Task(id="sum", question="How much is 1 + 2?", answer="3")])
    done = import_run(source, tmp_path / "run", "smolagents", tasks=tmp_path / "tasks.jsonl")
    (item,) = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    assert (item.id, item.task.id, item.answer, item.correct, done.correct) == ("sum#0", "sum", "3", True, 1)
    assert [step.code for step in item.steps] == ["print(1 / 0)", "x = 1 + 2\nprint(x)\nx", "final_answer(x)"]
    assert [step.thought for step in item.steps] == ["I divide.", "I add.", "Done."]
    failure = item.steps[0].failure
    assert failure is not None and failure.kind == "execution" and "ZeroDivisionError" in failure.message
    assert item.steps[1].observation == "Observation:\n3\nOut: 3"
    assert item.steps[0].output == "Thought: I divide.\n```python\nprint(1 / 0)\n```"
    assert "<code>" in item.steps[0].raw and "expert assistant" in item.system_prompt
    assert item.usage.input_tokens == 30


def published(steps: list[Any], **changes: Any) -> dict[str, Any]:
    """A row in the form of the published set."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You act."}]},
        {"role": "user", "content": [{"type": "text", "text": "New task:\nHow many?\n\nIMPORTANT: ..."}]},
        *({"role": role, "content": [{"type": "text", "text": text}]} for role, text in steps),
    ]
    return {
        "model_id": "Qwen",
        "question": "How many?",
        "generated_answer": 3,
        "true_answer": "3",
        "log_data": {"messages": messages, "original_memory": {}, "metadata": {"cost": {"total_cost": 0.1}}},
        "cost": 0.1,
        "score": 1,
        **changes,
    }


PUBLISHED = [
    ("assistant", "Thought: I search.\nCode:\n```py\nr = web_search(query='x')\nprint(r)\n```<end_code>"),
    (
        "tool-call",
        "Calling tools:\n[{'id': 'call_1', 'type': 'function', 'function': {'name': 'python_interpreter', "
        "'arguments': \"r = web_search(query='x')\\nprint(r)\"}}]",
    ),
    (
        "tool-response",
        "Call id: call_1\nObservation:\nExecution logs:\nthree\nLast output from code snippet:\nNone",
    ),
    ("assistant", "Thought: I err.\nCode:\n```py\n1/0\n```<end_code>"),
    (
        "tool-call",
        "Calling tools:\n[{'id': 'call_2', 'type': 'function', 'function': {'name': 'python_interpreter', "
        "'arguments': '1/0'}}]",
    ),
    (
        "tool-response",
        "Call id: call_2\nError:\nCode execution failed at line '1/0' due to: ZeroDivisionError\n"
        "Now let's retry: take care not to repeat previous errors! If you have ...\n",
    ),
    ("assistant", "I forgot the code."),
    ("tool-response", "Error:\nError in code parsing:\nno code\nNow let's retry: take care\n"),
    ("assistant", "Thought: Done.\nCode:\n```py\nfinal_answer(3)\n```<end_code>"),
    (
        "tool-call",
        "Calling tools:\n[{'id': 'call_4', 'type': 'function', 'function': {'name': 'python_interpreter', "
        "'arguments': 'final_answer(3)'}}]",
    ),
    ("tool-response", "Call id: call_4\nObservation:\nExecution logs:\nLast output from code snippet:\n3"),
]


@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_of_the_published_set(as_text: bool, tmp_path: Path) -> None:
    row = published(PUBLISHED)
    if as_text:  # as it stands on the hub
        row["log_data"] = json.dumps(row["log_data"])
    (item,) = imported(tmp_path, "reference", [row])
    assert item.task.question == "How many?"  # without the instruction that was put behind it
    assert (item.model, item.answer, item.correct) == ("Qwen", "3", True)
    assert [step.code for step in item.steps] == [
        "r = web_search(query='x')\nprint(r)",
        "1/0",
        None,
        "final_answer(3)",
    ]
    assert item.steps[0].output.startswith("Thought: I search.\n```python\nr = web")
    assert item.steps[0].observation == "Observation:\nthree"
    assert [step.failure.kind if step.failure else None for step in item.steps] == [
        None,
        "execution",
        "parse",
        None,
    ]
    assert item.steps[-1].is_final and item.steps[-1].observation is None
    assert [json.loads(tool)["name"] for tool in item.tools] == ["web_search"]


def test_the_published_filter_reads_our_rows(tmp_path: Path) -> None:
    """It looks for these words in the text of tool responses."""
    from agentkd.exchange.reference import REFERENCE

    (item,) = imported(tmp_path, "reference", [published(PUBLISHED)])
    row = REFERENCE.encode(item)
    replies = [m["content"][0]["text"] for m in row["log_data"]["messages"] if m["role"] == "tool-response"]
    assert sum("Error in code parsing" in text for text in replies) == 1
    assert sum("Code execution failed" in text for text in replies) == 1
    assert row["score"] == 1


REACT = """\
Question: Musician and satirist Allie Goertz wrote a song about whom?
Thought 1: I search Allie Goertz.
Action 1: Search[Allie Goertz]
Observation 1: Allison Beth "Allie" Goertz is an American musician.
Thought 2: I look up the song.
Action 2: Lookup[song]
Observation 2: (Result 1 / 1) "Milhouse"
Thought 3: It is Milhouse.
Action 3: Finish[Milhouse]

Question: How much is 2 ** 10?
Thought: I should calculate.
Action: calculator
Action Input: 2 ** 10
Observation: 1024
Thought: I now know the final answer
Final Answer: 1024
"""


def test_react_text_of_the_paper_and_of_langchain(tmp_path: Path) -> None:
    first, second = imported(tmp_path, "react", REACT, ".txt")
    assert [step.code for step in first.steps] == [
        "print(search('Allie Goertz'))",
        "print(lookup('song'))",
        "final_answer('Milhouse')",
    ]
    assert first.answer == "Milhouse"
    assert [json.loads(tool)["name"] for tool in first.tools] == ["search", "lookup"]
    assert [step.code for step in second.steps] == ["print(calculator('2 ** 10'))", "final_answer('1024')"]
    assert second.steps[1].thought == "I now know the final answer"
    assert (second.answer, second.stop_reason) == ("1024", StopReason.FINAL_ANSWER)


GOOD = json.dumps({"task_id": "a", "question": "q", "steps": []}).encode() + b"\n"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"not json\n", "line 1: not JSON"),
        (b"\n[1, 2]\n", "line 2: not a JSON object but a list"),
        (b'"text"\n', "line 1: not a JSON object but a text"),
        (b'{"colour": 3}\n', "line 1: not a row of the format"),
        (b'{"messages": 3, "steps": 3, "log_data": 3, "text": 3, "question": 3}\n', "line 1: not a row"),
        (b'{"a": "\xff\xfe"}\n', "line 1: not UTF-8"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (b'{"a": "' + b"x" * 3000 + b'"}\n', "line 1: longer than"),
    ],
)
def test_a_bad_file_is_named_with_its_row_and_nothing_is_written(
    name: str, content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said == "line 1: longer than":
        monkeypatch.setattr(rows, "LONGEST_ROW", 2000)
    with pytest.raises(DataError) as caught:
        imported(tmp_path, name, content)
    assert said in str(caught.value) and caught.value.hint
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Answer: 1"}]


def chat_row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "messages": TALK, **changes}


@pytest.mark.parametrize(
    ("rows_", "said"),
    [
        ([chat_row(), chat_row()], "line 2: the id 'a' stands there twice (first in line 1)"),
        ([chat_row(), chat_row(id="a#1", messages=[{"role": "user", "content": "r"}, TALK[1]])],
         "line 2: the task id 'a' stands there with another question"),
        ([chat_row(), chat_row(id="b", messages=[{"role": "user", "content": "q"}])], "line 2: no step"),
        ([chat_row(messages=[{"role": "assistant", "content": "a"}])], "no user message"),
        ([chat_row(messages=[{"role": "boss", "content": "a"}])], "unknown role 'boss'"),
        ([chat_row(messages=[{"content": "a"}])], "no 'role'"),
        ([chat_row(messages=[{"role": "user", "content": 3}])], "neither a text nor a list"),
        ([chat_row(tools="[")], "line 1"),
        ([chat_row(tools=[{"type": "function"}])], "no 'name'"),
        ([chat_row(agentkd="{}")], "no 'trajectory'"),
        ([chat_row(agentkd="3")], "line 1"),
        ([chat_row(answer=3)], "answer: Input should be a valid string"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_named(rows_: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        imported(tmp_path, "chat", rows_)
    assert said in str(caught.value)
    assert not list((tmp_path / "run").iterdir())


def test_half_a_surrogate_pair_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    row = json.dumps(chat_row()).replace("Answer: 1", "\\ud83d Answer").encode()
    (item,) = imported(tmp_path, "chat", b"\xef\xbb\xbf" + row + b"\n")
    assert item.steps[0].output == "? Answer"


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_a_file_that_is_not_of_its_suffix(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="source"):
        imported(tmp_path, "chat", b"garbage", suffix)


def test_what_else_can_be_wrong(tmp_path: Path) -> None:
    def refused(error: type[AgentkdError], said: str, source: Path, name: str = "chat", **more: Any) -> None:
        with pytest.raises(error, match=said):
            import_run(source, tmp_path / "run", name, **more)

    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(chat_row()) + "\n")
    refused(ConfigError, "Unknown format 'x'", good, "x")
    refused(ConfigError, "Unknown scorer 'x'", good, scorer="x")
    refused(DataError, "There is no file", tmp_path / "nothing.jsonl")
    refused(DataError, "There is no file", good, tasks=tmp_path / "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    refused(DataError, "is empty", tmp_path / "empty")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    refused(DataError, "several splits", tmp_path / "splits", "datasets")
    assert not list((tmp_path / "run").glob("*"))
    import_run(good, tmp_path / "run", "chat")
    refused(ConfigError, "holds a run already", good)
