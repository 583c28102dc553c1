"""The data sets of tool-usage adaptation: made of toy trajectories, with a scripted student and teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from smolagents.models import ChatMessage, MessageRole, Model

from agentkd.adapt import (
    AdaptConfig,
    Decision,
    Rejected,
    Respondent,
    Solution,
    adapt,
    balanced_copies,
    literal_rewriter,
    model_rewriter,
)
from agentkd.adapt.knowledge import _word_of_tools, literal, rewrite_request
from agentkd.agent_config import AgentConfig
from agentkd.errors import ConfigError, DataError, ProviderError
from agentkd.prompt import DIRECT, STUDENT, action_text
from agentkd.record import iter_jsonl, read_json, read_trajectories, write_jsonl
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from agentkd.tool_use import is_direct, used_tool
from agentkd.trajectory import Score, Step, StopReason, ToolUse, Trajectory

SEARCH = json.dumps(
    {"name": "search", "description": "d", "inputs": {"query": {"type": "string"}}, "output_type": "string"}
)


def trace(name: str, answer: str, *, right: bool = True, tools: bool = True, sample: int = 0) -> Trajectory:
    """A question about ``name``, looked up and answered."""
    query = f'print(search("{name}"))'
    found = f"Observation:\nThe colour of {name} is {answer}"
    use = ToolUse(name="search", arguments={"query": name}, result=f"The colour of {name} is {answer}")
    steps = [
        Step(
            number=1,
            actor="t",
            raw="",
            output=action_text(f"I look up {name}.", query),
            code=query,
            observation=found,
            tool_uses=(use,),
        )
    ]
    last = f"final_answer({literal(answer)})"
    text = action_text(f"The colour of {name} is {answer}.", last)
    steps.append(Step(number=2, actor="t", raw=text, output=text, code=last, is_final=True))
    return Trajectory(
        id=f"{name}#{sample}",
        task=Task(id=name, question=f"What is the colour of {name}?", answer=answer),
        sample=sample,
        model="t",
        system_prompt="the teacher's long prompt",
        tools=(SEARCH,),
        steps=tuple(steps if tools else steps[1:]),
        answer=answer if right else "wrong",
        score=Score(value=float(right), scorer="exact"),
        stop_reason=StopReason.FINAL_ANSWER,
    )


class Knows(Model):
    """A student that knows the colours of some things, and says so at once."""

    def __init__(self, known: Mapping[str, Sequence[str]]) -> None:
        super().__init__(model_id="student")
        self.known = {name: list(answers) for name, answers in known.items()}
        self.prompts: list[str] = []

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        texts = [message.content[0]["text"] for message in messages]
        self.prompts.append(texts[0])
        name = texts[1].removeprefix("What is the colour of ").removesuffix("?")
        code = self.known[name].pop(0) if self.known.get(name) else 'final_answer("I forgot")'
        return ChatMessage(role=MessageRole.ASSISTANT, content=action_text("I know this.", code))


def respondent(model: Model, name: str = "student") -> Respondent:
    @contextmanager
    def source(config: AdaptConfig) -> Iterator[tuple[AgentConfig, Any]]:
        yield AgentConfig(model="student", sandbox="local"), model

    return Respondent({"student": name}, source)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Seven questions with their trajectories; the first has a wrong one and one without tools, too."""
    items = [
        trace("sky", "blue", right=False, sample=0),
        trace("sky", "blue", tools=False, sample=1),
        trace("sky", "blue", sample=2),
        *(trace(name, "red") for name in ("rose", "brick", "blood", "wine", "rust")),
        trace("void", "black", right=False),
    ]
    write_jsonl(tmp_path / "kept.jsonl", items)
    return tmp_path / "kept.jsonl"


def test_a_literal_is_read_back_as_the_answer() -> None:
    for answer in ("7", "-3", "2.5", "Rose Fox", 'say "no"', "ça \\ va", "007", "1e5", "nan", "1_000", "²"):
        assert str(eval(literal(answer))) == answer
        assert is_direct(f"final_answer({literal(answer)})")


