"""Bad input and bad luck: a clear message, and nothing lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig
from agentkd.calls import iter_calls
from agentkd.collect import CollectConfig, collect
from agentkd.collect.folder import RunLock
from agentkd.crew import FaultNote
from agentkd.errors import ConfigError, DataError, ProviderError, StorageError
from agentkd.gate import GateConfig
from agentkd.record import AppendLog, iter_jsonl, read_trajectories, write_jsonl
from agentkd.rollouts import Progress
from agentkd.spend import Budget
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import StopReason
from tests.attack.ordinary_user import command, missing
from tests.conftest import action


def teacher(messages: list[dict[str, Any]]) -> Any:
    if len(messages) == 1:
        return "ok"
    return action("go on", "print(1)") if len(messages) == 2 else action("done", "final_answer(1)")


def config(folder: Path, url: str, count: int = 12, **changes: Any) -> CollectConfig:
    rows = [Task(id=str(i), question=f"task {i}", answer="1", split="train") for i in range(count)]
    write_jsonl(folder / "tasks.jsonl", rows)
    agent = AgentConfig(model="fake", api_base=url, sandbox="local", timeout=changes.pop("timeout", 60.0))
    settings = {"agent": agent, "workers": 4, "gate": GateConfig(retries=3), **changes}
    return CollectConfig(tasks=str(folder / "tasks.jsonl"), **settings)


def notes(out: Path) -> list[FaultNote]:
    return [note for path in out.glob("faults-*.jsonl") for note in iter_jsonl(path, FaultNote)]


class Faulty:
    """Answers every ``each``-th request with the next of the given faults."""

    def __init__(self, faults: list[Any], each: int = 3) -> None:
        self.faults, self.each = faults, each
        self.requests, self.injected = 0, 0
        self.answered: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def __call__(self, messages: list[dict[str, Any]]) -> Any:
        if len(messages) == 1:
            return "ok"
        with self._lock:
            self.requests += 1
            if self.requests % self.each == 0:
                fault = self.faults[self.injected % len(self.faults)]
                self.injected += 1
                if callable(fault):
                    return fault()
                return fault
            self.answered[messages[1]["content"], len(messages)] += 1
        return teacher(messages)


def cut() -> Any:
    raise ConnectionResetError


FAULTS = [
    (500, b'{"error": {"message": "oh"}}'),
    (429, b'{"error": {"message": "slow down"}}', {"retry-after": "0.02"}),
    (503, b"busy", {"retry-after": "0.02"}),
    (200, b'{"id": "1", "choices": [{"message": {"content": "trunc'),
    (200, b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}'),
    cut,
]
NAMES = ["500", "429", "503", "garbage", "garbage", "connection"]
"""What they are noted as."""


def test_every_kind_of_fault_is_survived_and_accounted_for(tmp_path: Path) -> None:
    faulty = Faulty(FAULTS)
    with FakeEndpoint(faulty) as endpoint:
        done = collect(config(tmp_path, endpoint.url, 14, attempts=5), tmp_path / "run")
    assert done.missing == 0
    assert set(faulty.answered.values()) == {1}, "what was answered is not asked again"
    injected = Counter(NAMES[number % len(NAMES)] for number in range(faulty.injected))
    assert done.faults == injected == Counter(note.what for note in notes(tmp_path / "run"))
    assert {note.kind for note in notes(tmp_path / "run")} == {"overload", "transient"}


@pytest.mark.slow
def test_five_thousand_trajectories_with_a_tenth_of_all_calls_failing(tmp_path: Path) -> None:
    chance, lock, over = random.Random(5), threading.Lock(), threading.Event()
    injected, answered = Counter[str](), Counter[tuple[str, int]]()

    def hang() -> Any:
        over.wait(8)
        raise ConnectionResetError

    def drawn() -> Any:
        """One call in ten fails; one failure in sixty is a silence, which costs a worker five seconds."""
        if chance.random() >= 0.1:
            return None
        if chance.random() < 1 / 60:
            injected["timeout"] += 1
            return hang
        number = chance.randrange(len(FAULTS))
        injected[NAMES[number]] += 1
        return FAULTS[number]

    def reply(messages: list[dict[str, Any]]) -> Any:
        if len(messages) == 1:
            return "ok"
        with lock:
            fault = drawn()
            if fault is None:
                answered[messages[1]["content"], len(messages)] += 1
                return teacher(messages)
        return fault() if callable(fault) else fault

    with FakeEndpoint(reply) as endpoint:
        settings = {"workers": 32, "attempts": 5, "timeout": 5.0}
        done = collect(config(tmp_path, endpoint.url, 5000, **settings), tmp_path / "run")
        over.set()
    kept = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    print(f"{sum(injected.values())} faults injected, {done.faults} noted, {done.spent.calls} calls")
    assert len({item.id for item in kept}) == len(kept) == 5000
    assert all(item.correct for item in kept)
    assert done.faults == injected, "each fault, by its kind"
    assert injected["timeout"] > 3
    assert set(answered.values()) == {1}
    assert done.spent.calls == len(answered) == 10_000


def test_a_storm_of_429_with_a_long_wait_is_sat_out(tmp_path: Path) -> None:
    """For a second the endpoint refuses everything; meanwhile hardly anybody asks."""
    refused: list[float] = []
    began: list[float] = []

    def reply(messages: list[dict[str, Any]]) -> Any:
        if len(messages) == 1:
            return "ok"
        now = time.monotonic()
        began[:] = began or [now]
        if now < began[0] + 1.0:
            refused.append(now)
            return 429, b"{}", {"retry-after": f"{began[0] + 1.05 - now:.2f}"}
        return teacher(messages)

    with FakeEndpoint(reply) as endpoint:
        done = collect(config(tmp_path, endpoint.url, 20, workers=16), tmp_path / "run")
    assert done.missing == 0
    assert len(refused) <= 16, "nobody asks while the endpoint wants to be left alone"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_who_looks_on_is_told_of_a_wait_while_it_lasts(tmp_path: Path, processes: int) -> None:
    refused, seen = [], list[Progress]()

    def reply(messages: list[dict[str, Any]]) -> Any:
        if len(messages) > 1 and not refused:
            refused.append(time.monotonic())
            return 429, b'{"error": {"message": "slow down"}}', {"retry-after": "2.5"}
        return teacher(messages)

    with FakeEndpoint(reply) as endpoint:
        run = config(tmp_path, endpoint.url, 4, processes=processes)
        collect(run, tmp_path / "run", on_progress=seen.append)
    waiting = [progress for progress in seen if progress.waits]
    assert len(waiting) >= 4, "it is kept up to date"
    assert {text for progress in waiting for text, _ in progress.waits} == {
        f"{endpoint.url} asks to wait {seconds} s" for seconds in [2]
    }
    left = [progress.waits[0][1] for progress in waiting]
    assert left == sorted(left, reverse=True)
    assert left[0] == pytest.approx(2.5, abs=0.5)
    assert all(f"{endpoint.url} 429: " in item.problem for item in waiting[1:])
    assert "slow down" in waiting[-1].problem
    assert not seen[-1].waits


def test_counts_that_cannot_be_end_no_budget_and_are_noted(tmp_path: Path) -> None:
    wrong = [10**12, -7, "many", 10**9]
    replies = [0]

    def reply(messages: list[dict[str, Any]]) -> Any:
        if len(messages) == 1:
            return "ok"
        replies[0] += 1
        counts = {"prompt_tokens": wrong[replies[0] % 4], "completion_tokens": 20}
        message = {"role": "assistant", "content": teacher(messages)}
        body = {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return 200, json.dumps({**body, "usage": counts}).encode()

    with FakeEndpoint(reply) as endpoint:
        limited = config(tmp_path, endpoint.url, 12, budget=Budget(max_tokens=100_000))
        done = collect(limited, tmp_path / "run")
    assert (done.missing, done.stopped) == (0, None)
    usage = done.spent.usage
    assert usage.uncounted_calls == 24
    assert usage.input_tokens == usage.output_tokens == 0
    assert 24 * 100 < usage.estimated_tokens < 24 * 2000
    assert done.faults == {"wrong usage": 12}, "those that are numbers"
    assert all("prompt tokens of" in note.message for note in notes(tmp_path / "run"))
    assert all(item.usage.uncounted_calls == 2 for item in done.trajectories)


def test_an_endpoint_that_hangs_costs_its_own_calls_only(tmp_path: Path) -> None:
    hold, hung = threading.Event(), []

    def reply(messages: list[dict[str, Any]]) -> Any:
        if len(messages) == 4 and messages[1]["content"].endswith("3") and not hung:
            hung.append(True)
            hold.wait(20)
        return teacher(messages)

    with FakeEndpoint(reply) as endpoint:
        done = collect(config(tmp_path, endpoint.url, 8, timeout=0.5), tmp_path / "run")
        hold.set()
    assert done.missing == 0
    assert done.faults == {"timeout": 1}


def test_a_run_that_is_given_up_keeps_its_errors(tmp_path: Path) -> None:
    dead = False

    def reply(messages: list[dict[str, Any]]) -> Any:
        return (500, b"{}") if dead and len(messages) > 1 else teacher(messages)

    with FakeEndpoint(reply) as endpoint:
        settings = {"gate": GateConfig(retries=0), "attempts": 9}
        collect(config(tmp_path, endpoint.url, 3), tmp_path / "run")
        dead = True
        other = config(tmp_path, endpoint.url, 30, **settings)
        with pytest.raises(ProviderError, match="times in a row"):
            collect(other, tmp_path / "other")
        errors = read_trajectories(tmp_path / "other" / "errors.jsonl")
        assert errors
        assert {item.stop_reason for item in errors} == {StopReason.PROVIDER_ERROR}
        dead = False
        assert collect(other, tmp_path / "other").missing == 0
    assert not (tmp_path / "other" / "errors.jsonl").exists()


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty([], each=10**9)
    written, full = [0], True
    append = AppendLog.append_line

    def append_line(self: AppendLog, line: str, *, wait: bool = True) -> None:
        if "calls" in self.path.name and full:
            written[0] += 1
            if written[0] > 20:
                raise StorageError("Cannot write: No space left on device.", "Free some space.")
        append(self, line, wait=wait)

    monkeypatch.setattr(AppendLog, "append_line", append_line)
    with FakeEndpoint(faulty) as endpoint:
        with pytest.raises(StorageError, match="No space left"):
            collect(config(tmp_path, endpoint.url), tmp_path / "run")
        full = False
        time.sleep(0.3)
        asked = sum(faulty.answered.values())
        logged = sum(call.kind == "model" for call in iter_calls(tmp_path / "run"))
        assert asked - logged <= 4, "at most the calls in flight"
        assert collect(config(tmp_path, endpoint.url), tmp_path / "run").missing == 0
    assert sum(faulty.answered.values()) == 24 + asked - logged


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # who may write anywhere, so this test runs as an ordinary user
        if why := missing():
            pytest.skip(why)
        name = f"{Path(__file__).relative_to(Path.cwd())}::{test_a_read_only_folder_is_named.__name__}"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
        done = subprocess.run(command(words), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert "1 passed" in done.stdout
        return
    (tmp_path / "run").mkdir(mode=0o500)
    with FakeEndpoint(teacher) as endpoint, pytest.raises(StorageError, match=r"run\.lock"):
        collect(config(tmp_path, endpoint.url), tmp_path / "run")


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with FakeEndpoint(teacher) as endpoint, pytest.raises(StorageError, match="run"):
        collect(config(tmp_path, endpoint.url), tmp_path / "run")


def test_tasks_that_have_changed_since_the_run_began_are_named(tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        first = config(tmp_path, endpoint.url, 4)
        collect(first, tmp_path / "run")
        rows = list(iter_jsonl(tmp_path / "tasks.jsonl", Task))
        rows[2] = rows[2].model_copy(update={"answer": "2"})
        write_jsonl(tmp_path / "tasks.jsonl", rows)
        with pytest.raises(ConfigError, match="1 of 4 have changed, the first is '2'"):
            collect(first, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, "seed"),
        ({"labels": {"who": "b"}}, "label who"),
        ({"temperatures": (0.5,)}, "temperatures"),
    ],
)
def test_settings_that_have_changed_since_are_named(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tmp_path, endpoint.url, 2, labels={"who": "a"}), tmp_path / "run")
        with pytest.raises(ConfigError, match=said):
            collect(config(tmp_path, endpoint.url, 2, **{"labels": {"who": "a"}, **change}), tmp_path / "run")


def test_a_line_of_the_log_that_is_no_call_is_named(tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tmp_path, endpoint.url, 2), tmp_path / "run")
        log = tmp_path / "run" / "calls-0.jsonl"
        log.write_bytes(b"nonsense\n" + log.read_bytes())
        with pytest.raises(DataError, match=r"calls-0\.jsonl, line 1"):
            collect(config(tmp_path, endpoint.url, 2), tmp_path / "run")


def test_a_second_collector_is_refused_before_it_reads_anything(tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        with RunLock(tmp_path / "run"), pytest.raises(ConfigError, match="Another process"):
            collect(config(tmp_path, endpoint.url), tmp_path / "run")
        assert endpoint.requests == []
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
        assert collect(config(tmp_path, endpoint.url), tmp_path / "run").missing == 0
