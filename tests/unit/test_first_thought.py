"""First-thought prefix: what is taken, how it is given, what the record says, and going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent import build_agent
from agentkd.agent_config import AgentConfig
from agentkd.collect import CollectConfig, TeacherConfig, collect, expect
from agentkd.errors import ConfigError, DataError, ProviderError
from agentkd.expert import EXPERT_LABEL
from agentkd.filter import filter_run
from agentkd.first_thought import (
    FirstThoughtConfig,
    Prefix,
    collect_first_thoughts,
    load_first_thoughts,
    prefix_of,
    probe_continuation,
)
from agentkd.first_thought_report import compare_first_thoughts
from agentkd.model import openai_model
from agentkd.prompt import FIRST_THOUGHT, first_thought_request, joined, trajectory_messages
from agentkd.recipe import Recipe, quickstart_recipe
from agentkd.record import iter_jsonl, read_json, read_trajectories, write_jsonl
from agentkd.rollout import rollout
from agentkd.task import Task
from agentkd.testing import FakeEndpoint, ScriptedModel
from agentkd.trajectory import FirstThought, Step, StopReason, Trajectory
from tests.conftest import action

TASK = Task(id="t", question="What is it?", answer="7", scorer="numeric")
BEGUN = "Thought: I need it"
FIELDS = {"add_generation_prompt": False, "continue_final_message": True}


# What is taken from a chain of thought.


def thought(raw: str | None, reason: StopReason = StopReason.FINAL_ANSWER) -> Trajectory:
    steps = () if raw is None else (Step(number=1, actor="m", raw=raw, output=raw.strip()),)
    return Trajectory(
        id="t#0", task=TASK, kind="cot", model="m", system_prompt="", steps=steps, stop_reason=reason
    )


@pytest.mark.parametrize(
    ("raw", "prefix"),
    [
        ("I need the sum.\n\n1 + 2 = 3.\n\nAnswer: 3", "I need the sum."),
        ("\n\n  I need the sum.  \n \t\n1 + 2 = 3.", "I need the sum."),
        ("Thought: I need the sum.\n\nAnswer: 3", "I need the sum."),
        ("I need:\n1. a sum\n2. a product\n\nAnswer: 3", "I need:\n1. a sum\n2. a product"),
        ("x" * 1200 + "\n\nAnswer: 3", "x" * 1200),
    ],
)
def test_the_prefix_is_what_stands_before_the_first_blank_line(raw: str, prefix: str) -> None:
    assert prefix_of(thought(raw), FirstThoughtConfig()) == Prefix(task="t", prefix=prefix)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "empty"),
        (" \n\n \n", "empty"),
        ("Thought:\n\nAnswer: 3", "empty"),
        (None, "empty"),
        ("1 + 2 = 3.\nAnswer: 3", "no blank line"),
        ("x" * 1201 + "\n\nAnswer: 3", "overlong"),
        ("Use this:\n```python\nx\n```\n\nAnswer: 3", "code"),
        ("Observation: none\n\nAnswer: 3", "code"),
        ("Easy.\nAnswer: 3\n\nI am sure.", "answered"),
    ],
)
def test_every_dropped_prefix_has_a_reason(raw: str | None, reason: str) -> None:
    line = prefix_of(thought(raw, StopReason.NO_ANSWER), FirstThoughtConfig())
    assert line.prefix is None
    assert line.dropped.split(":")[0] == reason


# How it is given to the agent.


def run_given(via: Any, replies: list[str], **options: Any) -> tuple[Trajectory, list[dict[str, Any]]]:
    left = list(replies)
    with FakeEndpoint(lambda messages: left.pop(0), continues=via == "prefill") as endpoint:
        agent = build_agent(openai_model("fake", endpoint.url), sandbox="local", **options)
        agent.first_thought = FirstThought(prefix=BEGUN, via=via)
        try:
            return rollout(agent, TASK), endpoint.requests
        finally:
            agent.cleanup()


def test_a_prefilled_step_is_continued_and_no_other_one() -> None:
    first = ", so I add.\n```python\nx = 3\nprint(x)\n```"
    record, requests = run_given("prefill", [first, action("done", "final_answer(x + 4)")])
    assert requests[0]["messages"][-1] == {"role": "assistant", "content": BEGUN}
    assert {key: requests[0][key] for key in FIELDS} == FIELDS
    assert requests[1]["messages"][-1]["role"] == "user"
    assert requests[1]["messages"][2] == {"role": "assistant", "content": BEGUN + first}
    assert not FIELDS.keys() & requests[1].keys()
    one, two = record.steps
    assert one.first_thought == FirstThought(prefix=BEGUN, via="prefill")
    assert (one.raw, one.output, one.continuation) == (first, BEGUN + first, first)
    assert (one.thought, one.code) == ("I need it, so I add.", "x = 3\nprint(x)")
    assert two.first_thought is None
    assert two.continuation == two.output
    assert record.correct
    assert Trajectory.model_validate_json(record.model_dump_json()) == record


def test_a_repair_does_not_blur_what_was_given() -> None:
    record, _ = run_given("prefill", [" and add.\n```python\nfinal_answer(7)\n```\nObservation: 7"])
    (step,) = record.steps
    assert step.repairs == ("dropped_tail",)
    assert step.output == BEGUN + step.continuation
    assert step.continuation == " and add.\n```python\nfinal_answer(7)\n```"


def test_a_failed_first_step_does_not_make_the_second_one_first() -> None:
    record, requests = run_given("prefill", [" but forgot the code.", action("now", "final_answer(7)")])
    assert [step.first_thought is None for step in record.steps] == [False, True]
    assert record.steps[0].output == f"{BEGUN} but forgot the code."
    assert "continue_final_message" not in requests[1]


def test_the_last_call_for_an_answer_is_not_given_anything() -> None:
    replies = [".\n```python\nx = 1\n```", "7"]
    record, requests = run_given("prefill", replies, max_steps=1, force_answer=True)
    assert record.answer == "7"
    assert requests[1]["messages"][-1]["role"] == "user"
    assert "continue_final_message" not in requests[1]


def test_a_chain_of_thought_is_not_given_anything() -> None:
    record, requests = run_given("prefill", ["Answer: 7"], kind="cot")
    assert record.steps[0].first_thought is None
    assert requests[0]["messages"][-1]["role"] == "user"


def test_the_instruction_stands_at_the_first_step_only_and_in_no_record() -> None:
    replies = ["Thought: I add.\n```python\nx = 3\n```", action("done", "final_answer(x + 4)")]
    record, requests = run_given("instruction", replies)
    assert requests[0]["messages"][-1]["content"] == first_thought_request(TASK.question, BEGUN)
    assert requests[1]["messages"][1]["content"] == TASK.question
    assert "continue_final_message" not in requests[0]
    one = record.steps[0]
    assert one.first_thought == FirstThought(prefix=BEGUN, via="instruction")
    assert one.raw == replies[0]
    assert one.output == f"{BEGUN} I add.\n```python\nx = 3\n```"
    # What the student learns from: the thought as its own, and not a word of the instruction.
    learnt = trajectory_messages(record)
    assert learnt[1]["content"] == TASK.question
    assert learnt[2]["content"] == one.output


@pytest.mark.parametrize(
    ("emitted", "whole"),
    [
        ("so I add.\n```python\n1\n```", "Thought: I need it so I add.\n```python\n1\n```"),
        (", so I add.", "Thought: I need it, so I add."),
        ("Thought: I need it, so I add.", "Thought: I need it, so I add."),
        ("I need it, so I add.", "Thought: I need it, so I add."),
        ("Thought: I need it\n```python\n1\n```", "Thought: I need it\n```python\n1\n```"),
        ("Thought: I add.", "Thought: I need it I add."),
        ("```python\n1\n```", "Thought: I need it\n```python\n1\n```"),
        ("", "Thought: I need it"),
    ],
)
def test_what_a_model_wrote_is_joined_to_what_it_was_asked_to_go_on_from(emitted: str, whole: str) -> None:
    assert joined(BEGUN, emitted) == whole


def test_fields_of_a_call_do_not_replace_those_of_the_model() -> None:
    with FakeEndpoint(lambda messages: "7", continues=True) as endpoint:
        model = openai_model("fake", endpoint.url, extra_body={"return_token_ids": True})
        agent = build_agent(model, sandbox="local", max_steps=1)
        agent.first_thought = FirstThought(prefix=BEGUN, via="prefill")
        rollout(agent, TASK)
        agent.cleanup()
    assert endpoint.requests[0]["return_token_ids"] is True
    assert endpoint.requests[0]["continue_final_message"] is True


def test_records_without_a_first_thought_still_load() -> None:
    agent = build_agent(ScriptedModel([action("a", "final_answer(7)")]), sandbox="local")
    record = rollout(agent, TASK)
    agent.cleanup()
    old = record.model_dump(mode="json")
    for step in old["steps"]:
        del step["first_thought"]
    assert Trajectory.model_validate(old) == record


# Whether an endpoint continues.


def counted(count: Callable[[dict[str, Any]], int | None]) -> Callable[[dict[str, Any]], Any]:
    def reply(body: dict[str, Any]) -> tuple[int, bytes]:
        usage = {"completion_tokens": 1, "prompt_tokens": count(body)}
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
        content = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return 200, json.dumps({**content, "usage": usage if count(body) is not None else None}).encode()

    return reply


def refusing(body: dict[str, Any]) -> tuple[int, bytes]:
    if "continue_final_message" in body:
        return 400, b'{"error": {"message": "unknown field continue_final_message"}}'
    return 200, b"{}"


def drops_the_message(body: dict[str, Any]) -> int:
    messages = body["messages"][:1] if body.get("continue_final_message") else body["messages"]
    return 5 * len(messages)


def honours_the_other_field_only(body: dict[str, Any]) -> int:
    return 5 * len(body["messages"]) + 3 * body.get("add_generation_prompt", True)


class Cached:
    """Counts only what it has not in its cache, as some servers do."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, body: dict[str, Any]) -> int:
        self.calls += 1
        return 40 - self.calls


