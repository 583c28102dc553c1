"""Self-consistent action sampling: votes, forks, and how many are drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from smolagents import tool
from smolagents.models import ChatMessage

from agentkd.action import parse_action
from agentkd.agent import StepAgent, build_agent
from agentkd.draw import Draft, StepDraw
from agentkd.model import openai_model
from agentkd.rollout import rollout
from agentkd.sampler import SamplerConfig, SelfConsistentSampler, run_action
from agentkd.sandbox import CodeFailure, Outcome, open_sandbox
from agentkd.sandbox.fork import ForkSandbox
from agentkd.task import Task
from agentkd.testing import FakeEndpoint, ScriptedModel
from agentkd.trajectory import Candidate, StopReason, Trajectory, Usage
from agentkd.vote import Tally, lead_probability, same_outcome


def action(code: str) -> str:
    return f"Thought: go.\n```python\n{code}\n```"


class Scripted:
    """Draws the given texts in order."""

    def __init__(self, texts: Sequence[str], logprobs: Sequence[float] = ()) -> None:
        self.texts = list(texts)
        self.logprobs = list(logprobs)
        self.asked: list[int] = []

    def __call__(self, count: int, first: int, config: SamplerConfig) -> tuple[list[Draft], Usage]:
        self.asked.append(count)
        drafts = [
            Draft(text, token_ids=(1,) * 10, logprobs=(self.logprobs[number],) if self.logprobs else None)
            for number, text in enumerate(self.texts[first : first + count], first)
        ]
        return drafts, Usage(input_tokens=7, output_tokens=10 * count)


def fixed(n: int, **options: Any) -> SelfConsistentSampler:
    return SelfConsistentSampler(SamplerConfig(n=n, confidence=None, **options))


@pytest.fixture
def sandbox() -> Iterator[ForkSandbox]:
    session = ForkSandbox(imports=["os"], timeout=2.0)
    yield session
    session.close()


def test_the_same_action_drawn_four_times_is_done_once(sandbox: ForkSandbox) -> None:
    sandbox("x = 1")
    done = fixed(4).act(Scripted([action("x = x + 1")] * 4), parse_action, sandbox)
    assert done.outcome is not None
    assert done.outcome.error is None
    assert sandbox("x").output == 2
    assert [candidate.votes for candidate in done.candidates] == [4] * 4
    assert [candidate.chosen for candidate in done.candidates] == [True, False, False, False]


def test_one_search_however_many_candidates_ask_it(sandbox: ForkSandbox) -> None:
    asked = []

    def search(query: str) -> str:
        asked.append(query)
        return "found"

    sandbox.send_tools({"search": search, "final_answer": None})
    codes = [f"note = {n}\nprint(search('Oslo'))" for n in range(4)]  # different code, the same call
    done = fixed(4).act(Scripted([action(code) for code in codes]), parse_action, sandbox)
    assert asked == ["Oslo"]
    assert done.outcome is not None
    assert [use.name for use in sandbox.take_tool_uses()] == ["search"]


def test_final_answers_vote_by_their_value(sandbox: ForkSandbox) -> None:
    sandbox.send_tools({"final_answer": None})
    codes = [f"print('working')\nfinal_answer({letter!r})" for letter in "ABBB"]
    done = fixed(4).act(Scripted([action(code) for code in codes]), parse_action, sandbox)
    assert done.outcome is not None
    assert (done.outcome.value, done.outcome.is_final) == ("B", True)


def test_losers_leave_no_trace(sandbox: ForkSandbox) -> None:
    sandbox("x = [1]\nopen('f', 'w').write('kept')")
    losing = "import os\ndel x\nos.remove('f')\n'gone'"
    texts = [action(losing), action("x.append(2)\nx"), action("x.append(2)\nx[:]")]
    done = fixed(3).act(Scripted(texts), parse_action, sandbox)
    assert done.outcome is not None
    assert done.outcome.value == [1, 2]
    assert sandbox("x, open('f').read()").output == [[1, 2], "kept"]


def test_what_fails_or_does_not_parse_is_out(sandbox: ForkSandbox) -> None:
    texts = ["no code", action("1 / 0"), action("1 / 0"), action("while True: pass"), action("6 * 7")]
    done = fixed(5).act(Scripted(texts), parse_action, sandbox)
    assert done.outcome is not None
    assert done.outcome.value == 42
    kinds = [None if c.failure is None else c.failure.kind for c in done.candidates]
    assert kinds == ["parse", "execution", "execution", "timeout", None]


@pytest.mark.parametrize("kind", ["fork", "local"])
def test_what_was_mended_in_a_loser_is_in_the_record(kind: str) -> None:
    session = open_sandbox(kind)
    loser = "Thought: go.\n```python\n41"  # its fence is closed for it
    texts = [loser, action("42"), action("42") + "\nThat is all."]
    done = fixed(3).act(Scripted(texts), parse_action, session)
    session.cleanup()
    assert [candidate.chosen for candidate in done.candidates] == [False, True, False]
    assert [candidate.repairs for candidate in done.candidates] == [("closed_fence",), (), ("dropped_tail",)]
    old = done.candidates[0].model_dump(mode="json", exclude={"repairs"})
    assert Candidate.model_validate(old).repairs == ()


@pytest.mark.parametrize(("policy", "value"), [("first", "ZeroDivisionError"), ("likeliest", "NameError")])
def test_when_all_fail_the_policy_decides_whose_failure_counts(
    sandbox: ForkSandbox, policy: Any, value: str
) -> None:
    sandbox("x = 1")
    draw = Scripted([action("x = 2\n1 / 0"), action("x = 3\nundefined")], [-1.0, -0.1])
    done = fixed(2, if_all_fail=policy).act(draw, parse_action, sandbox)
    assert done.outcome is not None
    assert value in str(done.outcome.error)
    assert sandbox("x").output == (2 if policy == "first" else 3)  # what it did before it failed holds


def test_a_step_without_any_code_leaves_the_session_alone(sandbox: ForkSandbox) -> None:
    sandbox("x = 1")
    done = fixed(2).act(Scripted(["nothing", "here"]), parse_action, sandbox)
    assert done.outcome is None
    assert done.parsed.code is None
    assert sandbox("x").output == 1


def test_ties_go_to_the_higher_log_probability(sandbox: ForkSandbox) -> None:
    draw = Scripted([action("1"), action("2")], [-0.9, -0.2])
    done = fixed(2).act(draw, parse_action, sandbox)
    assert done.outcome is not None
    assert done.outcome.value == 2


def test_two_that_agree_settle_it_and_more_are_drawn_when_they_differ(sandbox: ForkSandbox) -> None:
    draw = Scripted([action("5"), action("2 + 3"), action("9")])
    done = SelfConsistentSampler().act(draw, parse_action, sandbox)
    assert (draw.asked, len(done.candidates)) == ([1, 1], 2)
    draw = Scripted([action(str(n)) for n in (1, 2, 2, 2, 7, 7, 7, 7)])
    done = SelfConsistentSampler().act(draw, parse_action, sandbox)
    assert draw.asked == [1, 1, 3, 1, 1, 1]  # always as many as would settle it; 3 to 1 does not: 0.81
    assert done.outcome is not None
    assert done.outcome.value == 7
    assert done.usage == Usage(input_tokens=42, output_tokens=80)


def test_it_stops_when_the_lead_cannot_be_overtaken(sandbox: ForkSandbox) -> None:
    config = SamplerConfig(n=6, confidence=0.999)
    draw = Scripted([action("1")] * 6)
    SelfConsistentSampler(config).act(draw, parse_action, sandbox)
    assert draw.asked == [1, 3]  # four of six


def test_a_token_budget_ends_the_drawing(sandbox: ForkSandbox) -> None:
    draw = Scripted([action(str(n)) for n in range(8)])
    SelfConsistentSampler(SamplerConfig(token_budget=35)).act(draw, parse_action, sandbox)
    assert draw.asked == [1, 1, 3]


@pytest.mark.parametrize(
    ("logprobs", "likely", "asked"),
    [
        ([-0.1, -9.0], 0.5, [1]),  # 0.9 of all that could be drawn
        ([-1.0, -0.1], 0.5, [1, 1]),
        ([-0.1, -9.0], 0.95, [1, 1]),
        ([-0.1, -9.0], None, [1, 1]),
    ],
)
def test_an_outcome_that_is_likelier_than_all_others_needs_no_second_vote(
    sandbox: ForkSandbox, logprobs: list[float], likely: float | None, asked: list[int]
) -> None:
    draw = Scripted([action("5"), action("2 + 3")], logprobs)
    SelfConsistentSampler(SamplerConfig(likely=likely)).act(draw, parse_action, sandbox)
    assert draw.asked == asked


def test_what_fails_is_out_of_the_probabilities_too(sandbox: ForkSandbox) -> None:
    draw = Scripted([action("1 / 0"), action("5"), action("6")], [-0.4, -1.6, -1.6])  # 0.67, 0.2, 0.2
    done = SelfConsistentSampler().act(draw, parse_action, sandbox)
    assert draw.asked[0] == 1
    assert done.outcome is not None
    assert done.outcome.value == 5
    assert len(done.candidates) == 3  # the two that were asked for together


def test_without_forks_the_code_votes_and_only_the_winner_runs() -> None:
    session = open_sandbox("local")
    ran = []
    session.send_tools({"look": lambda text: ran.append(text) or "seen", "final_answer": None})
    texts = [action("look('a')"), action("look( 'b' )  # layout"), action("look('b')")]
    done = fixed(3).act(Scripted(texts), parse_action, session)
    session.cleanup()
    assert ran == ["b"]
    assert done.outcome is not None
    assert done.outcome.value == "seen"
    assert [candidate.votes for candidate in done.candidates] == [1, 2, 2]


def test_an_error_of_the_model_leaves_the_session_as_it_was(sandbox: ForkSandbox) -> None:
    sandbox("x = 1")
    calls = []

    def draw(count: int, first: int, config: SamplerConfig) -> tuple[list[Draft], Usage]:
        calls.append(count)
        if len(calls) > 1:
            raise ConnectionError
        return [Draft(action("x = 2\nx")), Draft(action("x = 3\nx"))], Usage()

    with pytest.raises(ConnectionError):
        SelfConsistentSampler().act(draw, parse_action, sandbox)
    assert sandbox("x").output == 1


@pytest.mark.parametrize("seed", range(12))
def test_random_candidates_elect_a_largest_group_and_count_every_vote(
    sandbox: ForkSandbox, seed: int
) -> None:
    dice = random.Random(seed)
    sandbox("x = 0")
    values = [dice.choice([1, 2, 3, None]) for _ in range(dice.randint(1, 8))]
    texts = ["no code" if value is None else action(f"x += {value}\nx") for value in values]
    done = fixed(len(values)).act(Scripted(texts), parse_action, sandbox)
    counts = {value: values.count(value) for value in values if value is not None}
    if counts:
        chosen = sandbox("x").output
        assert counts[chosen] == max(counts.values())
        assert sum(c.chosen for c in done.candidates) == 1
    else:
        assert sandbox("x").output == 0
    assert [c.votes for c in done.candidates] == [counts.get(value, 0) for value in values]


@pytest.mark.parametrize("seed", range(10))
def test_after_any_candidates_the_session_is_as_if_the_winner_alone_had_run(seed: int) -> None:
    dice = random.Random(seed)
    pieces = [
        "x = x + 1",
        "del x",
        "x = len(look('a'))",
        "look('b')\n1 / 0",
        "open('f', 'w').write('mine')",
        "import os\nos.remove('f')",
        "final_answer(7)",
        "print(x)\nx = 9",
    ]
    codes = ["\n".join(dice.sample(pieces, dice.randint(1, 3))) for _ in range(dice.randint(2, 8))]
    texts = [*map(action, codes), "no code"]
    dice.shuffle(texts)
    sampler = SelfConsistentSampler(
        SamplerConfig(n=len(texts), confidence=dice.choice([None, 0.85, 0.99]), batch=dice.randint(1, 3))
    )

    def state(act: bool, codes: Sequence[str]) -> tuple[Any, list[str]]:
        session, asked = ForkSandbox(imports=["os"], timeout=2.0), list[str]()
        session.send_tools({"look": lambda text: asked.append(text) or "seen", "final_answer": None})
        session("x = 1\nopen('f', 'w').write('kept')")
        chosen = sampler.act(Scripted(codes), parse_action, session) if act else None
        if chosen is None:
            run_action(session, codes[0])
        seen = session(
            "import os\n(globals().get('x', 'gone'), open('f').read() if os.path.exists('f') else 'gone')"
        )
        session.close()
        return (seen.output, chosen), asked

    (after, done), asked = state(True, texts)
    assert len(asked) == len(set(asked))  # no call was made twice
    won = [candidate for candidate in done.candidates if candidate.chosen]
    assert len(won) == 1
    votes = {candidate.votes for candidate in done.candidates if candidate.failure is None}
    assert won[0].failure is not None or won[0].votes == max(votes)
    (alone, _), _ = state(False, [won[0].code or ""])
    assert after == alone


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Outcome(value=1), Outcome(value=1.0000000001), True),
        (Outcome(value=1), Outcome(value=1.01), False),
        (Outcome(value=10**40), Outcome(value=10**40 + 1), False),
        (Outcome(printed="{1, 2}\n"), Outcome(printed="{2, 1}"), True),
        (Outcome(printed="x is 0.30000000000000004"), Outcome(printed="x is  0.3"), True),
        (Outcome(printed="x is 0.3"), Outcome(printed="y is 0.3"), False),
        (Outcome(value="3"), Outcome(value=3), True),
        (Outcome(printed="a 1_ b"), Outcome(printed="a 2_ b"), False),
        (Outcome(printed="n = " + "1" * 5000), Outcome(printed="n = " + "2" * 5000), False),
        (Outcome(value=True), Outcome(value=1), False),
        (Outcome(value="a  b "), Outcome(value="a b"), True),
        (Outcome(value=float("nan")), Outcome(value=float("nan")), True),
        (Outcome(value=[1, [2, "a"]]), Outcome(value=[1, [2.0, "a"]]), True),
        (Outcome(value="B", is_final=True), Outcome(value="B", is_final=True, printed="noise"), True),
        (Outcome(value="B", is_final=True), Outcome(value="B"), False),
    ],
)
def test_outcomes_that_are_one(one: Outcome, other: Outcome, same: bool) -> None:
    assert same_outcome(one, other) is same
    assert same_outcome(other, one) is same


def test_the_beta_criterion() -> None:
    assert lead_probability(2, 0) == 0.875
    assert lead_probability(1, 1) == 0.5
    assert lead_probability(3, 1) == pytest.approx(0.8125)
    tally = Tally()
    for candidate in range(3):
        tally.add(candidate, Outcome(value=1), None)
    assert tally.settled(2, None)
    assert not tally.settled(3, None)


@pytest.mark.parametrize(
    ("text", "code", "repairs"),
    [
        ("Thought: a\n```python\nx\n```", "x", ()),
        ("Thought: a\n```python\nx", "x", ("closed_fence",)),
        ("a\n```py\nx\n```\nand then\n```python\ny\n```", "x", ("dropped_tail",)),
        ("a\n<code>\nprint(1)\n</code>", "print(1)", ("code_tag",)),
        ("a\n<code>print(1)", "print(1)", ("code_tag",)),
        ("a\n~~~python\nprint(1)\n~~~\nbye", "print(1)", ("other_fence", "dropped_tail")),
        ("a\n```tool_code\nprint(1)\n```", "print(1)", ("other_fence",)),
        ("Thought: I add.\nCode:\nx = 1\nprint(x)", "x = 1\nprint(x)", ("bare_code",)),
        ("Thought: 42", None, ()),
        ("The answer is simple", None, ()),
        ("```json\n{not python\n```", None, ()),
    ],
)
def test_the_repair_ladder(text: str, code: str | None, repairs: tuple[str, ...]) -> None:
    parsed = parse_action(text)
    assert (parsed.code, parsed.repairs) == (code, repairs)
    if code is not None:
        again = parse_action(parsed.output)
        assert (again.code, again.repairs) == (code, ())  # what the model sees later needs no repair


TASK = Task(id="1", question="six times seven?", answer="42")


def endpoint_agent(url: str, config: SamplerConfig, **options: Any) -> StepAgent:
    model = openai_model("fake", url, retries=0, temperature=0.0, **options)
    return build_agent(model, sampler=SelfConsistentSampler(config))


def test_one_request_asks_for_all_candidates_and_its_settings_win() -> None:
    with FakeEndpoint(lambda messages: action("final_answer(6 * 7)")) as endpoint:
        agent = endpoint_agent(endpoint.url, SamplerConfig(n=4, confidence=None, seed=5))
        record = rollout(agent, TASK)
    (sent,) = endpoint.requests
    assert (sent["n"], sent["temperature"], sent["top_p"]) == (4, 0.4, 0.8)
    assert isinstance(sent["seed"], int)
    assert (record.answer, record.correct) == ("42", True)
    (step,) = record.steps
    assert [candidate.votes for candidate in step.candidates] == [4] * 4
    assert step.usage.output_tokens == 4 * len(action("final_answer(6 * 7)").split())
    assert Trajectory.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("fault", ["ignores n", "refuses n"])
def test_a_server_without_n_is_asked_several_times(fault: str) -> None:
    def reply(messages: list[dict[str, Any]]) -> Any:
        if fault == "refuses n" and "n" in endpoint.requests[-1]:
            return 400, b'{"error": {"message": "n is not supported"}}'
        endpoint.requests[-1].pop("n", None)
        return action("final_answer(42)")

    with FakeEndpoint(reply) as endpoint:
        agent = endpoint_agent(endpoint.url, SamplerConfig(n=3, confidence=None))
        record = rollout(agent, TASK)
        assert len(record.steps[0].candidates) == 3
        asked = len(endpoint.requests)
        rollout(agent, TASK)
    assert asked == (3 if fault == "ignores n" else 5)  # without log-probabilities first, then without n
    assert len(endpoint.requests) == asked + 3  # it is not asked for several a second time


def test_a_failing_endpoint_is_no_mistake_of_the_model() -> None:
    with FakeEndpoint(lambda messages: (500, b"{}")) as endpoint:
        record = rollout(endpoint_agent(endpoint.url, SamplerConfig()), TASK)
    assert record.stop_reason == StopReason.PROVIDER_ERROR
    assert record.steps == ()


def test_steps_go_on_from_the_chosen_state_and_failures_are_shown() -> None:
    replies = iter(
        [action("x = 41\nprint(x)")] * 2
        + ["nothing"] * 8
        + [action("1 / 0")] * 8
        + [action("final_answer(x + 1)")] * 2
    )

    class Model(ScriptedModel):
        one_at_a_time = True

        def generate(self, messages: list[Any], **options: Any) -> Any:
            self.outputs = [next(replies)]
            return super().generate(messages, **options)

    agent = build_agent(Model([]), sampler=SelfConsistentSampler(SamplerConfig()))
    record = rollout(agent, TASK)
    assert [step.failure.kind if step.failure else None for step in record.steps] == [
        None,
        "parse",
        "execution",
        None,
    ]
    assert [len(step.candidates) for step in record.steps] == [2, 8, 8, 2]
    assert record.answer == "42"
    assert record.steps[1].observation is not None


class Losing(ForkSandbox):
    """Loses its session when it is asked to try for the second time."""

    tries = 0

    def try_each(self, *args: Any, **options: Any) -> list[Outcome]:
        self.tries += 1
        if self.tries == 2:
            self.close()
            raise CodeFailure("The session is lost.")
        return super().try_each(*args, **options)


def test_a_session_that_is_lost_amid_the_vote_takes_all_candidates_with_it() -> None:
    session = Losing(timeout=2.0)
    draw = Scripted(["no code", *(action(str(n)) for n in range(1, 8))])
    done = SelfConsistentSampler(SamplerConfig(n=8)).act(draw, parse_action, session)
    assert done.outcome is not None
    assert done.outcome.error == "The session is lost."
    assert {candidate.votes for candidate in done.candidates} == {0}
    assert [candidate.chosen for candidate in done.candidates].index(True) == 1
    assert all(candidate.failure is not None for candidate in done.candidates)
    assert session("6 * 7").output == 42  # a new one
    session.close()


def test_calls_of_a_chosen_action_that_was_stopped_stand_in_the_record() -> None:
    @tool  # type: ignore[untyped-decorator]
    def look(text: str) -> str:
        """Look.

        Args:
            text: what for.
        """
        return "seen"

    text = action("look('a')\nwhile True: pass")
    for sampler in (None, fixed(2)):
        agent = build_agent(ScriptedModel([text] * 2), [look], sampler=sampler, max_steps=1, action_timeout=1)
        (step,) = rollout(agent, TASK).steps
        assert step.failure is not None
        assert [use.name for use in step.tool_uses] == ["look"], sampler


def test_a_certain_failure_is_the_likeliest_one(sandbox: ForkSandbox) -> None:
    draw = Scripted([action("1 / 0"), action("undefined")], [-1.0, 0.0])
    done = fixed(2, if_all_fail="likeliest").act(draw, parse_action, sandbox)
    assert done.outcome is not None
    assert "NameError" in str(done.outcome.error)


@pytest.mark.parametrize("wrong", [None, 12.5, float("nan"), "?"])
def test_what_is_no_log_probability_is_none(wrong: Any) -> None:
    token = SimpleNamespace(logprob=wrong)
    good = SimpleNamespace(logprob=-0.1)
    said = SimpleNamespace(content=[good, token])
    choice = SimpleNamespace(
        logprobs=said, finish_reason="stop", token_ids=None, message=SimpleNamespace(content="")
    )
    answer = ChatMessage(role="assistant", content=action("1"), raw=SimpleNamespace(choices=[choice]))

    class Model(ScriptedModel):
        def generate(self, messages: list[Any], **options: Any) -> Any:
            return answer

    draft = StepDraw(Model([]), [], {}, 1).one()
    assert draft.logprobs is None
    assert draft.probability == 0.0
