from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import pytest

from agentkd.action import parse_action
from agentkd.agent import StepAgent, build_agent
from agentkd.errors import ConfigError, RetrievalError
from agentkd.prompt import chat_messages, trajectory_messages
from agentkd.rollout import rollout
from agentkd.task import Task
from agentkd.testing import FakeEndpoint, ScriptedModel
from agentkd.tool import load_tool
from agentkd.trajectory import StopReason, Trajectory
from tests.conftest import action

TASK = Task(id="t", question="What is it?", answer="7", scorer="numeric")


@pytest.fixture
def run() -> Iterator[Any]:
    agents: list[StepAgent] = []

    def go(
        outputs: list[str], *tools: Any, task: Task = TASK, max_seconds: float | None = None, **options: Any
    ):
        agent = build_agent(ScriptedModel(outputs), tools, **options)
        agents.append(agent)
        return rollout(agent, task, max_seconds=max_seconds)

    yield go
    for agent in agents:
        agent.cleanup()


@pytest.mark.parametrize(
    ("text", "code", "repairs"),
    [
        (action("a", "x = 1"), "x = 1", ()),
        ("Thought: a\n```py\nx = 1\n```", "x = 1", ()),
        ("Thought: a\n```\nx = 1\n```", "x = 1", ()),
        ("Thought: a\n```python\nx = 1", "x = 1", ("closed_fence",)),
        (action("a", "x = 1") + "\nObservation: 1", "x = 1", ("dropped_tail",)),
        ("Thought: a\n```python\nprint('`')\n```", "print('`')", ()),
    ],
)
def test_parsing_names_its_repairs(text: str, code: str, repairs: tuple[str, ...]) -> None:
    parsed = parse_action(text)
    assert (parsed.thought, parsed.code, parsed.repairs) == ("a", code, repairs)
    assert parsed.output.endswith(f"{code}\n```")


def test_text_without_code_is_no_action() -> None:
    assert parse_action("Thought: I wonder").code is None


@pytest.mark.parametrize(
    ("code", "answer"),
    [("final_answer(7)", "7"), ("final_answer([1.5])", "[1.5]"), ("final_answer('')", ""), ("x = 1", None)],
)
def test_no_answer_costs_an_import_of_torch(
    run: Any, monkeypatch: pytest.MonkeyPatch, code: str, answer: str | None
) -> None:
    """smolagents asks torch whether a value that is no text is sound."""
    imported, real = set[str](), builtins.__import__

    def noting(name: str, *rest: Any, **options: Any) -> Any:
        imported.add(name.partition(".")[0])
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", noting)
    record = run([action("one", code)], max_steps=1, sandbox="local")
    monkeypatch.undo()
    assert record.answer == answer
    assert record.stop_reason == (StopReason.MAX_STEPS if answer is None else StopReason.FINAL_ANSWER)
    assert imported
    assert "torch" not in imported


def test_no_answer_at_all_may_be_the_answer(run: Any) -> None:
    record = run([action("one", "final_answer(None)")])
    assert (record.answer, record.stop_reason) == (None, StopReason.FINAL_ANSWER)


def test_state_stays_between_steps_and_the_answer_is_scored(run: Any) -> None:
    record = run([action("one", "x = 3\nprint(x)"), action("two", "final_answer(x + 4)")])
    assert (record.answer, record.stop_reason, record.correct) == ("7", StopReason.FINAL_ANSWER, True)
    assert record.steps[0].observation == "Observation:\n3"
    assert record.steps[1].is_final
    assert record.usage.input_tokens == 20
    assert Trajectory.model_validate_json(record.model_dump_json()) == record


def test_the_model_sees_exactly_what_the_record_renders() -> None:
    model = ScriptedModel(
        [action("one", "print(1)"), action("two", "1 / 0"), action("three", "final_answer(7)")]
    )
    agent = build_agent(model)
    record = rollout(agent, TASK)
    agent.cleanup()
    seen = [{"role": m.role.value, "content": m.content[0]["text"]} for m in model.seen[-1]]
    assert seen == trajectory_messages(record)[:-1]
    assert seen[:2] == chat_messages(record.system_prompt, TASK.question)