def probed(reply: Callable[[dict[str, Any]], Any]) -> tuple[str, str]:
    with FakeEndpoint(lambda messages: reply(endpoint.requests[-1])) as endpoint:
        found = probe_continuation(AgentConfig(model="fake", api_base=endpoint.url))
    return found.via, found.reason


def test_an_endpoint_that_continues_is_recognised_and_one_that_ignores_the_fields() -> None:
    for continues, via in ((True, "prefill"), (False, "instruction")):
        with FakeEndpoint(lambda messages: "x", continues=continues) as endpoint:
            found = probe_continuation(AgentConfig(model="fake", api_base=endpoint.url))
        assert found.via == via
        assert len(endpoint.requests) == 4
        assert found.prompt_tokens.keys() == {"continued", "closed", "continued again", "question"}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (refusing, "refuses"),
        (counted(lambda body: None), "does not count"),
        (counted(drops_the_message), "ignores"),
        (counted(honours_the_other_field_only), "ignores"),
        (counted(Cached()), "different"),
    ],
)
def test_what_an_endpoint_may_do_instead_of_continuing(
    reply: Callable[[dict[str, Any]], Any], said: str
) -> None:
    via, reason = probed(reply)
    assert via == "instruction"
    assert said in reason


def test_a_dead_endpoint_is_no_verdict() -> None:
    with pytest.raises(ProviderError):
        probed(lambda body: (401, b"{}"))


