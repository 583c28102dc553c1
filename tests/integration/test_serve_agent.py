"""The agent as a model: it is evaluation's rollout, it stops when nobody waits, and it fails honestly."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

from agentkd.engine.student import load_student
from agentkd.errors import ConfigError
from agentkd.evaluate import run_evaluation
from agentkd.filter import filter_run
from agentkd.record import read_json, read_trajectories
from agentkd.retrieval import Passage
from agentkd.router import RouterConfig, parse_router
from agentkd.sampler import SamplerConfig
from agentkd.serve import ServeConfig, Server, create_app, open_students
from agentkd.serve.students import _agent_config
from agentkd.system import open_system
from agentkd.task import Task
from agentkd.test_time import TestTime, save_test_time
from agentkd.trajectory import StopReason, Trajectory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QUESTIONS = ("What is 6 times 7?", "Say hello.")
STEP_TOKENS = 64
"""Of what is compared: more than what was taught takes, and no long nonsense where nothing was taught."""


def settings(**changes: Any) -> ServeConfig:
    return ServeConfig(**{"engine": "embedded", "threads": 1, "timeout": 30.0, "probe": False, **changes})


@contextmanager
def served(student: Path, **changes: Any) -> Iterator[tuple[openai.OpenAI, list[Any]]]:
    with (
        open_students([student], settings(**changes)) as backends,
        Server(create_app(backends)) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client, backends


def ask(client: openai.OpenAI, question: str, agentkd: dict[str, Any] | None = None, **options: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": question}]
    body = {"agentkd": agentkd} if agentkd is not None else None
    return client.chat.completions.create(model="taught-agent", messages=messages, extra_body=body, **options)


@pytest.fixture(scope="module")
def client(taught: Path) -> Iterator[openai.OpenAI]:
    with served(taught) as (client, _):
        yield client


def essence(record: Trajectory) -> Any:
    """What must be equal: everything but names, clocks and ids, and :func:`likelihoods`."""
    inexact: Any = {"p_tool": True, "drafts": {"__all__": {"mean_logprob"}}}
    steps = [
        (
            (it.raw, it.observation, it.output_token_ids, it.prompt_token_ids, it.usage),
            it.route and it.route.model_dump(exclude=inexact),
        )
        for it in record.steps
    ]
    candidates = [
        [(it.raw, it.repairs, it.votes, it.chosen, it.output_token_ids) for it in step.candidates]
        for step in record.steps
    ]
    return steps, candidates, record.answer, record.stop_reason, record.usage, record.system_prompt


def likelihoods(record: Trajectory) -> list[float | None]:
    """What is equal up to rounding: its last digits depend on what is computed beside it."""
    found: list[float | None] = []
    for step in record.steps:
        found += step.logprobs or ()
        if step.route is not None:
            found += [step.route.p_tool, *(draft.mean_logprob for draft in step.route.drafts)]
    return found


def assert_same(found: Sequence[Trajectory], wanted: Sequence[Trajectory]) -> None:
    """These are the same rollouts."""
    assert [essence(it) for it in found] == [essence(it) for it in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert likelihoods(one) == [
            pytest.approx(value, abs=1e-3) if value is not None else None for value in likelihoods(other)
        ]


def evaluated(student: Path, out: Path, acting: TestTime | None = None) -> list[Trajectory]:
    """The rollouts of evaluation; by the settings in the student's folder, or by others."""

    @contextmanager
    def source() -> Iterator[Any]:
        with open_system(str(student), max_tokens=STEP_TOKENS, test_time=acting) as system:
            yield system.config, system.model

    tasks = [Task(id=str(number), question=question) for number, question in enumerate(QUESTIONS)]
    return run_evaluation("taught", tasks, source, out, workers=1)[1]


