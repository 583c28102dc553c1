"""A rollout that is cut off anywhere goes on there; what its log has is never asked again."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from smolagents import Tool
from smolagents.models import ChatMessage, MessageRole
from smolagents.monitoring import TokenUsage

from agentkd import build_agent
from agentkd.agent_config import AgentConfig
from agentkd.calls import Call, Past, iter_calls, read_past
from agentkd.collect import CollectConfig, collect, replay
from agentkd.errors import DataError, RetrievalError, SandboxError
from agentkd.model import openai_model
from agentkd.record import AppendLog, read_trajectories, write_jsonl
from agentkd.recorder import Diverged, NotRecorded, Recorder
from agentkd.rollout import rollout
from agentkd.sampler import SamplerConfig, SelfConsistentSampler
from agentkd.sandbox import CodeFailure, Outcome, open_sandbox
from agentkd.sandbox.fork import ForkSandbox
from agentkd.secret import REDACTED, Redactor
from agentkd.task import Task
from agentkd.testing import FakeEndpoint, ScriptedModel
from agentkd.trajectory import StopReason, Trajectory
from tests.conftest import action
from tests.e2e.test_collect_killed import plain

TASK = Task(id="1", question="what is it?", answer="42")


class Counter(Tool):
    """Says another number each time, and refuses the third."""

    name = "count"
    description = "Counts."
    inputs: dict[str, Any] = {"what": {"type": "string", "description": "What to count."}}
    output_type = "integer"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, what: str) -> int:
        self.calls += 1
        if what == "nothing":
            raise ValueError("cannot count nothing")
        return 20 + self.calls


class Log:
    """A call log in memory, as it would be read back from the file."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call, wait: bool) -> None:
        self.calls.append(Call.model_validate_json(call.model_dump_json()))

    def past(self, count: int | None = None) -> Past:
        return read_past(self.calls[:count]).get("1#0", Past())


OUTPUTS = [
    action("count twice", "a = count('apples')\nb = count('pears')\nprint(a, b)"),
    "I forgot the code.",
    action("a mistake", "count('nothing')"),
    action("done", "final_answer(a + b - 1)"),
]


def run(
    outputs: Sequence[str], log: Callable[[Call, bool], None], past: Past | None = None, **options: Any
) -> tuple[Trajectory, ScriptedModel, Counter]:
    tool, model = Counter(), ScriptedModel(outputs)
    agent = build_agent(model, [tool], sandbox="local", max_steps=6)
    try:
        return rollout(agent, TASK, recorder=Recorder("1#0", log, past or Past(), **options)), model, tool
    finally:
        agent.cleanup()


def test_it_goes_on_wherever_it_was_cut_off() -> None:
    log = Log()
    whole, _, _ = run(OUTPUTS, log)
    assert whole.correct
    kinds = [call.kind for call in log.calls]
    assert kinds == [
        "begin",
        "model",
        "tool",
        "tool",
        "code",
        "model",
        "model",
        "tool",
        "code",
        "model",
        "code",
    ]
    for count in range(len(log.calls)):
        asked = kinds[:count].count("model")
        rest = Log()
        again, model, tool = run(OUTPUTS[asked:], rest, log.past(count))
        assert len(model.seen) == 4 - asked
        assert tool.calls == 3 - kinds[:count].count("tool")
        if tool.calls in (0, 1, 3):  # else the counter itself counts from another number
            assert plain(again) == plain(whole)
        written = [call.kind for call in rest.calls]
        assert written == ["begin", *kinds[max(count, 1) :]]


@pytest.mark.parametrize(("refused", "refusals"), [((), 0), (("n",), 2), (("n", "logprobs"), 3)])
def test_drafts_made_side_by_side_are_found_again_in_their_places(
    refused: tuple[str, ...], refusals: int
) -> None:
    """Whichever of them was logged first: the log knows them by their numbers."""

    def reply(messages: list[dict[str, Any]]) -> Any:
        if any(name in endpoint.requests[-1] for name in refused):  # only ever sent alone
            return 400, b'{"error": {"message": "unknown field"}}'
        numbers.append(len(numbers))
        return action("go", f"final_answer({len(numbers) % 3})")

    def draw(past: Past) -> tuple[Trajectory, int]:
        model = openai_model("fake", endpoint.url, retries=0)
        config = SamplerConfig(n=5, confidence=None)  # without a seed all requests are the same
        agent = build_agent(model, sandbox="local", sampler=SelfConsistentSampler(config))
        before = len(endpoint.requests)
        record = rollout(agent, TASK, recorder=Recorder("1#0", log, past))
        agent.cleanup()
        return record, len(endpoint.requests) - before

    numbers, log = list[int](), Log()
    with FakeEndpoint(reply) as endpoint:
        whole, asked = draw(Past())
        again, asked_again = draw(log.past())
    assert len(whole.steps[0].candidates) == 5
    assert [c.raw for c in again.steps[0].candidates] == [c.raw for c in whole.steps[0].candidates]
    assert asked_again == refusals  # they are not in the log
    assert asked > asked_again


