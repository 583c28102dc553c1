"""What a run costs, and the limits that it keeps."""

from __future__ import annotations

import json
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkd.agent_config import AgentConfig
from agentkd.cli import app
from agentkd.collect import CollectConfig, collect, expect
from agentkd.errors import ConfigError
from agentkd.record import read_json, write_jsonl
from agentkd.spend import Budget, Ledger, LimitReached, Price, Spent, load_prices, published_price
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import Usage
from tests.conftest import action


def test_cached_tokens_have_their_own_price() -> None:
    usage = Usage(input_tokens=1_000_000, cached_tokens=400_000, output_tokens=100_000)
    assert Price(input=2.0, output=10.0, cached=0.5).of(usage) == pytest.approx(1.2 + 0.2 + 1.0)
    assert Price(input=2.0, output=10.0).of(usage) == pytest.approx(3.0)


def test_estimated_tokens_have_the_dearer_price() -> None:
    usage = Usage(input_tokens=1_000_000, uncounted_calls=1, estimated_tokens=500_000)
    assert Price(input=2.0, output=10.0).of(usage) == pytest.approx(2.0 + 5.0)
    assert Price(input=3.0, output=1.0).of(usage) == pytest.approx(3.0 + 1.5)


def test_the_parts_of_a_budget_are_the_budget() -> None:
    whole = Budget(max_cost=9.0, max_tokens=1000, max_hours=2.0)
    parts = [whole.part(share) for share in (0.25, 0.25, 0.5)]
    assert sum(part.max_cost or 0 for part in parts) == pytest.approx(9.0)
    assert [part.max_tokens for part in parts] == [250, 250, 500]
    assert {part.max_hours for part in parts} == {2.0}, "the time is the same for all"
    assert whole.part(1e-9).max_tokens == 1
    assert Budget().part(0.5) == Budget()


def test_what_others_have_spent_counts_for_the_limits_alone() -> None:
    ledger = Ledger(Budget(max_tokens=100, max_hours=1.0))
    ledger.add("m", Usage(input_tokens=60), 1.0)
    later = ledger.after(ledger.spent())
    assert later.spent() == Spent()
    assert later._until == ledger._until, "the clock goes on"
    later.check()
    later.add("m", Usage(output_tokens=40), 1.0)
    assert later.reached() == "--max-tokens 100"
    assert later.spent().tokens == 40
    assert later.spent().plus(ledger.spent()).tokens == 100


@pytest.mark.skipif(find_spec("genai_prices") is None, reason="needs the extra `prices`")
def test_published_prices_belong_to_an_address() -> None:
    hosted = published_price("gpt-4o", "https://api.openai.com/v1")
    assert hosted is not None
    assert 0 < hosted.input < hosted.output
    assert published_price("gpt-4o", "http://127.0.0.1:8000/v1") is None, "a model of one's own has no price"
    assert published_price("no-such-model", "https://api.openai.com/v1") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [('["m"]\ninput = -1\noutput = 2', "m.input"), ('["m"]\ninput = 1', "m.output"), ("[", "reading"),
     ('["m"]\ninput = 1\noutput = 1\ncolour = 2', "colour")],
)  # fmt: skip
def test_a_wrong_price_table_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_prices(tmp_path / "prices.toml")
    with pytest.raises(ConfigError, match="no price table"):
        load_prices(tmp_path / "nothing.toml")


def test_a_ledger_adds_up_and_refuses() -> None:
    ledger = Ledger(Budget(max_tokens=100), {"m": Price(input=1.0, output=2.0)})
    ledger.add("m", Usage(input_tokens=40, output_tokens=20), 1.5)
    ledger.check()
    ledger.add("other", Usage(uncounted_calls=1, estimated_tokens=40), 0.5)
    spent = ledger.spent()
    assert (spent.calls, spent.tokens, spent.seconds) == (2, 100, 2.0)
    assert spent.cost == pytest.approx(80e-6)
    assert spent.usage.uncounted_calls == 1
    with pytest.raises(LimitReached, match="--max-tokens 100"):
        ledger.check()
    stopped = Ledger()
    stopped.stop()
    with pytest.raises(LimitReached):
        stopped.check()