# A whole run.


class Teacher:
    """Thinks when it is asked to, and acts when it is asked to; never sees which server it is behind."""

    def __init__(self) -> None:
        self.thoughts = dict.fromkeys(
            map(str, range(6)), "I need the next number.\n\nIt is easy.\n\nAnswer: 1"
        )
        self.broken: set[str] = set()

    def __call__(self, messages: list[dict[str, Any]]) -> Any:
        if messages[0]["role"] != "system":
            return "ok"  # the check before the start, and the probe
        number = messages[1]["content"].split("\n")[0].split()[-1]
        if messages[0]["content"] == FIRST_THOUGHT:
            return (400, b'{"error": {"message": "no"}}') if number in self.broken else self.thoughts[number]
        code = f"```python\nfinal_answer({number} + 1)\n```"
        return f" So I add.\n{code}" if messages[-1]["role"] == "assistant" else f"Thought: I add.\n{code}"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    write_jsonl(
        path, [Task(id=str(i), question=f"add {i}", answer=str(i + 1), split="train") for i in range(6)]
    )
    return path


def config(tasks: Path, url: str, **changes: Any) -> CollectConfig:
    agent = AgentConfig(model="fake", api_base=url, sandbox="local")
    return CollectConfig(
        tasks=str(tasks), agent=agent, workers=3, **{"first_thought": FirstThoughtConfig(), **changes}
    )