def test_mistakes_of_the_model_become_observations(run: Any) -> None:
    record = run(
        ["no code here", action("bad", "1 / 0"), action("bad", "x ="), action("ok", "final_answer(7)")]
    )
    kinds = [step.failure.kind if step.failure else None for step in record.steps]
    assert kinds == ["parse", "execution", "execution", None]
    assert "ZeroDivisionError" in record.steps[1].observation
    assert record.correct


def test_a_run_without_an_answer_ends_at_its_limit(run: Any) -> None:
    record = run([action("one", "x = 1")] * 2, max_steps=2)
    assert (record.answer, record.stop_reason) == (None, StopReason.MAX_STEPS)
    assert record.score.value == 0.0


def test_a_last_call_is_made_only_when_asked_for(run: Any) -> None:
    record = run([action("one", "x = 1"), "7"], max_steps=1, force_answer=True)
    assert (record.answer, record.stop_reason, record.correct) == ("7", StopReason.MAX_STEPS, True)


def test_chain_of_thought_answers_once(run: Any) -> None:
    record = run(["Three and four.\nAnswer: 7"], kind="cot")
    assert (record.answer, record.kind, record.correct) == ("7", "cot", True)
    assert run(["Three and four."], kind="cot").stop_reason == StopReason.NO_ANSWER


def test_time_is_up(run: Any) -> None:
    assert run([action("one", "x = 1")], max_seconds=0.0).stop_reason == StopReason.TIMEOUT


def test_a_tool_is_called_on_the_host_and_recorded(run: Any) -> None:
    record = run([action("one", "final_answer(len(today()))")], load_tool("today"), task=TASK)
    (use,) = record.steps[0].tool_uses
    assert (record.answer, use.name, len(use.result)) == ("10", "today", 10)


def test_a_broken_retriever_is_not_the_models_mistake(run: Any) -> None:
    class Broken:
        def search(self, queries: list[str], k: int = 3) -> None:
            raise RetrievalError("the index is gone")

    record = run([action("one", "search('x')")], load_tool("search", retriever=Broken()))
    assert record.stop_reason == StopReason.RETRIEVAL_ERROR
    assert record.score is None


def test_a_tool_that_fails_is_told_to_the_model(run: Any) -> None:
    record = run([action("one", "today(1, 2)"), action("two", "final_answer(7)")], load_tool("today"))
    assert record.steps[0].failure.kind == "execution"
    assert record.steps[0].tool_uses[0].error
    assert record.correct


def test_code_runs_in_the_fork_sandbox_unless_told_otherwise() -> None:
    from agentkd.sandbox import ForkingSandbox
    from agentkd.sandbox.fork import ForkSandbox

    assert isinstance(build_agent(ScriptedModel([])).sandbox, ForkSandbox)
    own = ForkSandbox(timeout=1.0)
    assert isinstance(own, ForkingSandbox)
    assert build_agent(ScriptedModel([]), sandbox=own).sandbox is own
    with pytest.raises(ConfigError, match="fork, e2b, docker, local"):
        build_agent(ScriptedModel([]), sandbox="moon")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ((500, b"{}"), StopReason.PROVIDER_ERROR),
        ((200, b"garbage"), StopReason.PROVIDER_ERROR),
        ((200, b'{"choices": []}'), StopReason.PROVIDER_ERROR),
        ((401, b"{}"), StopReason.PROVIDER_ERROR),
        (
            (400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}'),
            StopReason.CONTEXT_OVERFLOW,
        ),
    ],
)
def test_faults_of_an_endpoint_are_stop_reasons(fault: tuple[int, bytes], reason: StopReason) -> None:
    from agentkd.model import openai_model

    with FakeEndpoint(lambda messages: fault) as endpoint:
        agent = build_agent(openai_model("fake", endpoint.url, retries=0))
        record = rollout(agent, TASK)
        agent.cleanup()
    assert record.stop_reason == reason
    assert record.failure is not None


def test_a_dead_endpoint_is_a_stop_reason() -> None:
    from agentkd.model import openai_model

    agent = build_agent(openai_model("fake", "http://127.0.0.1:9/v1", retries=0))
    record = rollout(agent, TASK)
    agent.cleanup()
    assert record.stop_reason == StopReason.PROVIDER_ERROR
    assert record.failure is not None
    assert "Cannot reach" in record.failure.message
