"""Transforms: what they make of trajectories, over a real endpoint where they ask one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, DataError, ProviderError
from agentkd.model import openai_model
from agentkd.prompt import action_text
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.retrieval import Passage
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import Change, Score, Step, StopReason, Trajectory
from agentkd.transform import TRANSFORMS, Means, make_transform, transform_run
from agentkd.transform.means import Answers
from agentkd.transform.mix import gap_shares
from agentkd.transform.retro import changes_course


def step(number: int, thought: str, code: str, observation: str | None = None) -> Step:
    output = action_text(thought, code)
    return Step(
        number=number,
        actor="m",
        raw=output,
        output=output,
        thought=thought,
        code=code,
        observation=observation,
        is_final=observation is None,
    )


def made(name: str, *steps: Step, answer: str = "42", **fields: Any) -> Trajectory:
    task = Task(id=name, question=f"What is {name}?", answer="42", **fields.pop("task", {}))
    values: dict[str, Any] = {
        "id": f"{name}#0",
        "model": "m",
        "system_prompt": "the prompt",
        "stop_reason": StopReason.FINAL_ANSWER,
        "answer": answer,
        "score": Score(value=float(answer == "42"), scorer="exact"),
        "config": {"max_steps": 5},
    }
    return Trajectory(task=task, steps=steps, **{**values, **fields})


WORDY = "I am going to think about what is asked for here, and then I am going to print it with care"
AGENT = made("it", step(1, WORDY, "print(41)", "Observation:\n41"), step(2, "I know.", "final_answer(42)"))
COT = made("it", Step(number=1, actor="m", raw="", output=f"{WORDY}.\nAnswer: 42"), kind="cot")


def run(
    tmp_path: Path, name: str, items: list[Trajectory], settings: Any = None, **means: Any
) -> list[Trajectory]:
    write_jsonl(tmp_path / "kept.jsonl", items)
    transform = make_transform(name, settings)
    done = transform_run(
        tmp_path / "kept.jsonl", tmp_path / "out", transform, lambda answers: Means(answers, **means)
    )
    assert read_trajectories(tmp_path / "out" / "kept.jsonl") == done.trajectories
    return done.trajectories


def asked(
    tmp_path: Path, name: str, items: list[Trajectory], reply: Any, **settings: Any
) -> list[Trajectory]:
    with FakeEndpoint(reply) as endpoint:
        model = openai_model("fake", endpoint.url, retries=0)
        return run(tmp_path, name, items, settings, model=model, workers=2)


def test_thoughts_are_shortened_and_say_so(tmp_path: Path) -> None:
    def reply(messages: list[dict[str, Any]]) -> str:
        assert f"Thought 1: {WORDY}" in messages[1]["content"]
        return "Difficulty: **Easy**\nThought 1: I print it.\nThought 2: I know the answer by now."

    (item,) = asked(tmp_path, "shorten", [AGENT], reply)
    assert item.steps[0].output == action_text("I print it.", "print(41)")
    assert item.steps[0].repairs == ("shorten",)
    assert item.steps[0].raw == AGENT.steps[0].raw
    assert item.steps[1] == AGENT.steps[1]  # the new thought is longer
    (change,) = item.changes
    assert (change.by, change.source, change.note) == ("shorten", "it#0", "easy: 1 of 2 thoughts shortened")


def test_a_chain_of_thought_keeps_its_answer_line(tmp_path: Path) -> None:
    (item,) = asked(tmp_path, "shorten", [COT], lambda _: "Difficulty: hard\nThought 1: Printed.")
    assert item.steps[0].output == "Printed.\nAnswer: 42"


@pytest.mark.parametrize(
    "answer", ["no form at all", "Difficulty: easy\nThought 1: ```x```", "Difficulty: easy"]
)
def test_what_cannot_be_used_changes_nothing(tmp_path: Path, answer: str) -> None:
    assert asked(tmp_path, "shorten", [AGENT], lambda _: answer) == [AGENT]


def test_a_plan_stands_before_the_first_thought(tmp_path: Path) -> None:
    (item,) = asked(tmp_path, "plan-first", [AGENT], lambda _: "Plan: find the number, then answer.")
    expected = action_text(f"Plan: find the number, then answer.\n{WORDY}", "print(41)")
    assert [it.output for it in item.steps] == [expected, AGENT.steps[1].output]


@pytest.mark.parametrize("plan", ["the answer is 42.", "word " * 61, "```python\n1\n```", ""])
def test_a_plan_that_tells_the_answer_is_not_taken(tmp_path: Path, plan: str) -> None:
    assert asked(tmp_path, "plan-first", [AGENT], lambda _: plan) == [AGENT]


DOUBTS = made(
    "it",
    step(1, "I print.", "x = 41\nprint(x)", "Observation:\n41"),
    step(2, "Wait, let me double-check that.", "print(x)", "Observation:\n41"),
    step(3, "It holds.", "print(x + 1)", "Observation:\n42"),
    step(4, "I know.", "final_answer(42)"),
)


def test_retro_search_goes_on_where_the_agent_changed_course(tmp_path: Path) -> None:
    drawn = iter(
        [
            "Thought: But wait.\n```python\nprint(x)\n```",
            "Thought: One more.\n```python\nfinal_answer(x + 1)\n```",
        ]
    )

    def reply(messages: list[dict[str, Any]]) -> str:
        assert messages[-1]["content"] == "Observation:\n41"
        return next(drawn)

    (item,) = asked(tmp_path, "retro-search", [DOUBTS], reply, sandbox="local")
    assert item.steps[0] == DOUBTS.steps[0]
    assert [it.thought for it in item.steps] == ["I print.", "One more."]  # x is there: step 1 was run again
    assert item.correct
    assert "cut before step 2" in item.changes[0].note


def test_retro_search_keeps_what_is_not_bettered(tmp_path: Path) -> None:
    wrong = "Thought: So.\n```python\nfinal_answer(7)\n```"
    assert asked(tmp_path, "retro-search", [DOUBTS, AGENT], lambda _: wrong, sandbox="local") == [
        DOUBTS,
        AGENT,
    ]
    other = DOUBTS.model_copy(
        update={"steps": (step(1, "I.", "print(1)", "Observation:\n2"), *DOUBTS.steps[1:])}
    )
    right = "Thought: So.\n```python\nfinal_answer(42)\n```"
    again = tmp_path / "again"
    assert asked(again, "retro-search", [other], lambda _: right, sandbox="local") == [other]


def test_changing_course_is_told_from_going_on() -> None:
    assert changes_course("Thought: Wait, no")
    assert changes_course("I have it. Alternatively I could look")
    assert not changes_course("I wait for nothing, but go on")


def test_a_stopped_run_asks_nothing_twice(tmp_path: Path) -> None:
    items = [made(f"n{n}", step(1, WORDY, "final_answer(42)")) for n in range(4)]
    calls: list[str] = []
    broken = True

    def reply(messages: list[dict[str, Any]]) -> Any:
        calls.append(messages[1]["content"])
        if broken and "n2" in messages[1]["content"]:
            return 400, b"{}"
        return "Difficulty: easy\nThought 1: Short."

    with FakeEndpoint(reply) as endpoint:
        model = openai_model("fake", endpoint.url, retries=0)
        with pytest.raises(ProviderError):
            run(tmp_path, "shorten", items, model=model, workers=1)
        broken = False
        done = run(tmp_path, "shorten", items, model=model, workers=1)
        asked_for = Counter(text.partition("?")[0][-2:] for text in calls)
        assert asked_for == {"n0": 1, "n1": 1, "n2": 2, "n3": 1}
        assert all(len(it.changes) == 1 for it in done)
    run(tmp_path, "shorten", items)  # finished: no endpoint is needed
    with pytest.raises(ConfigError, match="another run"):
        run(tmp_path, "plan-first", items)
    with pytest.raises(ConfigError, match="another run"):
        run(tmp_path, "shorten", items[:1])


def test_the_gap_decides_the_mix(tmp_path: Path) -> None:
    shares = gap_shares({"a": 0.6, "b": 0.2, "c": -0.1}, {"a": 10, "b": 10, "c": 20}, 0.4)
    assert shares == pytest.approx({"a": 0.6 * 0.75 + 0.1, "b": 0.6 * 0.25 + 0.1, "c": 0.2})
    assert gap_shares({}, {"a": 1, "b": 3}, 0.4) == {"a": 0.25, "b": 0.75}

    def family(name: str, count: int, right: int) -> list[Trajectory]:
        return [
            made(
                f"{name}{n}",
                step(1, "I.", "final_answer(42)"),
                answer="42" if n < right else "1",
                task={"family": name},
            )
            for n in range(count)
        ]

    kept = family("a", 4, 4) + family("b", 4, 4)
    teacher, student = family("a", 10, 10) + family("b", 10, 10), family("a", 10, 0) + family("b", 10, 10)
    mixed = run(tmp_path, "success-gap", kept, {"smoothing": 0.5}, teacher_runs=teacher, student_runs=student)
    assert [sum(it.task.family == name for it in mixed) for name in "ab"] == [6, 2]
    assert len({it.id for it in mixed}) == 8
    assert all(it.changes[0].source in {them.id for them in kept} for it in mixed)
    with pytest.raises(ConfigError, match="two runs"):
        run(tmp_path / "x", "success-gap", kept)
    with pytest.raises(DataError, match="No family"):
        run(tmp_path / "y", "success-gap", kept, teacher_runs=family("z", 1, 1), student_runs=student)


def test_low_temperatures_come_first(tmp_path: Path) -> None:
    items = [made(f"n{n}", config={"temperature": n % 3 / 2}) for n in range(9)]
    order = run(tmp_path, "temperature", items)
    assert [it.config["temperature"] for it in order] == [0.0] * 3 + [0.5] * 3 + [1.0] * 3
    assert {it.id for it in order} == {it.id for it in items}
    with pytest.raises(DataError, match="do not say"):
        run(tmp_path / "x", "temperature", [AGENT])


def test_passages_stand_before_the_question(tmp_path: Path) -> None:
    retriever = BM25Retriever(
        [Passage(id="1", title="It", text="It is 42."), Passage(id="2", title="O", text="No.")]
    )
    (item,) = run(tmp_path, "passages", [COT], {"k": 1}, retriever=retriever)
    assert item.context is not None
    assert (item.context.text, item.context.k) == ("[It] It is 42.", 1)
    with pytest.raises(DataError, match="no chain of thought"):
        run(tmp_path / "x", "passages", [AGENT], retriever=retriever)
    with pytest.raises(ConfigError, match="nothing to search"):
        run(tmp_path / "y", "passages", [COT])


class Own:
    """A transform of one's own."""

    name = "own"

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = make_transform("temperature").settings

    def __call__(self, trajectories: Any, means: Means) -> list[Trajectory]:
        return list(trajectories)[:1]