def first_steps(out: Path) -> dict[str, Step]:
    return {item.task.id: item.steps[0] for item in read_trajectories(out / "trajectories.jsonl")}


def test_a_run_gives_prefixes_and_keeps_the_reason_of_those_it_does_not(tasks: Path, tmp_path: Path) -> None:
    teacher, out = Teacher(), tmp_path / "run"
    teacher.thoughts |= {"1": "Answer: 1", "2": "", "3": "x" * 1300 + "\n\nAnswer: 4"}
    with FakeEndpoint(teacher, continues=True) as endpoint:
        done = collect(config(tasks, endpoint.url), out)
    assert [item.correct for item in done.trajectories] == [True] * 6
    begun = FirstThought(prefix="Thought: I need the next number.", via="prefill")
    assert {task: step.first_thought for task, step in first_steps(out).items()} == {
        **dict.fromkeys("045", begun),
        **dict.fromkeys("123"),
    }
    lines = {line.task: line for line in iter_jsonl(out / "first-thought" / "prefixes.jsonl", Prefix)}
    assert [lines[task].dropped.split(":")[0] for task in "0123"] == [
        "",
        "no blank line",
        "empty",
        "overlong",
    ]
    counts = {"used": 3, "dropped": {"no blank line": 1, "empty": 1, "overlong": 1}, "via": "prefill"}
    assert read_json(out / "manifest.json")["counts"]["first_thoughts"] == counts
    assert done.first_thoughts is not None
    assert done.first_thoughts.counts() == counts
    assert load_first_thoughts(out) == done.first_thoughts
    assert len(filter_run(out, tmp_path / "kept").kept) == 6


