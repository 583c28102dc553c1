"""Routers: who decides whether tools are used, what that costs, and what stands in the record."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from smolagents import tool
from smolagents.models import ChatMessage, MessageRole, Model
from smolagents.monitoring import TokenUsage

from agentkd import prompt as prompts
from agentkd.action import parse_action
from agentkd.adapt import AdaptConfig, Respondent
from agentkd.adapt.partition import partition
from agentkd.agent import build_agent
from agentkd.agent_config import AgentConfig
from agentkd.assess import _test_time, assess
from agentkd.draw import Draft
from agentkd.errors import ConfigError, DataError
from agentkd.evaluate.routing import RoutingPoint, routing_figures, routing_table, tuned_router
from agentkd.model import openai_model
from agentkd.rollout import rollout
from agentkd.router import RouterConfig, make_router, parse_router, tool_probability
from agentkd.sampler import SamplerConfig, SelfConsistentSampler
from agentkd.task import Task
from agentkd.test_time import TestTime, load_test_time, save_test_time
from agentkd.testing import FakeEndpoint
from agentkd.tool_use import used_tool
from agentkd.trajectory import StopReason, Trajectory

TASK = Task(id="1", question="six times seven?", answer="42")


def action(code: str) -> str:
    return f"Thought: go.\n```python\n{code}\n```"


KNOWN, COMPUTED = action("final_answer(42)"), action("final_answer(6 * 7)")
SEARCHED = action("final_answer(search('six times seven'))")


def search_of(asked: list[str]) -> Any:
    """A tool that knows the answer, and notes what it is asked."""

    @tool
    def search(query: str) -> str:
        """Find it.

        Args:
            query: what.
        """
        asked.append(query)
        return "42"

    return search


class Mind(Model):
    """Says what it is told to under each of the three prompts, with the log-probabilities it is told.

    ``texts`` has the answers of each prompt, in turn; the last one goes on for ever.
    """

    def __init__(self, logprob: float | None = -0.1, **texts: str | list[str]) -> None:
        super().__init__(model_id="mind")
        self.logprob = logprob
        self.texts = {name: [text] if isinstance(text, str) else list(text) for name, text in texts.items()}
        self.asked: list[str] = []

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        system = messages[0].content[0]["text"]
        mode = next(name for name, text in prompts.TOOL_PROMPTS.items() if system[:40] == text[:40])
        n = options.get("n", 1)
        said = [
            self.texts[mode].pop(0) if len(self.texts[mode]) > 1 else self.texts[mode][0] for _ in range(n)
        ]
        self.asked += [mode] * n
        scores = None if self.logprob is None else [SimpleNamespace(logprob=self.logprob)]
        choices = [
            SimpleNamespace(
                finish_reason="stop",
                token_ids=[1],
                message=SimpleNamespace(content=text),
                logprobs=SimpleNamespace(content=scores),
            )
            for text in said
        ]
        return ChatMessage(
            role=MessageRole.ASSISTANT,
            content=said[0],
            raw=SimpleNamespace(choices=choices, prompt_token_ids=[7]),
            token_usage=TokenUsage(input_tokens=10, output_tokens=n),
        )


def run(
    mind: Mind, router: str | RouterConfig, sampler: SamplerConfig | None = None, tools: Sequence[Any] = ()
) -> Trajectory:
    config = parse_router(router) if isinstance(router, str) else router
    assert config is not None
    agent = build_agent(
        mind,
        tools,
        prompt=prompts.TOOLS_ALLOWED,
        sandbox="local",
        max_steps=2,
        router=make_router(config),
        sampler=SelfConsistentSampler(sampler) if sampler else None,
    )
    record = rollout(agent, TASK)
    assert Trajectory.model_validate_json(record.model_dump_json()) == record
    assert record.usage.output_tokens == len(mind.asked)  # nothing that was asked is free
    return record


def test_the_first_action_decides_where_tools_are_allowed() -> None:
    direct, tools = run(Mind(allowed=KNOWN), "implicit"), run(Mind(allowed=COMPUTED), "implicit")
    for record, decided in ((direct, True), (tools, False)):
        (step,) = record.steps
        assert record.correct
        assert step.route is not None
        assert (step.route.mode, step.route.direct, step.route.logprobs) == ("allowed", decided, True)
    assert direct.steps[0].route.p_tool == pytest.approx(0.25 * (1 - math.exp(-0.1)))  # type: ignore[union-attr]


def test_forced_and_never_ask_under_their_own_prompt() -> None:
    mind = Mind(required=COMPUTED)
    record = run(mind, "forced")
    assert record.system_prompt.startswith(prompts.TOOLS_REQUIRED[:60])
    assert (mind.asked, record.correct) == (["required"], True)
    record = run(Mind(direct=KNOWN), "never")
    assert (record.system_prompt, record.correct) == (prompts.DIRECT, True)


def test_without_tools_nothing_is_run() -> None:
    record = run(Mind(direct=COMPUTED), "never")
    assert record.answer is None
    assert [step.failure.kind if step.failure else None for step in record.steps] == ["parse"]
    assert record.stop_reason == StopReason.MAX_STEPS
    assert "Answer directly" in str(record.steps[0].observation)


def test_one_agent_is_routed_anew_for_every_question() -> None:
    mind = Mind(direct=[action("final_answer(1)"), KNOWN, KNOWN], required=COMPUTED)
    config = RouterConfig(kind="agreement", agreement=1.0, answers=2)
    agent = build_agent(mind, prompt=prompts.TOOLS_ALLOWED, sandbox="local", router=make_router(config))
    modes = [rollout(agent, TASK).steps[0].route for _ in range(2)]
    assert [route.mode for route in modes if route] == ["required", "direct"]


@pytest.mark.parametrize(
    ("first", "threshold", "asked", "mode"),
    [
        (KNOWN, 0.5, ["allowed"], "allowed"),
        (KNOWN, 0.0, ["allowed", "required"], "required"),
        (COMPUTED, 0.5, ["allowed"], "allowed"),
        (COMPUTED, 1.0, ["allowed", "direct"], "direct"),
    ],
)
def test_a_threshold_keeps_the_first_action_or_overrules_it(
    first: str, threshold: float, asked: list[str], mode: str
) -> None:
    mind = Mind(allowed=first, direct=KNOWN, required=COMPUTED)
    record = run(mind, RouterConfig(kind="threshold", threshold=threshold))
    route = record.steps[0].route
    assert route is not None
    assert (mind.asked, route.mode, record.correct) == (asked, mode, True)
    assert len(route.drafts) == 1
    assert record.steps[0].prompt_token_ids == (7,)


def test_direct_answers_that_agree_are_taken_and_others_are_not() -> None:
    texts = [action(f"final_answer({value})") for value in (41, 42, 42.0, 42)] + ["no code"]
    mind = Mind(direct=texts)
    record = run(mind, "agreement:0.6")
    route = record.steps[0].route
    assert route is not None
    assert (record.answer, route.agreement, route.direct) == ("42", 0.6, True)
    assert [draft.chosen for draft in route.drafts] == [False, True, False, False, False]
    assert route.drafts[4].outcome is None
    mind = Mind(direct=texts, required=COMPUTED)
    record = run(mind, "agreement:0.8")
    assert (mind.asked, record.correct) == (["direct"] * 5 + ["required"], True)


def test_a_sampler_votes_on_what_follows_but_not_on_a_direct_answer() -> None:
    config = SamplerConfig(n=3, confidence=None)
    assert run(Mind(direct=KNOWN), "agreement:1", config).steps[0].candidates == ()
    record = run(Mind(required=COMPUTED), "forced", config)
    assert [candidate.votes for candidate in record.steps[0].candidates] == [3, 3, 3]
    record = run(Mind(direct=[COMPUTED, COMPUTED, KNOWN]), "never", config)
    assert record.correct  # candidates that compute are out


def test_the_probability_of_a_tool() -> None:
    def p_tool(*drafts: tuple[str, float | None]) -> float:
        made = [Draft(text, logprobs=None if score is None else (score,)) for text, score in drafts]
        return tool_probability(made, [parse_action(text) for text, _ in drafts])

    assert p_tool((KNOWN, math.log(0.9))) == pytest.approx(0.025)
    assert p_tool((COMPUTED, math.log(0.9))) == pytest.approx(0.975)
    assert p_tool((KNOWN, math.log(0.9)), (KNOWN, math.log(0.9))) < 0.025  # one text counts once
    assert p_tool((KNOWN, None)) == 0.25
    assert p_tool((KNOWN, None), (COMPUTED, None), (COMPUTED, None)) == pytest.approx(0.625)
    assert p_tool(("no code", 0.0)) == 0.5
    assert 0 <= p_tool((KNOWN, 0.0), (COMPUTED, 0.0)) <= 1  # probabilities that add up to more than 1


@pytest.mark.parametrize("fault", [None, 400, 422])
def test_log_probabilities_are_asked_for_once_where_they_are_refused(fault: int | None) -> None:
    def reply(messages: list[dict[str, Any]]) -> Any:
        if fault is not None and "logprobs" in endpoint.requests[-1]:
            return fault, b'{"error": {"message": "logprobs is not supported"}}'
        return KNOWN

    with FakeEndpoint(reply) as endpoint:
        model = openai_model("fake", endpoint.url, retries=0)
        agent = build_agent(model, sandbox="local", router=make_router(RouterConfig()))
        records = [rollout(agent, TASK) for _ in range(2)]
    assert all(record.correct for record in records)
    assert ["logprobs" in request for request in endpoint.requests] == (
        [True, True] if fault is None else [True, False, False]
    )
    assert records[0].steps[0].route is not None
    assert records[0].steps[0].route.p_tool == 0.25  # as far as one draft tells without them


@pytest.mark.parametrize(("answer", "right"), [(COMPUTED, True), (action("1 / 0"), False), (SEARCHED, False)])
def test_an_answer_without_tools_may_compute_where_only_search_is_a_tool(answer: str, right: bool) -> None:
    """As the partition of adaptation counts it, which asks without tools."""
    asked: list[str] = []
    record = run(Mind(direct=answer), RouterConfig(kind="never", tools="search"), tools=[search_of(asked)])
    assert (record.correct, len(record.steps), asked) == (right, 1, [])
    assert record.stop_reason == (StopReason.FINAL_ANSWER if right else StopReason.MAX_STEPS)
    route = record.steps[0].route
    assert route is not None
    assert route.direct is (None if answer is SEARCHED else True)
    assert not used_tool(record, "search")
    asking = Respondent({}, lambda config: nullcontext((AgentConfig(sandbox="local"), Mind(direct=answer))))
    with TemporaryDirectory() as folder:
        (decision,) = partition([TASK], asking, Path(folder), AdaptConfig(tools="search"))
    assert decision.easy is record.correct


def test_routers_decide_by_what_counts_as_a_tool() -> None:
    tools = [search_of([])]
    for first, direct in ((COMPUTED, True), (SEARCHED, False)):
        record = run(Mind(allowed=first, required=first), RouterConfig(tools="search"), tools=tools)
        config = RouterConfig(kind="threshold", tools="search")
        routes = [it.steps[0].route for it in (record, run(Mind(allowed=first), config, tools=tools))]
        assert [route.direct for route in routes if route] == [direct, direct]
        assert all((route.p_tool or 0.0) < 0.5 for route in routes if route) is direct


def test_answers_that_compute_agree_when_they_are_one_program() -> None:
    config = RouterConfig(kind="agreement", agreement=0.6, answers=3, tools="search")
    spaced = action("final_answer(6*7)")
    record = run(Mind(direct=[action("final_answer(41)"), COMPUTED, spaced]), config)
    route = record.steps[0].route
    assert route is not None
    assert (record.answer, route.direct, route.agreement) == ("42", True, pytest.approx(2 / 3))
    assert [draft.outcome for draft in route.drafts] == ["final answer: 41", None, None]
    strict = run(Mind(direct=COMPUTED, required=KNOWN), config.model_copy(update={"tools": "both"}))
    route = strict.steps[0].route
    assert route is not None
    assert (route.direct, route.agreement) == (False, 0.0)


def test_repairs_of_drafts_are_in_the_record_and_only_what_was_taken_is_chosen() -> None:
    config = RouterConfig(kind="threshold", threshold=0.5)
    unclosed = COMPUTED.removesuffix("\n```")
    route = run(Mind(allowed=unclosed), config).steps[0].route
    assert route is not None
    assert [(draft.repairs, draft.chosen) for draft in route.drafts] == [(("closed_fence",), True)]
    sampled = run(Mind(allowed=[unclosed, COMPUTED]), config, SamplerConfig(n=2, confidence=None)).steps[0]
    assert sampled.route is not None
    assert [draft.chosen for draft in sampled.route.drafts] == [False]
    assert len(sampled.candidates) == 2


def test_an_override_keeps_what_it_does_not_name() -> None:
    saved = RouterConfig(
        kind="agreement", agreement=0.4, answers=9, temperature=1.1, top_p=0.9, seed=7, tools="search"
    )
    assert parse_router("agreement", saved=saved) == saved
    assert parse_router("agreement:0.6", 3, saved) == saved.model_copy(update={"agreement": 0.6, "seed": 3})
    other = RouterConfig(kind="threshold", threshold=0.3, seed=7, tools="search")
    assert parse_router("threshold:0.3", saved=saved) == other
    assert parse_router("none", saved=saved) is None
    assert parse_router("never") == RouterConfig(kind="never")


def test_flags_of_evaluation_keep_what_they_do_not_name(tmp_path: Path) -> None:
    saved = TestTime(
        sampler=SamplerConfig(n=8, temperature=1.0, batch=2, seed=1),
        router=RouterConfig(kind="agreement", answers=9, seed=1, tools="search"),
    )
    (tmp_path / "student.json").write_text("{}")
    save_test_time(tmp_path, saved)
    assert _test_time(str(tmp_path), None, None, None, 5) == saved
    found = _test_time(str(tmp_path), 4, "agreement:0.5", "code", 5)
    assert found.sampler == SamplerConfig(n=4, temperature=1.0, batch=2, seed=5)
    assert found.router == RouterConfig(kind="agreement", agreement=0.5, answers=9, seed=5, tools="code")
    assert _test_time(str(tmp_path), 1, "none", None, 5) == TestTime()
    compared = _test_time(str(tmp_path), None, "all", None, 5).router
    assert compared == RouterConfig(seed=5, tools="search")


@pytest.mark.parametrize("text", ["", "sometimes", "never:1", "threshold:2", "agreement:x", "agreement:nan"])
def test_a_router_that_does_not_exist(text: str) -> None:
    with pytest.raises(ConfigError, match="There is no router"):
        parse_router(text)


def test_test_time_settings_are_kept_in_the_student(tmp_path: Path) -> None:
    assert load_test_time(tmp_path) == TestTime()
    settings = TestTime(sampler=SamplerConfig(n=4), router=parse_router("threshold:0.3", seed=7))
    with pytest.raises(ConfigError, match="no student folder"):
        save_test_time(tmp_path, settings)
    (tmp_path / "student.json").write_text("{}")
    save_test_time(tmp_path, settings)
    assert load_test_time(tmp_path) == settings
    (tmp_path / "test_time.json").write_text(json.dumps({"router": {"kind": "oracle"}}))
    with pytest.raises(ConfigError, match=r"router\.kind"):
        load_test_time(tmp_path)
    (tmp_path / "test_time.json").write_text("{")
    with pytest.raises(DataError):
        load_test_time(tmp_path)
    save_test_time(tmp_path, TestTime())
    assert not (tmp_path / "test_time.json").exists()


def runs_of_three() -> dict[str, list[Trajectory]]:
    """Knows the first, has to compute the second, and gets the third by neither."""
    wrong = action("final_answer(0)")
    tasks = [TASK.model_copy(update={"id": str(number)}) for number in range(3)]
    minds = [
        {"direct": KNOWN, "allowed": KNOWN, "required": COMPUTED},
        {"direct": [wrong, KNOWN], "allowed": wrong, "required": COMPUTED},
        {"direct": wrong, "allowed": action("final_answer(0 * 1)"), "required": wrong},
    ]
    runs: dict[str, list[Trajectory]] = {}
    for kind in ("never", "implicit", "forced", "agreement"):
        config = RouterConfig(kind=kind, agreement=0.0, answers=2)  # type: ignore[arg-type]
        runs[kind] = []
        for task, texts, score in zip(tasks, minds, (-0.1, -2.0, -0.1), strict=True):
            agent = build_agent(
                Mind(score, **texts),  # type: ignore[arg-type]
                prompt=prompts.TOOLS_ALLOWED,
                sandbox="local",
                router=make_router(config),
            )
            runs[kind].append(rollout(agent, task))
    return runs


def test_curves_are_what_the_routers_would_have_done() -> None:
    runs = runs_of_three()
    result = routing_figures("mind", runs)
    assert (result.easy, result.hard, result.logprobs) == (1, 2, True)
    assert {kind: figures.point.accuracy for kind, figures in result.routers.items()} == {
        "never": pytest.approx(1 / 3),
        "implicit": pytest.approx(1 / 3),
        "forced": pytest.approx(2 / 3),
    }
    assert (result.oracle.accuracy, result.oracle.direct) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert [result.routers[kind].tool_usage_accuracy for kind in ("never", "implicit")] == [0.5, 0.75]
    assert result.routers["implicit"].tool_rate_easy == 0.0
    assert result.routers["implicit"].tool_rate_hard == 0.5
    by_agreement = {point.value: point for point in result.curves["agreement"]}
    assert by_agreement[1.0].accuracy == pytest.approx(2 / 3)  # the second question's answers differ
    # Two questions agree and cost two answers; the other one was computed after them.
    answers, forced = [(10 + 2)] * 3, 11
    assert by_agreement[1.0].tokens == pytest.approx((sum(answers) + forced) / 3)
    assert by_agreement[1.0].direct == pytest.approx(2 / 3)
    assert by_agreement[0.0].tokens == pytest.approx(sum(answers) / 3)


def test_a_point_of_the_threshold_curve_is_that_router_when_it_is_run() -> None:
    points = routing_figures("mind", runs_of_three()).curves["threshold"]
    assert len(points) == 5
    for point in points:
        check_threshold(point)


def check_threshold(point: RoutingPoint) -> None:
    wrong = action("final_answer(0)")
    minds = [
        (-0.1, {"direct": KNOWN, "allowed": KNOWN, "required": COMPUTED}),
        (-2.0, {"direct": wrong, "allowed": wrong, "required": COMPUTED}),
        (-0.1, {"direct": wrong, "allowed": action("final_answer(0 * 1)"), "required": wrong}),
    ]
    config = RouterConfig(kind="threshold", threshold=point.value or 0.0)
    ran = [run(Mind(score, **texts), config) for score, texts in minds]  # type: ignore[arg-type]
    assert sum(record.correct for record in ran) / 3 == pytest.approx(point.accuracy)
    tokens = [record.usage.input_tokens + record.usage.output_tokens for record in ran]
    assert sum(tokens) / 3 == pytest.approx(point.tokens)


def test_the_router_that_fits_a_budget() -> None:
    result = routing_figures("mind", runs_of_three())
    assert tuned_router(result, None).kind in ("forced", "threshold")
    assert tuned_router(result, None) == tuned_router(result, 1e9)
    cheapest = min(
        [figures.point.tokens for figures in result.routers.values()]
        + [point.tokens for points in result.curves.values() for point in points]
    )
    assert tuned_router(result, cheapest / 2) == tuned_router(result, cheapest)
    with pytest.raises(ConfigError, match="No question"):
        routing_figures("mind", {kind: [] for kind in ("never", "implicit", "forced", "agreement")})


def test_the_table_shows_every_point() -> None:
    from rich.console import Console

    result = routing_figures("mind", runs_of_three())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(routing_table(result, tuned_router(result, None)))
    text = console.export_text()
    points = sum(map(len, result.curves.values()))
    assert len(re.findall(r"\d% \[\d+, \d+\]", text)) == 4 + points
    assert "1 of 3 questions are easy" in text
    assert "Chosen: " in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text  # it fits


def test_records_of_before_have_no_route() -> None:
    record = run(Mind(allowed=KNOWN), "implicit")
    old = json.loads(record.model_dump_json())
    del old["steps"][0]["route"]
    assert Trajectory.model_validate(old).steps[0].route is None


def answering(messages: list[dict[str, Any]]) -> str:
    """A model that knows one of two answers, and can compute both."""
    texts = [message["content"] for message in messages]
    system, question = (text if isinstance(text, str) else text[0]["text"] for text in (texts[0], texts[-1]))
    if system == prompts.DIRECT:
        return action(f"final_answer({4 if '2' in question else 0})")
    return action(f"final_answer({question.removesuffix('?')})")


def test_evaluate_compares_all_routers_and_goes_on(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"question": "2 + 2?", "answer": "4"}, {"question": "13 * 17?", "answer": "221"}]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(out: str, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "student": None,
            "tasks": str(tasks),
            "out": tmp_path / out,
            "n": None,
            "split": "all",
            "seed": 0,
            "endpoint": (endpoint.url, "fake", None),
            "kind": None,
            "sandbox": "local",
            "corpus": None,
            "temperature": 0.0,
            "max_tokens": 64,
            "workers": 2,
            "actions": None,
            "router": None,
            "target_tokens": None,
            "save": False,
            "on_progress": None,
        }
        return assess(**{**settings, **options})[0]

    with FakeEndpoint(answering) as endpoint:
        result = evaluate("all", router="all")
        assert (result.easy, result.hard, result.oracle.accuracy) == (1, 1, 1.0)
        assert result.routers["never"].point.accuracy == 0.5
        assert result.routers["forced"].tool_usage_accuracy == 0.5
        written = json.loads((tmp_path / "all" / "routing.json").read_text())
        assert written == result.model_dump(mode="json")
        asked = len(endpoint.requests)
        assert evaluate("all", router="all") == result
        assert len(endpoint.requests) == asked  # nothing was left to run
        assert evaluate("one", router="forced").overall.accuracy == 1.0
        with pytest.raises(ConfigError, match="another router"):
            evaluate("one", router="never")
        with pytest.raises(ConfigError, match="another sampler"):
            evaluate("one", router="forced", actions=4)
        with pytest.raises(ConfigError, match="another sampler"):
            evaluate("all", router="all", actions=4)
        with pytest.raises(ConfigError, match="another router"):
            evaluate("all", router="all", tools="search")
        search = evaluate("search", router="all", tools="search")
        assert (search.tools, result.tools) == ("search", "both")
        assert [found.routers["forced"].tool_rate for found in (search, result)] == [0.0, 1.0]