@pytest.mark.parametrize("router", [None, "threshold:0.5", "agreement:0.6"])
@pytest.mark.parametrize("actions", [1, 4])
def test_it_is_the_rollout_of_evaluation(
    taught: Path, tmp_path: Path, actions: int, router: str | None
) -> None:
    sampler = SamplerConfig(n=actions, seed=3) if actions > 1 else None
    acting = TestTime(sampler=sampler, router=parse_router(router or "none", seed=3))
    wanted = evaluated(taught, tmp_path / "out", acting)
    options = {"actions": actions, "router": router, "seed": 3, "return_trajectory": True}
    # A server of its own: what an engine has seen before may show in the last digits of log-probabilities.
    with served(taught, max_tokens=STEP_TOKENS) as (client, _):
        answers = [ask(client, question, options) for question in QUESTIONS]
    records = [Trajectory.model_validate(answer.agentkd["trajectory"]) for answer in answers]
    assert_same(records, wanted)
    assert [answer.choices[0].message.content or None for answer in answers] == [it.answer for it in wanted]
    if router is None:
        assert [record.answer for record in wanted] == ["42", "hello"]
        assert bool(records[0].steps[0].candidates) is (actions > 1)
    assert all((record.steps[0].route is None) is (router is None) for record in records)


def test_settings_that_were_saved_are_those_of_evaluation(taught: Path, tmp_path: Path) -> None:
    student = tmp_path / "taught"
    shutil.copytree(taught, student)
    acting = TestTime(
        sampler=SamplerConfig(n=3, temperature=0.9, seed=5),
        router=RouterConfig(kind="agreement", agreement=0.4, answers=3, temperature=0.9, seed=6),
    )
    save_test_time(student, acting)
    wanted = evaluated(student, tmp_path / "out")
    with served(student, max_tokens=STEP_TOKENS) as (client, _):
        told = {"return_trajectory": True}
        answers = [ask(client, question, told).agentkd["trajectory"] for question in QUESTIONS]
        kept = ask(client, "Say hello.", {**told, "router": "agreement:0.1"}).agentkd["trajectory"]
    assert_same([Trajectory.model_validate(it) for it in answers], wanted)
    routes = [record.steps[0].route for record in wanted]
    assert [len(route.drafts) for route in routes if route is not None] == [3, 3]
    assert kept["config"]["router"] == {**acting.model_dump(mode="json")["router"], "agreement": 0.1}
    flag = _agent_config(load_student(student), settings(router="agreement:0.2")).router
    assert flag is not None
    assert (flag.agreement, flag.answers, flag.temperature, flag.seed) == (0.2, 3, 0.9, 6)


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