class Teacher:
    """Three steps a task; counts calls, and those at a time."""

    def __init__(self) -> None:
        self.calls = self.now = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        if len(messages) == 1:
            return "ok"
        with self._lock:
            self.calls += 1
        turn = len(messages) // 2
        return action("go on", f"print({turn})") if turn < 3 else action("done", "final_answer(1)")


def config(folder: Path, url: str, count: int = 40, **changes: Any) -> CollectConfig:
    rows = [Task(id=str(i), question=f"task {i}", answer="1", split="train") for i in range(count)]
    write_jsonl(folder / "tasks.jsonl", rows)
    agent = AgentConfig(model="fake", api_base=url, sandbox="local")
    return CollectConfig(**{"tasks": str(folder / "tasks.jsonl"), "agent": agent, "workers": 4, **changes})


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_limit_is_never_passed_by_more_than_the_calls_in_flight(tmp_path: Path, processes: int) -> None:
    teacher, limit = Teacher(), 3000
    with FakeEndpoint(teacher) as endpoint:
        tight = config(tmp_path, endpoint.url, budget=Budget(max_tokens=limit), processes=processes)
        done = collect(tight, tmp_path / "run")
        largest = max(
            step.usage.input_tokens + step.usage.output_tokens
            for item in done.trajectories
            for step in item.steps
        )
        assert done.stopped == f"--max-tokens {limit}"
        assert 0 < len(done.trajectories) < 40
        assert limit <= done.spent.tokens <= limit + tight.workers * largest
        assert done.missing == 40 - len(done.trajectories)
        assert not (tmp_path / "run" / "errors.jsonl").exists(), "a limit is no error"
        asked = teacher.calls
        again = collect(tight, tmp_path / "run")
        assert teacher.calls == asked, "what was spent before counts"
        assert again.stopped == done.stopped
        raised = config(tmp_path, endpoint.url, budget=Budget(max_tokens=10**6), processes=processes)
        finished = collect(raised, tmp_path / "run")
    assert finished.missing == 0
    assert finished.stopped is None
    assert teacher.calls == 120 == finished.spent.calls, "and nothing was asked twice"


def test_a_limit_of_money(tmp_path: Path) -> None:
    with FakeEndpoint(Teacher()) as endpoint:
        with pytest.raises(ConfigError, match="no price for fake"):
            collect(config(tmp_path, endpoint.url, budget=Budget(max_cost=1.0)), tmp_path / "run")
        prices = {"fake": Price(input=100.0, output=100.0)}
        limited = config(tmp_path, endpoint.url, budget=Budget(max_cost=0.2), prices=prices)
        done = collect(limited, tmp_path / "run")
    assert done.stopped == "--max-cost 0.2"
    assert 0.2 <= done.spent.cost < 0.2 + 4 * 1000 * 100e-6
    counts = read_json(tmp_path / "run" / "manifest.json")["counts"]
    assert counts["cost"] == pytest.approx(done.spent.cost, abs=1e-6)
    assert counts["stopped"] == "--max-cost 0.2"


def test_a_limit_of_time(tmp_path: Path) -> None:
    with FakeEndpoint(Teacher()) as endpoint:
        limited = config(tmp_path, endpoint.url, 2000, budget=Budget(max_hours=1.0 / 3600))
        done = collect(limited, tmp_path / "run")
    assert done.stopped is not None
    assert done.stopped.startswith("--max-hours")
    assert done.missing > 0


def test_a_server_that_does_not_count_is_estimated_and_said_so(tmp_path: Path) -> None:
    with FakeEndpoint(Teacher(), usage=False) as endpoint:
        done = collect(config(tmp_path, endpoint.url, 3), tmp_path / "run")
        assert done.spent.usage.uncounted_calls == 9
        assert done.spent.usage.input_tokens == 0
        assert done.spent.usage.estimated_tokens > 9 * 100
        limited = config(tmp_path, endpoint.url, 30, budget=Budget(max_tokens=5000))
        assert collect(limited, tmp_path / "other").stopped == "--max-tokens 5000"
    assert all(item.usage.uncounted_calls == 3 for item in done.trajectories)