def test_transforms_plug_in_and_wrong_names_are_told(tmp_path: Path) -> None:
    assert run(tmp_path, "tests.unit.test_transform:Own", [AGENT, COT]) == [AGENT]
    with pytest.raises(ConfigError, match="no transform"):
        make_transform("nothing")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        make_transform("nothing:at_all")
    with pytest.raises(ConfigError, match="samples"):
        make_transform("retro-search", {"samples": 0})
    with pytest.raises(ConfigError, match="asks a model"):
        run(tmp_path / "x", "shorten", [AGENT])
    with pytest.raises(ConfigError, match="needs a student"):
        run(tmp_path / "y", "student-friendly", [AGENT])
    with pytest.raises(DataError, match="no file"):
        transform_run(tmp_path / "none", tmp_path / "z", make_transform("temperature"), Means)
    assert all(make_transform(name).name == name for name in TRANSFORMS)


class Counting:
    """Stands for a student: a text is as likely as it is short, and "needed" is needed."""

    system_prompt = None

    def nll(self, messages: Any) -> float:
        return float(sum(len(it["content"]) for it in messages if it["role"] == "assistant"))

    def continuation_nll(self, messages: Any, begun: str, rest: str) -> float:
        assert rest.startswith(("```python", "Answer:"))
        return 1.0 if "needed" in begun else 2.0