class Measure(Counter):
    """Says the same of the same, whoever asks first."""

    def forward(self, what: str) -> int:
        super().forward(what)
        return len(what)


class Three(ScriptedModel):
    """Says three things at a time."""

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        texts = [super(Three, self).generate(messages).content for _ in range(3)]
        choices = [SimpleNamespace(message=SimpleNamespace(content=text)) for text in texts]
        usage = TokenUsage(input_tokens=10, output_tokens=15)
        return ChatMessage(
            role=MessageRole.ASSISTANT,
            content=texts[0],
            raw=SimpleNamespace(choices=choices),
            token_usage=usage,
        )


CANDIDATES = [
    action("count both", "a = count('apples')\nb = count('pears')\nprint(sorted([a, b]))"),
    action("the other way", "b = count('pears')\na = count('apples')\nprint(sorted([a, b]))"),
    action("a mistake", "count('nothing')"),
    action("done", "final_answer(a + b + 31)"),
    action("done as well", "final_answer(31 + b + a)"),
    action("no", "final_answer(0)"),
]


@pytest.mark.parametrize("sandbox", ["fork", "local"])
def test_sampled_actions_go_on_wherever_they_were_cut_off_and_are_replayed(sandbox: str) -> None:
    if sandbox == "fork":
        try:
            open_sandbox("fork").cleanup()
        except SandboxError as exc:
            pytest.skip(exc.message)
    log = Log()

    def draw(
        past: Past, written: Log, outputs: Sequence[str], where: str = sandbox, **options: Any
    ) -> tuple[Trajectory, int]:
        sampler = SelfConsistentSampler(SamplerConfig(n=3, confidence=None))
        tool = Measure()
        agent = build_agent(Three(outputs), [tool], sandbox=where, sampler=sampler)
        try:
            recorder = Recorder("1#0", written, past, **options)
            return rollout(agent, TASK, recorder=recorder), tool.calls
        finally:
            agent.cleanup()

    whole, used = draw(Past(), log, CANDIDATES)
    assert whole.correct
    assert len(whole.steps[0].tool_uses) == 2
    assert len(whole.steps[0].candidates) == 3
    kinds = [call.kind for call in log.calls]
    assert kinds.count("try") == (6 if sandbox == "fork" else 0)
    for count in range(len(log.calls)):
        rest = Log()
        asked = kinds[:count].count("model")
        again, used_again = draw(log.past(count), rest, CANDIDATES[3 * asked :])
        assert used_again == used - kinds[:count].count("tool")
        assert plain(again) == plain(whole)
        keys = collections.Counter(
            call.key for call in (*log.calls[:count], *rest.calls) if call.kind != "begin"
        )
        assert set(keys.values()) <= {1}, "a finished call stands in the log twice"
    replayed, used = draw(log.past(), Log(), [], "local", replay=True)
    assert plain(replayed) == plain(whole)
    assert used == 0
    with pytest.raises(NotRecorded):
        draw(log.past(len(log.calls) - 1), Log(), [], "local", replay=True)


class Losing(ForkSandbox):
    """Loses its session when it is asked to try anything."""

    def try_each(self, *args: Any, **options: Any) -> list[Outcome]:
        self.close()
        raise CodeFailure("The session is lost.")


@pytest.mark.parametrize(
    ("sandbox", "said", "uses"), [(ForkSandbox, "took longer", 1), (Losing, "The session is lost.", 0)]
)
def test_candidates_that_end_badly_are_replayed_as_such(
    sandbox: type[ForkSandbox], said: str, uses: int
) -> None:
    try:
        open_sandbox("fork").cleanup()
    except SandboxError as exc:
        pytest.skip(exc.message)
    log, bad = Log(), action("go", "count('apples')\nwhile True: pass")

    def draw(past: Past, where: Any, **options: Any) -> Trajectory:
        sampler = SelfConsistentSampler(SamplerConfig(n=3, confidence=None))
        agent = build_agent(Three([bad] * 3), [Measure()], sandbox=where, sampler=sampler, max_steps=1)
        try:
            return rollout(agent, TASK, recorder=Recorder("1#0", log, past, **options))
        finally:
            agent.cleanup()

    whole = draw(Past(), sandbox(timeout=0.5))
    assert whole.stop_reason == StopReason.MAX_STEPS
    assert said in str(whole.steps[0].observation)
    assert len(whole.steps[0].tool_uses) == uses
    assert plain(draw(log.past(), "local", replay=True)) == plain(whole)