def test_without_a_student_only_what_can_be_known_is_written(traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = adapt(traces, out)
    assert not done.mixed
    assert not (out / "mix.jsonl").exists()
    rows = read_trajectories(out / "knowledge.jsonl")
    assert [row.task.id for row in rows] == ["sky", "rose", "brick", "blood", "wine", "rust"]
    for row in rows:
        assert is_direct(row)
        assert row.correct
        assert row.system_prompt == DIRECT
        assert row.labels["source"] == ("sky#2" if row.task.id == "sky" else f"{row.task.id}#0")
        assert row.labels["rewriter"] == "literal"
        assert "search" not in row.steps[0].output
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {row["task_id"] for row in dropped} == {"void"}
    assert {row["reason"] for row in dropped} == {"no right trajectory"}
    assert read_json(out / "manifest.json")["counts"] == done.counts


def test_easy_is_answered_directly_and_hard_with_tools_in_balance(traces: Path, tmp_path: Path) -> None:
    model = Knows({"sky": ['final_answer("blue")'], "rose": ['final_answer("green")']})
    out = tmp_path / "out"
    done = adapt(traces, out, student=respondent(model))
    assert done.mixed
    assert (done.counts["easy"], done.counts["hard"]) == (1, 5)
    assert set(model.prompts) == {DIRECT}
    rows = read_trajectories(out / "mix.jsonl")
    assert len({row.id for row in rows}) == len(rows)
    allowed = [row for row in rows if row.labels["prompt"] == "allowed"]
    assert {row.system_prompt for row in allowed} == {STUDENT.replace("{tools}", "search(query)")}
    easy = [row for row in allowed if row.labels["class"] == "easy"]
    hard = [row for row in allowed if row.labels["class"] == "hard"]
    assert [row.task.id for row in easy] == ["sky"] * 5
    assert [row.labels["copy"] for row in easy] == ["1", "2", "3", "4", "5"]
    assert all(is_direct(row) for row in easy)
    assert [row.task.id for row in hard] == ["rose", "brick", "blood", "wine", "rust"]
    assert all(used_tool(row) and row.correct for row in hard)
    assert sum(row.labels["prompt"] == "direct" for row in rows) == 6


def test_every_decision_has_its_evidence(traces: Path, tmp_path: Path) -> None:
    right = 'final_answer("blue")'
    wrong = 'final_answer("green")'
    worked_out = 'final_answer("bl" + "ue")'
    model = Knows({"sky": [right, right, wrong], "rose": [worked_out, worked_out, worked_out]})
    config = AdaptConfig(samples=3, temperature=0.7, tau=0.6)
    adapt(traces, tmp_path / "out", config, student=respondent(model), workers=1)
    decisions = {row.task_id: row for row in iter_jsonl(tmp_path / "out" / "partition.jsonl", Decision)}
    sky = decisions["sky"]
    assert sky.easy
    assert sky.accuracy == pytest.approx(2 / 3)
    assert [(it.answer, it.counts, it.direct) for it in sky.answers] == [
        ("blue", True, True),
        ("blue", True, True),
        ("green", False, True),
    ]
    assert {it.trajectory for it in sky.answers} == {"sky#0", "sky#1", "sky#2"}
    # A worked-out answer is no direct one, even where it is right.
    assert not decisions["rose"].easy
    assert not decisions["rose"].answers[0].direct


def test_what_counts_as_a_tool_decides_what_is_known(tmp_path: Path) -> None:
    code = "final_answer(3 * 4)"
    text = action_text("I multiply.", code)
    step = Step(number=1, actor="t", raw=text, output=text, code=code, is_final=True)
    sums = trace("x", "12").model_copy(update={"steps": (step,)})
    write_jsonl(tmp_path / "kept.jsonl", [sums])
    searching, both = AdaptConfig(tools="search"), AdaptConfig(tools="both")
    adapt(tmp_path / "kept.jsonl", tmp_path / "search", searching)
    (row,) = read_trajectories(tmp_path / "search" / "knowledge.jsonl")
    assert row.steps == (step,)  # a computation is no use of a tool here, so it stands as it is
    assert row.labels["rewriter"] == "none"
    adapt(tmp_path / "kept.jsonl", tmp_path / "both", both)
    (row,) = read_trajectories(tmp_path / "both" / "knowledge.jsonl")
    assert row.steps[0].code == "final_answer(12)"


def test_a_second_run_asks_nothing_again_and_a_killed_one_goes_on(traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapt(traces, out, student=respondent(Knows({"sky": ['final_answer("blue")']})))
    before = (out / "mix.jsonl").read_bytes()
    log = out / "partition" / "trajectories.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["task"]["id"] != "sky"]
    log.write_bytes(b"".join(kept) + b'{"torn')
    again = Knows({"sky": ['final_answer("blue")']})
    adapt(traces, out, student=respondent(again))
    assert len(again.prompts) == 1
    assert (out / "mix.jsonl").read_bytes() == before


def test_a_folder_goes_on_with_the_same_work_only(traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    knowing = {"sky": ['final_answer("blue")']}
    adapt(traces, out, student=respondent(Knows(knowing)))
    with pytest.raises(ConfigError, match="another student"):
        adapt(traces, out, student=respondent(Knows(knowing), "other"))
    with pytest.raises(ConfigError, match="otherwise sampled"):
        adapt(traces, out, AdaptConfig(temperature=0.5), student=respondent(Knows(knowing)))
    with pytest.raises(ConfigError, match="another rewriter"):
        adapt(traces, out, rewriter=({"rewriter": "x"}, literal_rewriter(AdaptConfig())))
    write_jsonl(traces, [trace("sky", "blue")])
    with pytest.raises(ConfigError, match="other trajectories"):
        adapt(traces, out)


def test_other_settings_make_another_mix_of_the_same_answers(traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    right, wrong = 'final_answer("blue")', 'final_answer("green")'
    model = Knows({"sky": [right, wrong, right]})
    three: dict[str, Any] = {"samples": 3, "temperature": 0.7}
    with pytest.raises(DataError, match="0 questions are easy"):
        adapt(traces, out, AdaptConfig(**three, tau=0.9), student=respondent(model), workers=1)
    asked = len(model.prompts)
    lax = AdaptConfig(**three, tau=0.6, keep_direct="easy", required=True)
    done = adapt(traces, out, lax, student=respondent(model), workers=1)
    assert len(model.prompts) == asked == 18
    assert done.counts["mix"] == {
        "direct direct": 1,
        "required tools": 6,
        "allowed direct": 5,
        "allowed tools": 5,
    }


def test_a_student_that_knows_all_or_nothing_is_an_error_and_leaves_the_evidence(
    traces: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="0 questions are easy and 6 hard"):
        adapt(traces, tmp_path / "out", student=respondent(Knows({})))
    assert len((tmp_path / "out" / "partition.jsonl").read_text().splitlines()) == 6


def test_nothing_to_learn_from_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    write_jsonl(path, [trace("a", "b", right=False)])
    with pytest.raises(DataError, match="is right"):
        adapt(path, tmp_path / "out")
    write_jsonl(path, [trace("a", "b").model_copy(update={"kind": "cot"})])
    with pytest.raises(DataError, match="agent's"):
        adapt(path, tmp_path / "out")
    write_jsonl(path, [trace("a", "x" * 200)])
    with pytest.raises(DataError, match="rejected"):
        adapt(path, tmp_path / "out")
    with pytest.raises(DataError, match="no file"):
        adapt(tmp_path / "nothing.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        (
            "I need the mayor of X. First I look for X, so I search.",
            "I need the mayor of X. I know it: it is Y.",
        ),
        ("I need 3 * 4, so I compute it.", "I need 3 * 4. I know it: it is Y."),
        ("I need 1.5 times it.\nThen more.", "I need 1.5 times it. I know it: it is Y."),
        ("I search for X. Then more.", "no goal: its first thought speaks of tools: 'search'"),
        ("", "no goal: the trajectory has no thought"),
    ],
)
def test_a_solution_can_begin_with_the_goal(thought: str, expected: str) -> None:
    made = trace("sky", "Y")
    steps = tuple(step.model_copy(update={"thought": thought}) for step in made.steps)
    config = AdaptConfig(thought="{goal} I know it: it is {answer}.")
    found = literal_rewriter(config)([made.model_copy(update={"steps": steps})])[made.id]
    assert (found.reason if isinstance(found, Rejected) else found.thought) == expected


def test_a_thought_has_no_code_in_it() -> None:
    with pytest.raises(ValidationError, match="code block"):
        AdaptConfig(thought="I know:\n```python\nx\n```")


def test_several_samples_need_a_temperature() -> None:
    with pytest.raises(ValidationError, match="temperature"):
        AdaptConfig(samples=5)


@pytest.mark.parametrize(
    ("easy", "hard", "copies"),
    [(10, 25, (2, 1)), (25, 10, (1, 2)), (7, 7, (1, 1)), (0, 5, (1, 1)), (5, 0, (1, 1)), (1, 100, (100, 1))],
)
def test_the_smaller_class_is_repeated(easy: int, hard: int, copies: tuple[int, int]) -> None:
    assert balanced_copies(easy, hard) == {"easy": copies[0], "hard": copies[1]}


def test_literal_answers_that_are_texts_are_rejected() -> None:
    rewrite = literal_rewriter(AdaptConfig())
    long, lines, fine = trace("a", "x" * 81), trace("b", "one\ntwo"), trace("c", "x")
    made = rewrite([long, lines, fine])
    assert isinstance(made[long.id], Rejected)
    assert isinstance(made[lines.id], Rejected)
    assert made[fine.id] == Solution("I know this.", 'final_answer("x")', "literal")


REPLIES = {
    "sky": "Air scatters blue light most, so the colour of the sky is blue.\nAnswer: blue",
    "rose": "Doubt: the passage speaks of another rose.\nAnswer: doubt",
    "brick": "Bricks are brown.\nAnswer: brown",
    "blood": "The search showed that blood is red.\nAnswer: red",
    "wine": "I do not know what to write.",
    "rust": "```python\nprint('red')\n```\nAnswer: red",
}


def reply(messages: list[dict[str, Any]]) -> str:
    asked = str(messages[-1]["content"])
    return next(text for name, text in REPLIES.items() if f"colour of {name}?" in asked)


def test_a_teacher_rewrites_and_rejects_what_it_doubts(traces: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", AdaptConfig()
    with FakeEndpoint(reply) as server:
        teacher = AgentConfig(model="fake", api_base=server.url)
        rewrite = model_rewriter(teacher, out / "rewrite", config)
        done = adapt(traces, out, config, rewriter=({"rewriter": "fake"}, rewrite))
        asked = len(server.requests)
        adapt(traces, out, config, rewriter=({"rewriter": "fake"}, rewrite))
        assert len(server.requests) == asked == 6  # nothing is asked twice
    (row,) = read_trajectories(out / "knowledge.jsonl")
    assert row.task.id == "sky"
    assert row.steps[0].thought == "Air scatters blue light most, so the colour of the sky is blue."
    assert row.steps[0].code == 'final_answer("blue")'
    assert row.labels["rewriter"] == "fake"
    lines = (out / "dropped.jsonl").read_text().splitlines()
    reasons = {row["task_id"]: row["reason"] for row in map(json.loads, lines)}
    assert reasons["rose"] == "the rewriter doubts: the passage speaks of another rose."
    assert reasons["brick"].startswith("another answer: 'brown'")
    assert reasons["blood"] == "speaks of tools: 'search'"
    assert reasons["wine"].startswith("no solution")
    assert reasons["rust"].startswith("speaks of tools")
    assert done.counts["knowledge"] == {"direct direct": 1}


def test_words_of_the_question_itself_do_not_count_as_speaking_of_tools() -> None:
    asked = trace("the python", "green")
    assert _word_of_tools(asked, "The python is green.") is None
    assert _word_of_tools(asked, "I looked up that the python is green.") == "looked up"
    assert _word_of_tools(asked, "search says that it is green") == "search"


def test_a_tool_without_a_schema_is_a_data_error(tmp_path: Path) -> None:
    for tool in ("nonsense", "{}", '{"name": "search"}'):
        write_jsonl(tmp_path / "kept.jsonl", [trace("a", "b").model_copy(update={"tools": (tool,)})])
        with pytest.raises(DataError, match="schemas"):
            adapt(tmp_path / "kept.jsonl", tmp_path / "out" / str(len(tool)))


def test_a_rewriter_is_shown_what_the_tools_found() -> None:
    text = rewrite_request(trace("sky", "blue"))
    assert text.startswith("Question: What is the colour of sky?")
    assert "The colour of sky is blue" in text
    assert text.endswith("The assistant's answer: blue")


def test_a_teacher_that_refuses_is_an_error_of_the_endpoint(traces: Path, tmp_path: Path) -> None:
    with FakeEndpoint(lambda messages: (401, b'{"error": {"message": "no such key"}}')) as server:
        teacher = AgentConfig(model="fake", api_base=server.url)
        rewrite = model_rewriter(teacher, tmp_path / "rewrite", AdaptConfig(), workers=1)
        with pytest.raises(ProviderError, match="refused the key"):
            adapt(traces, tmp_path / "out", rewriter=({"rewriter": "fake"}, rewrite))