def test_the_student_chooses_among_several(tmp_path: Path) -> None:
    short = made("it", step(1, "I.", "final_answer(42)"), id="it#1")
    (item,) = run(tmp_path, "student-friendly", [AGENT, short], student=Counting())
    assert item.id == "it#1"
    assert "the best of 2" in item.changes[0].note


def test_chunks_that_are_not_needed_are_left_out(tmp_path: Path) -> None:
    agent = made("it", step(1, "Idle talk. This is needed! More talk.", "final_answer(42)"))
    cot = COT.model_copy(
        update={
            "steps": (Step(number=1, actor="m", raw="", output="Talk.\nneeded\nAnswer: 42"),),
            "id": "it#1",
        }
    )
    first, second = run(tmp_path, "skip-chunks", [agent, cot], student=Counting())
    assert first.steps[0].output == action_text("This is needed!", "final_answer(42)")
    assert second.steps[0].output == "needed\nAnswer: 42"
    assert first.changes[0].note == "2 of 3 chunks left out"


def test_answers_survive_a_torn_line(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.jsonl")
    assert answers.text("q", lambda: "a") == "a"
    answers.close()
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "torn')
    again = Answers(tmp_path / "answers.jsonl")
    assert again.text("q", lambda: pytest.fail("asked twice")) == "a"
    assert again.value("r", lambda: 0.5) == 0.5
    again.close()


EARLIER = Change(by="earlier", source="before#0", note="by hand", settings={"k": 1})
TALKATIVE = made("it", step(1, "Idle talk. This is needed! More talk.", "final_answer(42)"))
SHORT = "Difficulty: easy\nThought 1: I print it."
PLAN = "Plan: find the number, then answer."
ON = "Thought: One more.\n```python\nfinal_answer(x + 1)\n```"
PROVENANCE: dict[str, tuple[Trajectory, dict[str, Any], str | None]] = {
    "shorten": (AGENT, {"easy": 9}, SHORT),
    "plan-first": (AGENT, {"max_words": 20}, PLAN),
    "retro-search": (DOUBTS, {"sandbox": "local", "samples": 2}, ON),
    "skip-chunks": (TALKATIVE, {"min_chunks": 1, "tolerance": 0.25}, None),
    "student-friendly": (AGENT, {"per_task": 2}, None),
    "success-gap": (AGENT, {"smoothing": 0.5, "seed": 4}, None),
    "temperature": (AGENT.model_copy(update={"config": {"temperature": 0.5}}), {"seed": 3}, None),
    "passages": (COT, {"k": 1}, None),
}
"""What each transform is given (the trajectory, settings that are not its defaults, a model's answer)."""


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_says_what_it_made_of_what(tmp_path: Path, name: str) -> None:
    item, settings, answer = PROVENANCE[name]
    item = item.model_copy(update={"changes": (EARLIER,)})
    means = {
        "student": Counting(),
        "teacher_runs": [AGENT],
        "student_runs": [AGENT.model_copy(update={"answer": "1", "score": Score(value=0.0, scorer="exact")})],
        "retriever": BM25Retriever([Passage(id="1", title="It", text="It is 42.")]),
    }
    if answer is not None:
        (done,) = asked(tmp_path, name, [item], lambda _: answer, **settings)
    else:
        (done,) = run(tmp_path, name, [item], settings, **means)
    assert (done.task, done.model, done.system_prompt, done.kind) == (
        item.task,
        item.model,
        item.system_prompt,
        item.kind,
    )
    earlier, change = done.changes
    assert earlier == EARLIER
    assert (change.by, change.source) == (name, item.id)
    assert change.note
    assert change.settings == make_transform(name, settings).settings.model_dump(mode="json")
    assert change.settings.items() >= settings.items()
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["config"] == {"transform": name, "settings": change.settings}
    for old, new in zip(item.steps, done.steps, strict=False):
        if new.output != old.output and name != "retro-search":  # which took other steps
            assert new.raw == old.raw
            assert new.repairs == (name,)