def test_a_replay_asks_nothing_and_runs_nothing() -> None:
    log = Log()
    whole, _, _ = run(OUTPUTS, log)
    again, model, tool = run([], log, log.past(), replay=True)
    assert plain(again) == plain(whole)
    assert not model.seen
    assert tool.calls == 0
    with pytest.raises(NotRecorded):
        run([], log, log.past(6), replay=True)


def test_code_that_does_something_else_the_second_time_is_noticed() -> None:
    log = Log()
    outputs = [action("luck", "import random\nprint(random.random())"), action("done", "final_answer(1)")]
    run(outputs, log)
    with pytest.raises(Diverged, match="step 1"):
        run(outputs, Log(), log.past(3))


def test_another_tool_call_than_before_is_noticed() -> None:
    log = Log()
    outputs = [action("luck", "import random\nprint(count(str(random.random())))")]
    run([*outputs, action("done", "final_answer(1)")], log)
    with pytest.raises(Diverged, match="tool"):
        run(outputs, Log(), log.past(3))


def test_an_answer_to_another_question_is_not_used() -> None:
    log = Log()
    run(OUTPUTS, log)
    other = ScriptedModel(OUTPUTS, model_id="another teacher")
    agent = build_agent(other, [Counter()], sandbox="local")
    with pytest.raises(Diverged, match="model"):
        rollout(agent, TASK, recorder=Recorder("1#0", Log(), log.past()))
    agent.cleanup()


def test_a_restart_voids_what_was_before_in_whatever_order_it_is_read() -> None:
    log = Log()
    run(OUTPUTS, log)
    before = len(log.calls)
    past = Recorder("1#0", log, log.past()).begin_anew("for a reason")
    assert past == Past(1, "for a reason", ())
    run(OUTPUTS, log, past)
    after = [*log.calls[before:], *log.calls[:before]]
    assert read_past(after) == read_past(log.calls)
    assert len(read_past(after)["1#0"].calls) == before
    again, _, _ = run([], log, log.past(), replay=True)
    assert again.correct


def test_a_tool_whose_world_fails_is_not_finished() -> None:
    class Broken(Counter):
        def forward(self, what: str) -> int:
            raise RetrievalError("the index is gone")

    log = Log()
    agent = build_agent(ScriptedModel(OUTPUTS), [Broken()], sandbox="local")
    record = rollout(agent, TASK, recorder=Recorder("1#0", log))
    agent.cleanup()
    assert record.stop_reason == StopReason.RETRIEVAL_ERROR
    assert [call.kind for call in log.calls] == ["begin", "model"]


@pytest.mark.parametrize(
    "value",
    [
        "10**40",
        "float('inf')",
        "float('nan')",
        "None",
        "[1, (2, 3), {'a': None}]",
        "chr(0xD800)",
        "2.5",
        "True",
    ],
)
def test_every_value_survives_the_log(value: str) -> None:
    log = Log()
    outputs = [action("value", f"final_answer({value})")]
    whole, _, _ = run(outputs, log)
    again, _, _ = run([], log, log.past(), replay=True)
    assert plain(again) == plain(whole)
    resumed, _, _ = run([], Log(), log.past())
    assert plain(resumed) == plain(whole)
    json.dumps(whole.answer)
    assert math.isfinite(whole.seconds)


KEY = "sk-" + "a1b2c3d4" * 4


def test_secrets_are_in_no_record() -> None:
    class Leak(Counter):
        def forward(self, what: str) -> Any:
            if what == "error":
                raise ValueError(f"bad key {KEY}")
            return {"key": KEY, "mine": "hunter2-hunter2"}

    log = Log()
    outputs = [
        action(f"the key is {KEY}", "r = count('x')\nprint(r)\nprint('sk-' + 'z' * 40)"),
        action("an error", "count('error')"),
        action("done", "final_answer(r['mine'])"),
    ]
    agent = build_agent(ScriptedModel(outputs), [Leak()], sandbox="local")
    redactor = Redactor(["hunter2-hunter2"], environment={"MY_API_KEY": "value-of-the-environment"})
    record = rollout(agent, TASK, recorder=Recorder("1#0", log, redactor=redactor))
    agent.cleanup()
    written = record.model_dump_json() + "".join(call.model_dump_json() for call in log.calls)
    assert KEY not in written
    assert "hunter2" not in written
    assert "zzzz" not in written
    assert record.answer == REDACTED
    assert redactor.text("say value-of-the-environment") == f"say {REDACTED}"
    again, _, _ = run([], log, log.past(), replay=True)
    assert plain(again)["steps"] == plain(record)["steps"]


