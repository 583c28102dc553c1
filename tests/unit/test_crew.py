"""Several teachers, several processes, several samples: who does what, and what a dead one costs."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig
from agentkd.calls import iter_calls
from agentkd.collect import CollectConfig, TeacherConfig, collect, expect, load_teachers
from agentkd.crew import Done, Seat, Work
from agentkd.errors import AgentkdError, ConfigError, ProviderError
from agentkd.gate import GateConfig
from agentkd.processes import ProcessCrew
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.spend import Ledger
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.conftest import action


class Teacher:
    """Two steps a task, each after ``seconds``; dead while ``dead``."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.dead = False
        self.asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, messages: list[dict[str, Any]]) -> Any:
        if self.dead:
            return 500, b'{"error": {"message": "dead"}}'
        if len(messages) == 1:
            return "ok"
        time.sleep(self.seconds)
        with self._lock:
            self.asked[messages[1]["content"]] += 1
        if len(messages) == 2:
            return action("go on", "print(1)")
        return action("done", "final_answer(1)")


def config(folder: Path, url: str, count: int = 30, **changes: Any) -> CollectConfig:
    rows = [Task(id=str(i), question=f"task {i}", answer="1", split="train") for i in range(count)]
    write_jsonl(folder / "tasks.jsonl", rows)
    agent = AgentConfig(model="one", api_base=url, sandbox="local")
    settings = {"agent": agent, "workers": 4, "gate": GateConfig(retries=0), **changes}
    return CollectConfig(tasks=str(folder / "tasks.jsonl"), **settings)


def other(url: str, model: str = "two", **changes: Any) -> TeacherConfig:
    return TeacherConfig(model=model, api_base=url, **{"gate": GateConfig(retries=0), **changes})


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_slow_teacher_does_not_hold_up_a_quick_one(tmp_path: Path, processes: int) -> None:
    quick, slow = Teacher(), Teacher(seconds=0.8)
    with FakeEndpoint(slow) as first, FakeEndpoint(quick) as second:
        both = config(
            tmp_path,
            first.url,
            60,
            teachers=(other(second.url, labels={"who": "quick"}),),
            processes=processes,
        )
        done = collect(both, tmp_path / "run")
    who = Counter(item.model for item in done.trajectories)
    assert who["two"] > 3 * who["one"] > 0
    assert all((item.labels.get("who") == "quick") == (item.model == "two") for item in done.trajectories)
    assert all(item.config["model"] == item.model for item in done.trajectories)


def test_a_dead_teacher_loses_nothing_and_stalls_nobody(tmp_path: Path) -> None:
    living, dying = Teacher(seconds=0.01), Teacher(seconds=0.01)

    def first_then_dead(messages: list[dict[str, Any]]) -> Any:
        dying.dead = sum(dying.asked.values()) >= 9
        return dying(messages)

    with FakeEndpoint(first_then_dead) as first, FakeEndpoint(living) as second:
        both = config(tmp_path, first.url, 60, teachers=(other(second.url),), attempts=4)
        began = time.monotonic()
        done = collect(both, tmp_path / "run")
    assert done.missing == 0
    assert time.monotonic() - began < 60
    assert {item.model for item in done.trajectories} == {"one", "two"}
    # Those that the dead one had begun were begun anew by the other, and say so.
    begun = {question for question, count in dying.asked.items() if count == 1}
    again = {item.task.question for item in done.trajectories if "restarted" in item.labels}
    assert again <= begun
    assert all(item.model == "two" for item in done.trajectories if "restarted" in item.labels)
    assert done.faults == {"500": sum(done.faults.values())}


def test_a_rollout_stays_with_the_teacher_that_began_it(tmp_path: Path) -> None:
    one, two = Teacher(), Teacher()
    failing = True

    def fails_second_steps(teacher: Teacher) -> Any:
        def reply(messages: list[dict[str, Any]]) -> Any:
            if failing and len(messages) > 2:
                return 500, b"{}"
            return teacher(messages)

        return reply

    with FakeEndpoint(fails_second_steps(one)) as first, FakeEndpoint(fails_second_steps(two)) as second:
        both = config(tmp_path, first.url, 8, teachers=(other(second.url),), attempts=1)
        with pytest.raises(ProviderError):
            collect(both, tmp_path / "run")
        failing = False
        done = collect(both, tmp_path / "run")
    assert done.missing == 0
    assert not any("restarted" in item.labels for item in done.trajectories)
    models = {call.rollout: set() for call in iter_calls(tmp_path / "run")}  # type: ignore[var-annotated]
    for call in iter_calls(tmp_path / "run"):
        if call.kind == "model":
            models[call.rollout].add(call.model)
    assert all(len(names) == 1 for names in models.values())