def test_a_limit_of_money_holds_where_the_server_does_not_count(tmp_path: Path) -> None:
    prices = {"fake": Price(input=10.0, output=100.0)}
    with FakeEndpoint(Teacher(), usage=False) as endpoint:
        limited = config(tmp_path, endpoint.url, budget=Budget(max_cost=0.5), prices=prices)
        done = collect(limited, tmp_path / "run")
        assert done.stopped == "--max-cost 0.5"
        assert done.spent.cost == pytest.approx(done.spent.usage.estimated_tokens * 100e-6)
        assert 0.5 <= done.spent.cost < 0.5 + 4 * 1000 * 100e-6
        again = collect(limited, tmp_path / "run")
    assert again.spent.usage == done.spent.usage
    assert again.spent.cost == pytest.approx(done.spent.cost)


class Mute:
    """Answers nothing at every second call, and wants to be paid for it."""

    def __init__(self, answer: dict[str, Any], each: int = 2) -> None:
        self.answer, self.each = answer, each
        self.calls = self.empty = 0
        self._teacher = Teacher()
        self._lock = threading.Lock()

    def __call__(self, messages: list[dict[str, Any]]) -> Any:
        if len(messages) == 1:
            return "ok"
        with self._lock:
            self.calls += 1
            if self.calls % self.each == 0:
                self.empty += 1
                return 200, json.dumps(self.answer).encode()
        return self._teacher(messages)


EMPTY = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "fake",
    "choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": None}}],
    "usage": {
        "prompt_tokens": 50,
        "completion_tokens": 900,
        "total_tokens": 950,
        "prompt_tokens_details": {"cached_tokens": 20},
    },
}


@pytest.mark.parametrize("answer", [EMPTY, {**EMPTY, "choices": []}])
def test_an_answer_of_no_use_is_in_the_bill(answer: dict[str, Any], tmp_path: Path) -> None:
    mute = Mute(answer)
    prices = {"fake": Price(input=1.0, output=10.0, cached=0.5)}
    with FakeEndpoint(mute) as endpoint:
        settings = config(tmp_path, endpoint.url, 5, prices=prices)
        done = collect(settings, tmp_path / "run")
        again = collect(settings, tmp_path / "run")
    assert mute.empty >= 14
    kept = sum((item.usage for item in done.trajectories), Usage())
    assert done.spent.calls == 15, "it is no call that is finished"
    assert done.spent.usage.output_tokens == kept.output_tokens + 900 * mute.empty
    assert done.spent.usage.cached_tokens == 20 * mute.empty
    assert done.spent.cost == pytest.approx(prices["fake"].of(done.spent.usage))
    assert done.faults == {"garbage": mute.empty}
    assert again.spent.usage == done.spent.usage, "the bill is the same at the next start"
    assert again.spent.cost == pytest.approx(done.spent.cost)


def test_answers_of_no_use_use_up_a_limit(tmp_path: Path) -> None:
    mute = Mute(EMPTY, each=1)
    with FakeEndpoint(mute) as endpoint:
        limited = config(tmp_path, endpoint.url, 40, budget=Budget(max_tokens=5000))
        done = collect(limited, tmp_path / "run")
    assert done.stopped == "--max-tokens 5000"
    assert 5000 <= done.spent.tokens == 950 * mute.empty <= 5000 + 950 * limited.workers


@pytest.mark.parametrize("option", ["--max-cost", "--max-hours", "--max-tokens"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_limit_of_nothing_is_refused(option: str, value: str, tmp_path: Path) -> None:
    command = ["collect", "--tasks", "gym:lcm", "--teacher", "expert", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, option, value])
    assert done.exit_code == 2
    assert "leaves nothing to spend" in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_an_estimate_before_the_start_and_a_better_one_later(tmp_path: Path) -> None:
    with FakeEndpoint(Teacher()) as endpoint:
        prices = {"fake": Price(input=1.0, output=1.0)}
        before = expect(config(tmp_path, endpoint.url, 10, prices=prices), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert (before.rollouts, before.calls) == (10, 30)
        assert before.cost is not None
        assert before.cost > 0
        assert "assumed" in before.text()
        part = config(tmp_path, endpoint.url, 10, prices=prices, budget=Budget(max_tokens=4000))
        done = collect(part, tmp_path / "run")
        later = expect(config(tmp_path, endpoint.url, 10, prices=prices), tmp_path / "run")
    assert 0 < later.rollouts < 10
    assert "measured" in later.basis
    each = sum(item.usage.input_tokens for item in done.trajectories) / len(done.trajectories)
    assert later.input_tokens == round(later.rollouts * each)