@pytest.mark.parametrize(
    "text", ["task-force and risk-averse", "sk-learn is a library", "x" * 500, "hf_model"]
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert Redactor(["short"], environment={"TOKEN": "abc"}).text(text) == text


def teacher(messages: list[dict[str, Any]]) -> Any:
    if len(messages) == 1:
        return "ok"
    number, turn = messages[1]["content"].split()[-1], len(messages) // 2
    if number == "1":
        return action("for ever", "print('x')")
    if number == "2" and turn == 2:
        return 400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}'
    if number == "3" and turn == 1:
        return action("slow", "while True: pass")
    if number == "4":
        return action("random", f"import random\nprint(random.random())\nif {turn} > 1: final_answer(1)")
    return (
        action("work", f"x = {number}\nprint(x)")
        if turn == 1
        else action("done", f"final_answer({number} + 1)")
    )


def run_folder(folder: Path, url: str, count: int = 6, **agent: Any) -> CollectConfig:
    rows = [Task(id=str(i), question=f"add {i}", answer=str(i + 1), split="train") for i in range(count)]
    write_jsonl(folder / "tasks.jsonl", rows)
    settings = {"model": "fake", "api_base": url, "sandbox": "local", "action_seconds": 0.5, **agent}
    return CollectConfig(tasks=str(folder / "tasks.jsonl"), agent=AgentConfig(**settings), workers=3)


def test_a_whole_run_is_rebuilt_from_its_log(tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        done = collect(run_folder(tmp_path, endpoint.url, max_steps=3), tmp_path / "run")
    assert {item.stop_reason.value for item in done.trajectories} == {
        "final_answer",
        "max_steps",
        "context_overflow",
    }
    found = replay(tmp_path / "run", tmp_path / "again")
    assert found.unfinished == 0
    assert [plain(item) for item in found.trajectories] == [plain(item) for item in done.trajectories]
    assert read_trajectories(tmp_path / "again" / "trajectories.jsonl") == found.trajectories


def test_a_rollout_that_ran_out_of_time_is_replayed_as_that(tmp_path: Path) -> None:
    import time

    def slow(messages: list[dict[str, Any]]) -> Any:
        time.sleep(0.15 if len(messages) > 1 else 0)
        return teacher(messages)

    with FakeEndpoint(slow) as endpoint:
        config = run_folder(tmp_path, endpoint.url, count=2, max_seconds=0.3)
        done = collect(config, tmp_path / "run")
    assert done.trajectories[1].stop_reason == StopReason.TIMEOUT
    found = replay(tmp_path / "run", tmp_path / "again")
    assert [plain(item) for item in found.trajectories] == [plain(item) for item in done.trajectories]


def test_a_rollout_that_cannot_be_continued_begins_anew_and_says_so(tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        config = run_folder(tmp_path, endpoint.url, count=5)
        collect(config, tmp_path / "run")
        log = tmp_path / "run" / "trajectories.jsonl"
        log.write_text("".join(line for line in log.read_text().splitlines(True) if '"4#0"' not in line))
        calls = tmp_path / "run" / "calls-0.jsonl"
        lines = calls.read_text().splitlines(True)
        last = max(i for i, line in enumerate(lines) if '"4#0"' in line and '"kind":"model"' in line)
        calls.write_text("".join(lines[:last] + [line for line in lines[last:] if '"4#0"' not in line]))
        done = collect(config, tmp_path / "run")
    (again,) = [item for item in done.trajectories if item.id == "4#0"]
    assert "another outcome" in again.labels["restarted"]
    found = replay(tmp_path / "run", tmp_path / "again")
    assert plain(again) in [plain(item) for item in found.trajectories]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]["restarted"] == 1


def test_a_folder_without_a_log_cannot_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.jsonl"):
        replay(tmp_path, tmp_path / "again")
    write_jsonl(tmp_path / "tasks.jsonl", [TASK])
    with pytest.raises(DataError, match="no call log"):
        replay(tmp_path, tmp_path / "again")


def test_the_log_is_written_by_many_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with AppendLog(tmp_path / "calls-0.jsonl") as log, ThreadPoolExecutor(16) as pool:
        for number in pool.map(str, range(400)):
            pool.submit(log.append, Call(rollout=number, kind="model"))
    assert sorted(int(call.rollout) for call in iter_calls(tmp_path)) == list(range(400))