def test_hanging_up_stops_the_rollout_and_its_code(taught: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with served(taught, save_runs=runs) as (client, backends):
        began = time.monotonic()
        with ask(client, "Wait.", stream=True) as stream:
            for chunk in stream:
                if getattr(chunk, "agentkd_step", {}).get("state") == "acting":
                    break  # its code, an endless loop, begins to run
        errors = runs / "errors.jsonl"
        assert wait_for(lambda: errors.stat().st_size > 0)
        assert time.monotonic() - began < 8, "an action may take 10 s: it was stopped in the middle"
        (record,) = read_trajectories(errors)
        assert record.stop_reason == StopReason.CANCELLED
        assert not any(lane.batch for lane in backends[0].engine._lanes)
        assert ask(client, "Say hello.").choices[0].message.content == "hello"
    assert not read_trajectories(runs / "errors.jsonl")[1:]


def test_hanging_up_while_it_thinks_frees_the_engine(taught: Path) -> None:
    with served(taught) as (client, backends):
        url = str(client.base_url) + "chat/completions"
        body = {
            "model": "taught-agent",
            "temperature": 5.0,
            "messages": [{"role": "user", "content": "x"}],
            "agentkd": {"actions": 64},
        }
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(url, json=body, timeout=0.2)
        lanes = backends[0].engine._lanes
        assert wait_for(lambda: not any(lane.batch for lane in lanes))


def test_the_time_limit_holds_in_the_middle_of_an_action(client: openai.OpenAI) -> None:
    began = time.monotonic()
    answer = ask(client, "Wait.", {"timeout": 0.7})
    assert time.monotonic() - began < 6
    assert (answer.choices[0].finish_reason, answer.agentkd["stop_reason"]) == ("length", "timeout")


def test_a_slow_reader_keeps_nobody_waiting(client: openai.OpenAI) -> None:
    with ask(client, "What is 6 times 7?", stream=True) as stream:
        began = time.monotonic()
        assert ask(client, "Say hello.").choices[0].message.content == "hello"
        assert time.monotonic() - began < 10
        time.sleep(1)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "42"


def kill_all(pid: int) -> None:
    """Kill a process, and then what it had started."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, signal.SIGKILL)
    for child in below:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            kill_all(int(child))


def test_a_killed_sandbox_is_a_503_and_the_next_one_works(client: openai.OpenAI) -> None:
    from agentkd.sandbox.isolation import module_paths
    from agentkd.sandbox.zygotes import zygote_for

    ask(client, "Say hello.")
    zygote = zygote_for(None, module_paths(()))
    with pytest.raises(openai.APIError) as caught, ask(client, "Wait.", stream=True) as stream:
        for chunk in stream:
            if getattr(chunk, "agentkd_step", {}).get("state") == "acting":
                time.sleep(0.3)  # its code runs
                kill_all(zygote.process.pid)
    assert caught.value.code == "sandbox_error"
    assert ask(client, "Say hello.").choices[0].message.content == "hello"


def test_a_retriever_that_is_down_is_a_503(taught: Path) -> None:
    from agentkd.retrieval.bm25 import BM25Retriever
    from agentkd.retrieval.server import retriever_app

    retriever = BM25Retriever([Passage(id="1", title="x", text="y")])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(retriever_app(retriever)))
        client, _ = stack.enter_context(served(taught, corpus=server.address))
        assert ask(client, "Look up x.").choices[0].message.content == "y"
        server.stop()
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, "Look up x.")
        assert (caught.value.status_code, caught.value.code) == (503, "retrieval_error")


def test_served_rollouts_are_kept_and_can_be_filtered(taught: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for _ in range(2):  # the second server goes on where the first one stopped
        with served(taught, save_runs=runs) as (client, _):
            right = ask(client, QUESTIONS[0], {"answer": "42.0", "scorer": "numeric"})
            assert right.agentkd["saved"] is True
            ask(client, "Say hello.", {"answer": "bye"})
            with pytest.raises(ConfigError, match="Another process"), served(taught, save_runs=runs):
                pass
    assert read_json(runs / "manifest.json")["stage"] == "serve"
    kept = filter_run(runs, tmp_path / "kept")
    assert [item.task.question for item in kept.kept] == [QUESTIONS[0]] * 2
    assert len({item.id for item in kept.kept}) == 2
    assert [item.reason for item in kept.dropped] == ["wrong answer: 0 < 1"] * 2
    assert not (tmp_path / "kept" / "errors.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_keep_the_answer_back(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    log = tmp_path / "runs" / "trajectories.jsonl"
    log.symlink_to("/dev/full")
    with served(taught, save_runs=tmp_path / "runs") as (client, _):
        answer = ask(client, "Say hello.")
        assert answer.choices[0].message.content == "hello"
        assert answer.agentkd["saved"] is False
        page = httpx.get(str(client.base_url.join("/metrics"))).text
        assert "agentkd_runs_lost_total 1.0" in page and "agentkd_runs_saved_total 0.0" in page
        assert ask(client, "Say hello.").agentkd["saved"] is False
        log.unlink()  # there is room again
        assert ask(client, "Say hello.").agentkd["saved"] is True
    assert len(read_trajectories(log)) == 1
    assert not (tmp_path / "runs" / "manifest.json").exists()
    told = capsys.readouterr().err
    assert "was not saved" in told and "2 rollouts were not saved" in told


def test_a_request_may_override_the_student(client: openai.OpenAI) -> None:
    answer = ask(client, "Go on.", {"max_steps": 1, "return_trajectory": True}, seed=4, temperature=0.0)
    record = answer.agentkd["trajectory"]
    assert (record["config"]["max_steps"], record["stop_reason"]) == (1, "max_steps")
    assert json.dumps(record)