def test_of_several_teachers_the_one_that_can_least_decides(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with FakeEndpoint(Teacher(), continues=True) as able, FakeEndpoint(Teacher()) as other:
        teachers = (TeacherConfig(model="other", api_base=other.url),)
        done = collect(config(tasks, able.url, teachers=teachers), out)
    assert [item.correct for item in done.trajectories] == [True] * 6
    given = [step.first_thought for step in first_steps(out).values() if step.first_thought is not None]
    assert given
    assert {item.via for item in given} == {"instruction"}


def test_the_estimate_has_the_chains_of_thought(tasks: Path, tmp_path: Path) -> None:
    without = expect(config(tasks, "http://127.0.0.1:1/v1", first_thought=None), tmp_path / "a")
    before = expect(config(tasks, "http://127.0.0.1:1/v1"), tmp_path / "b")
    assert before.calls - without.calls == 6
    assert before.input_tokens > without.input_tokens
    assert before.output_tokens > without.output_tokens
    assert "6 chains of thought" in before.text()
    out = tmp_path / "run"
    with FakeEndpoint(Teacher(), continues=True) as endpoint:
        collect(config(tasks, endpoint.url), out)
        assert expect(config(tasks, endpoint.url), out).calls == 0


def test_an_endpoint_that_ignores_the_fields_is_asked_by_instruction(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(Teacher()) as endpoint:
        collect(config(tasks, endpoint.url), tmp_path / "run")
    for step in first_steps(tmp_path / "run").values():
        assert step.first_thought is not None
        assert step.first_thought.via == "instruction"
        assert step.output.startswith("Thought: I need the next number. I add.\n```python")
    # Only the probe ends in an assistant message.
    assert all(
        body["messages"][-1]["role"] == "user"
        for body in endpoint.requests
        if body["messages"][0]["role"] == "system"
    )


def test_nothing_finished_is_asked_again(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with FakeEndpoint(Teacher(), continues=True) as endpoint:
        collect(config(tasks, endpoint.url), out)
        for log in (out / "trajectories.jsonl", out / "first-thought" / "trajectories.jsonl"):
            lines = log.read_bytes().splitlines(keepends=True)
            log.write_bytes(b"".join(lines[:4]) + lines[4][:50])
            (log.parent / "calls-0.jsonl").unlink()  # which would answer everything
        endpoint.requests.clear()
        done = collect(config(tasks, endpoint.url), out)
        asked = [body["messages"] for body in endpoint.requests if body["messages"][0]["role"] == "system"]
        assert [messages[0]["content"] == FIRST_THOUGHT for messages in asked].count(True) == 2
        assert len(asked) == 4
        assert len(done.trajectories) == 6
        assert all(step.first_thought for step in first_steps(out).values())
        endpoint.requests.clear()
        assert collect(config(tasks, endpoint.url), out).first_thoughts == done.first_thoughts
        assert endpoint.requests == []


def test_a_thought_that_ended_by_an_error_is_waited_for(tasks: Path, tmp_path: Path) -> None:
    teacher, out = Teacher(), tmp_path / "run"
    teacher.broken = {"3"}
    with FakeEndpoint(teacher, continues=True) as endpoint:
        done = collect(config(tasks, endpoint.url), out)
        assert (done.missing, sorted(first_steps(out))) == (1, ["0", "1", "2", "4", "5"])
        assert (out / "first-thought" / "errors.jsonl").is_file()
        teacher.broken = set()
        assert collect(config(tasks, endpoint.url), out).missing == 0
    assert first_steps(out)["3"].first_thought is not None


def test_changed_settings_or_another_kind_of_endpoint_are_refused(tasks: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "run", Teacher()
    teacher.broken = {"3"}  # so that something is left to do
    with FakeEndpoint(teacher, continues=True) as endpoint:
        collect(config(tasks, endpoint.url), out)
        for other in (None, FirstThoughtConfig(max_characters=5)):
            with pytest.raises(ConfigError, match="first_thought"):
                collect(config(tasks, endpoint.url, first_thought=other), out)
        collect(config(tasks, endpoint.url, first_thought=None), tmp_path / "plain")
        with pytest.raises(ConfigError, match="first_thought"):
            collect(config(tasks, endpoint.url), tmp_path / "plain")
    with FakeEndpoint(teacher) as ignoring, pytest.raises(ConfigError, match="given by prefill"):
        collect(config(tasks, ignoring.url), out)


def test_no_thought_at_all_is_an_error_before_the_agent_runs(tasks: Path, tmp_path: Path) -> None:
    teacher = Teacher()
    teacher.thoughts = dict.fromkeys(teacher.thoughts, "Answer: 1")
    with (
        FakeEndpoint(teacher, continues=True) as endpoint,
        pytest.raises(DataError, match="6 no blank line"),
    ):
        collect(config(tasks, endpoint.url), tmp_path / "run")
    assert not (tmp_path / "run" / "trajectories.jsonl").exists()
    assert len((tmp_path / "run" / "first-thought" / "prefixes.jsonl").read_text().splitlines()) == 6


def test_a_chain_of_thought_has_no_first_step(tasks: Path, tmp_path: Path) -> None:
    agent = AgentConfig(model="fake", api_base="http://127.0.0.1:9/v1", kind="cot")
    wrong = CollectConfig(tasks=str(tasks), agent=agent, first_thought=FirstThoughtConfig())
    with pytest.raises(ConfigError, match="--kind agent"):
        collect(wrong, tmp_path / "run")


def test_the_report_compares_on_the_same_tasks(tasks: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "run", Teacher()
    teacher.thoughts["1"] = "Answer: 1"
    with FakeEndpoint(teacher, continues=True) as endpoint:
        done = compare_first_thoughts(config(tasks, endpoint.url), out)
        figures = read_json(out / "first-thought.json")
        assert (figures["all"]["with"]["n"], figures["with_prefix"]["with"]["n"]) == (6, 5)
        assert figures["all"]["without"]["correct"] == 6
        assert figures["all"]["difference"]["n_pairs"] == 6
        assert figures["chain_of_thought"]["correct"] == 1  # "Answer: 1" is right once
        assert not figures["programmatic"]
        text = (out / "first-thought.md").read_text()
        assert "| with first thoughts | 6 | 6 | 100.0% | 61.0% to 100.0% | 1.00 |" in text
        assert "1 no blank line" in text
        assert "not a language model" not in text
        plain = read_trajectories(out / "without-first-thought" / "trajectories.jsonl")
        assert all(item.steps[0].first_thought is None for item in plain)
        endpoint.requests.clear()
        assert compare_first_thoughts(config(tasks, endpoint.url), out).trajectories == done.trajectories
        assert endpoint.requests == []
        with pytest.raises(ConfigError, match="--first-thought"):
            compare_first_thoughts(config(tasks, endpoint.url, first_thought=None), tmp_path / "none")


def test_the_report_says_when_the_teacher_is_a_program(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(Teacher(), continues=True) as endpoint:
        compare_first_thoughts(
            config(tasks, endpoint.url, labels={"teacher": EXPERT_LABEL}), tmp_path / "run"
        )
    assert "not a language model" in (tmp_path / "run" / "first-thought.md").read_text()


def test_a_run_whose_thoughts_were_deleted_has_them_again(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with FakeEndpoint(Teacher(), continues=True) as endpoint:
        first = collect(config(tasks, endpoint.url), out)
        (out / "first-thought" / "prefixes.jsonl").unlink()
        again = collect(config(tasks, endpoint.url), out)
    assert again.first_thoughts == first.first_thoughts
    (out / "first-thought" / "endpoint.json").write_text('{"via": "magic"}')
    with pytest.raises(DataError, match=r"endpoint\.json"):
        load_first_thoughts(out)


def test_a_recipe_can_ask_for_first_thoughts(tmp_path: Path) -> None:
    from agentkd.pipeline import _collect_config, _Data

    recipe = quickstart_recipe("tiny")
    wished = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"first_thought": True})})
    data = _Data([TASK], tmp_path, None)

    def chosen(recipe: Recipe, kind: Any) -> FirstThoughtConfig | None:
        return _collect_config(recipe, data, kind, "http://127.0.0.1:9/v1", "m", {}).first_thought

    assert chosen(wished, "agent") == FirstThoughtConfig()
    assert chosen(wished, "cot") is None
    assert chosen(recipe, "agent") is None


def test_of_several_endpoints_the_one_that_can_least_decides(tmp_path: Path) -> None:
    def run(tasks: Any, agent: AgentConfig, log: Path) -> None:
        assert (agent.kind, agent.model, agent.prompt) == ("cot", "one", FIRST_THOUGHT)
        write_jsonl(log, [thought("I need it.\n\nAnswer: 7")])

    with (
        FakeEndpoint(lambda messages: "x", continues=True) as able,
        FakeEndpoint(lambda messages: "x") as other,
    ):
        one = AgentConfig(model="one", api_base=able.url)
        two = AgentConfig(model="two", api_base=other.url)
        both = collect_first_thoughts([TASK], [one, two], FirstThoughtConfig(), tmp_path / "both", run)
        alone = collect_first_thoughts([TASK], [one], FirstThoughtConfig(), tmp_path / "alone", run)
    assert (both.via, alone.via) == ("instruction", "prefill")
    assert read_json(tmp_path / "both" / "first-thought" / "endpoint.json")["model"] == "two"