def test_a_run_starts_when_one_of_its_endpoints_lives(tmp_path: Path) -> None:
    with FakeEndpoint(Teacher()) as living:
        both = config(tmp_path, "http://127.0.0.1:9/v1", 5, teachers=(other(living.url),), attempts=5)
        assert collect(both, tmp_path / "run").missing == 0
    with pytest.raises(ProviderError, match="Cannot reach"):
        dead = (other("http://127.0.0.1:9/v1"),)
        collect(config(tmp_path, "http://127.0.0.1:9/v1", 5, teachers=dead), tmp_path / "other")


def test_teachers_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECOND_KEY", "sk-second-key")
    path = tmp_path / "teachers.toml"
    path.write_text(
        '[[teachers]]\nmodel = "a"\napi_base = "http://a/v1"\n'
        '[[teachers]]\nmodel = "b"\napi_base = "http://b/v1"\napi_key_env = "SECOND_KEY"\n'
        "gate = { requests_per_minute = 60 }\n"
    )
    first, second = load_teachers(path)
    assert (first.api_key, second.api_key) == (None, "sk-second-key")
    assert second.gate.requests_per_minute == 60
    assert "sk-second" not in second.model_dump_json()
    for text, said in (
        ("", "names no teachers"),
        ('[[teachers]]\nmodel = "a"', "api_base"),
        ("[[", "reading"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_teachers(path)
    with pytest.raises(ConfigError, match="no file"):
        load_teachers(tmp_path / "nothing.toml")


def test_the_key_of_openai_is_sent_to_openai_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-key")
    path = tmp_path / "teachers.toml"
    bases = {
        "https://api.openai.com/v1": "sk-openai-key",
        "https://eu.api.openai.com/v1": "sk-openai-key",
        "http://127.0.0.1:8000/v1": None,
        "https://openrouter.ai/api/v1": None,
        "https://openai.com.evil.example/v1": None,
        "https://evilopenai.com/v1": None,
        "http://[/v1": None,
    }
    path.write_text("".join(f'[[teachers]]\nmodel = "m"\napi_base = "{base}"\n' for base in bases))
    assert {teacher.api_base: teacher.api_key for teacher in load_teachers(path)} == bases
    named = '[[teachers]]\nmodel = "m"\napi_base = "https://openrouter.ai/api/v1"\napi_key_env = "%s"\n'
    path.write_text(named % "OPENAI_API_KEY")
    assert load_teachers(path)[0].api_key == "sk-openai-key", "whoever names it means it"
    path.write_text(named % "NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="teacher 1: the environment variable NO_SUCH_KEY is not set"):
        load_teachers(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('teachers = ["gpt-4o"]', "no list of tables"),
        ('teachers = "gpt-4o"', "no list of tables"),
        ('[teachers]\nmodel = "m"', "no list of tables"),
        ("teachers = []", "names no teachers"),
        ('[[teachers]]\nmodel = "m"\napi_base = "http://a/v1"\napi_key_env = 3', "variable 3 is not set"),
        ('[[teachers]]\nmodel = "m"\napi_base = "http://a/v1"\napi_key = "sk-x"', "teacher 1: api_key"),
    ],
)
def test_a_file_of_teachers_that_is_none_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "teachers.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_teachers(path)
    assert "sk-x" not in str(caught.value)


def sometimes(messages: list[dict[str, Any]]) -> str:
    """Right for even tasks; for odd ones never."""
    if len(messages) == 1:
        return "ok"
    right = int(messages[1]["content"].split()[-1]) % 2 == 0
    return action("answer", f"final_answer({1 if right else 0})")


def test_enough_correct_ones_spare_further_samples(tmp_path: Path) -> None:
    with FakeEndpoint(sometimes) as endpoint:
        settings = {"samples": 4, "enough": 1, "temperatures": (0.0, 0.7), "workers": 2}
        done = collect(config(tmp_path, endpoint.url, 10, **settings), tmp_path / "run")
        tries = Counter(int(item.task.id) % 2 for item in done.trajectories)
        assert tries[1] == 20, "hard tasks get all their samples"
        assert tries[0] < 12, "easy ones hardly more than one"
        assert done.missing == 0
        hot = {item.sample: item.config["temperature"] for item in done.trajectories}
        assert hot == {0: 0.0, 1: 0.7, 2: 0.0, 3: 0.7}
        asked = [body["temperature"] for body in endpoint.requests[1:]]
        assert set(asked) == {0.0, 0.7}
        before = len(endpoint.requests)
        again = collect(config(tmp_path, endpoint.url, 10, **settings), tmp_path / "run")
        assert len(endpoint.requests) == before, "not even the check before the start"
        assert again.missing == 0
    assert expect(config(tmp_path, endpoint.url, 10, **settings), tmp_path / "run").rollouts == 0
    stored = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.jsonl")}
    dead = collect(config(tmp_path, endpoint.url, 10, **settings), tmp_path / "run")
    assert dead.trajectories == done.trajectories, "a run that is finished needs no endpoint"
    logs = [name for name in stored if name.startswith(("calls", "trajectories"))]
    assert all((tmp_path / "run" / name).stat().st_mtime_ns == stored[name] for name in logs)


def test_two_processes_write_two_logs_and_one_set_of_trajectories(tmp_path: Path) -> None:
    teacher = Teacher(seconds=0.01)
    with FakeEndpoint(teacher) as endpoint:
        done = collect(config(tmp_path, endpoint.url, 40, processes=2), tmp_path / "run")
    assert done.missing == 0
    assert len({item.id for item in read_trajectories(tmp_path / "run" / "trajectories.jsonl")}) == 40
    logs = sorted(path.name for path in (tmp_path / "run").glob("calls-*"))
    assert logs == ["calls-0.jsonl", "calls-1.jsonl"]
    assert all((tmp_path / "run" / name).stat().st_size for name in logs)
    assert set(teacher.asked.values()) == {2}
    assert read_json(tmp_path / "run" / "manifest.json")["counts"]["calls"] == 80


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    from agentkd.record import AppendLog

    with FakeEndpoint(Teacher()) as endpoint:
        two = config(tmp_path, endpoint.url, 4, processes=2)
        (tmp_path / "run").mkdir()
        with AppendLog(tmp_path / "run" / "calls-1.jsonl"), pytest.raises(ConfigError, match="calls-1"):
            collect(two, tmp_path / "run")
        assert collect(two, tmp_path / "run").missing == 0


class Killer(Teacher):
    """Kills one of the processes that ask it, at the 10th call."""

    def __init__(self) -> None:
        super().__init__(seconds=0.01)
        self.killed = 0

    def __call__(self, messages: list[dict[str, Any]]) -> Any:
        with self._lock:
            if not self.killed and sum(self.asked.values()) >= 10:
                (victim, *_) = multiprocessing.active_children()
                self.killed = victim.pid or 0
                os.kill(self.killed, signal.SIGKILL)
        return super().__call__(messages)


def test_a_killed_process_is_named_and_its_work_is_gone_on_with(tmp_path: Path) -> None:
    teacher = Killer()
    with FakeEndpoint(teacher) as endpoint:
        two = config(tmp_path, endpoint.url, 24, processes=2)
        with pytest.raises(AgentkdError, match="worker process has ended unexpectedly"):
            collect(two, tmp_path / "run")
        assert teacher.killed
        done = collect(two, tmp_path / "run")
    assert done.missing == 0
    assert len({item.id for item in read_trajectories(tmp_path / "run" / "trajectories.jsonl")}) == 24
    assert sum(teacher.asked.values()) - 48 <= two.workers, "only what was in flight is asked again"


def nobody(task: Task, sample: int) -> Any:
    raise AssertionError("no rollout is begun")


def test_work_for_a_process_that_has_died_says_so(tmp_path: Path) -> None:
    ready: queue.SimpleQueue[Done] = queue.SimpleQueue()
    crew = ProcessCrew(1, [Seat(nobody, 1)], ready, None, ledger=Ledger())
    try:
        member = crew._members[0]
        member._process.kill()
        member._process.join()
        work = Work(Task(id="t", question="?", answer="1"), 0)
        with pytest.raises(AgentkdError, match="worker process has ended unexpectedly") as caught:
            for _ in range(100):  # the first may still go into the pipe
                crew.submit(work)
        assert caught.value.hint
    finally:
        crew.close()
