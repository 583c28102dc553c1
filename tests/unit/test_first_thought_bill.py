"""The pass of chains of thought: its bill, its limits, its faults and its secrets are those of the run."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from agentkd.collect import CollectConfig, collect, expect
from agentkd.errors import ConfigError
from agentkd.first_thought_report import WITHOUT, compare_first_thoughts, expect_comparison
from agentkd.gate import GateConfig
from agentkd.prompt import FIRST_THOUGHT
from agentkd.record import read_json, read_trajectories
from agentkd.spend import Budget, Price
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import Usage
from tests.unit.test_first_thought import Teacher, config, tasks

__all__ = ["tasks"]  # the fixture

PRICES = {"fake": Price(input=100.0, output=100.0)}


def thoughts_of(out: Path) -> Usage:
    return sum(
        (item.usage for item in read_trajectories(out / "first-thought" / "trajectories.jsonl")), Usage()
    )


def counts(out: Path) -> dict[str, Any]:
    found = read_json(out / "manifest.json")["counts"]
    assert isinstance(found, dict)
    return {name: found[name] for name in ("calls", "input_tokens", "output_tokens", "cost", "faults")}


def asked(endpoint: FakeEndpoint, thinking: bool) -> int:
    """Requests of the pass, or of the agent; without the check before the start and the probe."""
    firsts = [body["messages"][0] for body in endpoint.requests]
    talks = [first["content"] for first in firsts if first["role"] == "system"]
    return sum((content == FIRST_THOUGHT) == thinking for content in talks)


def one_at_a_time(settings: CollectConfig) -> CollectConfig:
    return settings.model_copy(update={"workers": 1})


def test_the_bill_of_a_finished_run_stays_as_it_is(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with FakeEndpoint(Teacher(), continues=True) as endpoint:
        settings = config(tasks, endpoint.url, prices=PRICES)
        done = collect(settings, out)
        first = counts(out)
        again = collect(settings, out)
    assert done.spent.calls == 12
    kept = sum((item.usage for item in done.trajectories), Usage()) + thoughts_of(out)
    assert (done.spent.usage.input_tokens, done.spent.usage.output_tokens) == (
        kept.input_tokens,
        kept.output_tokens,
    )
    assert again.spent.usage == done.spent.usage
    assert counts(out) == first


def test_a_limit_reached_within_the_pass_is_no_error(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with FakeEndpoint(Teacher(), continues=True) as endpoint:
        done = collect(one_at_a_time(config(tasks, endpoint.url, budget=Budget(max_tokens=1))), out)
        assert (done.stopped, done.missing, len(done.trajectories)) == ("--max-tokens 1", 6, 0)
        assert asked(endpoint, thinking=True) == 1
        assert asked(endpoint, thinking=False) == 0
        assert done.first_thoughts is not None
        assert done.first_thoughts.used == 1
        assert read_json(out / "manifest.json")["counts"]["stopped"] == "--max-tokens 1"
        more = collect(config(tasks, endpoint.url, budget=Budget(max_tokens=10**6)), out)
        assert (more.missing, more.stopped) == (0, None)
        assert asked(endpoint, thinking=True) == 6


def test_a_limit_reached_before_any_chain_of_thought_is_no_error(tasks: Path, tmp_path: Path) -> None:
    def slow(messages: list[dict[str, Any]]) -> Any:
        return (503, b"{}", {"retry-after": "30"}) if messages[0]["role"] == "system" else "ok"

    began = time.monotonic()
    with FakeEndpoint(slow, continues=True) as endpoint:
        limited = config(tasks, endpoint.url, budget=Budget(max_hours=0.5 / 3600))
        done = collect(limited, tmp_path / "run")
    assert time.monotonic() - began < 20, "it does not wait beyond the limit"
    assert done.stopped is not None
    assert done.stopped.startswith("--max-hours")
    assert done.missing == 6


def test_what_the_run_has_spent_counts_before_the_pass_goes_on(tasks: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "run", Teacher()
    teacher.broken = {"3"}
    with FakeEndpoint(teacher, continues=True) as endpoint:
        first = collect(config(tasks, endpoint.url), out)
        assert first.missing == 1
        teacher.broken = set()
        endpoint.requests.clear()
        only_thoughts = thoughts_of(out)
        limit = first.spent.tokens
        assert limit > only_thoughts.input_tokens + only_thoughts.output_tokens
        done = collect(config(tasks, endpoint.url, budget=Budget(max_tokens=limit)), out)
        assert asked(endpoint, thinking=True) == 0, "the run's own calls have used the limit up"
        assert (done.stopped, done.missing) == (f"--max-tokens {limit}", 1)
        assert done.spent.usage == first.spent.usage


def test_faults_of_the_pass_are_noted_with_the_others(tasks: Path, tmp_path: Path) -> None:
    out, teacher, failed, lock = tmp_path / "run", Teacher(), [0], threading.Lock()

    def flaky(messages: list[dict[str, Any]]) -> Any:
        with lock:
            if messages[0]["content"] == FIRST_THOUGHT and failed[0] < 3:
                failed[0] += 1
                return 500, b"{}"
        return teacher(messages)

    with FakeEndpoint(flaky, continues=True) as endpoint:
        done = collect(config(tasks, endpoint.url, gate=GateConfig(retries=3)), out)
    assert done.missing == 0
    assert done.faults == {"500": 3}
    assert counts(out)["faults"] == {"500": 3}
    assert len((out / "first-thought" / "faults-0.jsonl").read_text().splitlines()) == 3


def test_a_key_that_is_echoed_into_a_thought_is_redacted(tasks: Path, tmp_path: Path) -> None:
    out, teacher, key = tmp_path / "run", Teacher(), "no-known-form-123"
    teacher.thoughts = dict.fromkeys(teacher.thoughts, f"I was called with {key}.\n\nAnswer: 1")
    with FakeEndpoint(teacher, continues=True) as endpoint:
        settings = config(tasks, endpoint.url)
        keyed = settings.model_copy(update={"agent": settings.agent.model_copy(update={"api_key": key})})
        collect(keyed, out)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert out / "first-thought" / "prefixes.jsonl" in files
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert "[redacted]" in (out / "first-thought" / "prefixes.jsonl").read_text()


# With and without, on one budget.


def test_a_comparison_keeps_to_one_budget(tasks: Path, tmp_path: Path) -> None:
    out, unlimited = tmp_path / "run", tmp_path / "unlimited"
    with FakeEndpoint(Teacher(), continues=True) as endpoint:
        whole = compare_first_thoughts(config(tasks, endpoint.url), unlimited)
        plain = read_json(unlimited / WITHOUT / "manifest.json")["counts"]
        given = read_json(unlimited / "manifest.json")["counts"]
        assert whole.spent.calls == given["calls"] + plain["calls"] == 18
        for limit in (given["input_tokens"] + given["output_tokens"] + 1, 10):
            endpoint.requests.clear()
            limited = one_at_a_time(config(tasks, endpoint.url, budget=Budget(max_tokens=limit)))
            done = compare_first_thoughts(limited, out)
            assert done.stopped == f"--max-tokens {limit}"
            assert limit <= done.spent.tokens < limit + 600, "one call is in flight"
            assert done.missing > 0
            again = compare_first_thoughts(limited, out)
            assert again.spent.usage == done.spent.usage, "what the other run has spent is known"
            assert "No task was finished by both" in (out / "first-thought.md").read_text() or limit > 10
            out = tmp_path / "other"


def test_the_estimate_of_a_comparison_has_both_runs(tasks: Path, tmp_path: Path) -> None:
    settings = config(tasks, "http://127.0.0.1:9/v1", prices=PRICES)
    both, given = expect_comparison(settings, tmp_path / "run"), expect(settings, tmp_path / "run")
    plain = expect(settings.model_copy(update={"first_thought": None}), tmp_path / "plain")
    assert (both.rollouts, both.calls) == (12, given.calls + plain.calls)
    assert both.input_tokens == given.input_tokens + plain.input_tokens
    assert both.cost == pytest.approx((given.cost or 0) + (plain.cost or 0))
    assert "6 chains of thought" in both.text()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="nothing to compare"):
        expect_comparison(settings.model_copy(update={"first_thought": None}), tmp_path / "run")
