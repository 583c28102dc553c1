"""First thoughts on real servers: token for token on our own endpoint, and after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("fastapi")

from agentkd.agent import build_agent  # noqa: E402
from agentkd.agent_config import AgentConfig  # noqa: E402
from agentkd.engine import Completion  # noqa: E402
from agentkd.engine.render import render_prompt  # noqa: E402
from agentkd.engine.torch_engine import TorchEngine  # noqa: E402
from agentkd.first_thought import probe_continuation  # noqa: E402
from agentkd.model import openai_model  # noqa: E402
from agentkd.pipeline import expert_endpoint  # noqa: E402
from agentkd.prompt import FIRST_THOUGHT, chat_messages  # noqa: E402
from agentkd.record import read_trajectories, write_jsonl  # noqa: E402
from agentkd.rollout import rollout  # noqa: E402
from agentkd.serve import Server, StudentBackend, create_app  # noqa: E402
from agentkd.task import Task  # noqa: E402
from agentkd.testing import FakeEndpoint  # noqa: E402
from agentkd.trajectory import FirstThought  # noqa: E402
from tests.integration.test_serve import tiny_model, tiny_tokenizer  # noqa: E402

TASK = Task(id="t", question="What is two plus two?", answer="4")
PREFIX = "Thought: The answer of the task"


class Watched:
    """An engine that remembers which tokens it was fed."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.fed: list[list[int]] = []

    def generate(self, prompt_ids: Any, **options: Any) -> list[Completion]:
        self.fed.append(list(prompt_ids))
        return self.engine.generate(prompt_ids, **options)

    def close(self) -> None:
        self.engine.close()


def test_a_first_thought_is_continued_token_for_token() -> None:
    tokenizer = tiny_tokenizer()
    engine = Watched(TorchEngine(tiny_model(len(tokenizer)), tokenizer, threads=1))
    backend = StudentBackend(engine, tokenizer, "tiny")
    with Server(create_app([backend])) as server:
        found = probe_continuation(AgentConfig(model="tiny", api_base=server.url))
        assert found.via == "prefill", found
        engine.fed.clear()
        model = openai_model("tiny", server.url, max_tokens=12, extra_body={"return_token_ids": True})
        agent = build_agent(model, sandbox="local", prompt="Add.", max_steps=2)
        agent.first_thought = FirstThought(prefix=PREFIX, via="prefill")
        record = rollout(agent, TASK)
        agent.cleanup()
    backend.close()
    first, second = record.steps
    messages = chat_messages("Add.", TASK.question, [(PREFIX, None)])
    rendered = render_prompt(tokenizer, messages, continue_final_message=True)
    # What was rendered, what the endpoint says it used, and what the engine was fed are one.
    assert list(first.prompt_token_ids or ()) == rendered == engine.fed[0]
    assert tokenizer.decode(rendered).endswith(f"<|im_start|>assistant\n{PREFIX}")
    assert tokenizer.decode(first.output_token_ids) == first.raw
    assert first.output == (PREFIX + first.raw).rstrip()
    # The whole turn, given beginning and own continuation, is what the next step goes on from.
    assert len(engine.fed) == 2
    assert engine.fed[1] == list(second.prompt_token_ids or ())
    assert first.output in tokenizer.decode(engine.fed[1])
    assert second.first_thought is None


def test_the_offline_teacher_is_recognised_as_one_that_continues() -> None:
    with expert_endpoint(seed=0, error_rate=0.0) as url:
        found = probe_continuation(AgentConfig(model="offline-expert", api_base=url))
    assert found.via == "prefill", found


COLLECT = """
import sys
from pathlib import Path
from agentkd.agent_config import AgentConfig
from agentkd.collect import CollectConfig, collect
from agentkd.first_thought import FirstThoughtConfig
tasks, url, out = sys.argv[1:]
agent = AgentConfig(model="fake", api_base=url, sandbox="local")
thoughts = FirstThoughtConfig()
collect(CollectConfig(tasks=tasks, split="all", agent=agent, workers=2, first_thought=thoughts), Path(out))
"""


class Slow:
    """Answers after a moment; counts what it was asked, for each task and stage."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        if messages[0]["role"] != "system":
            return "ok"
        number = messages[1]["content"].split()[-1]
        stage = "think" if messages[0]["content"] == FIRST_THOUGHT else "act"
        self.asked[stage, number] += 1
        time.sleep(0.05)
        if stage == "think":
            return "I need the next number.\n\nIt is easy.\n\nAnswer: 1"
        return f" So I add.\n```python\nfinal_answer({number} + 1)\n```"


@pytest.mark.parametrize(("stage", "after"), [("think", 4), ("act", 4)])
def test_killed_and_run_again_it_gives_the_same_set(tmp_path: Path, stage: str, after: int) -> None:
    tasks, out, teacher = tmp_path / "tasks.jsonl", tmp_path / "run", Slow()
    write_jsonl(tasks, [Task(id=str(i), question=f"add {i}", answer=str(i + 1)) for i in range(10)])
    with FakeEndpoint(teacher, continues=True) as endpoint:
        command = [sys.executable, "-c", COLLECT, str(tasks), endpoint.url, str(out)]
        process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 60
        while sum(n for (name, _), n in teacher.asked.items() if name == stage) < after:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        known = {
            name: {item.task.id for item in read_trajectories(path)} if path.is_file() else set()
            for name, path in (
                ("think", out / "first-thought" / "trajectories.jsonl"),
                ("act", out / "trajectories.jsonl"),
            )
        }
        before = teacher.asked.copy()
        subprocess.run(command, check=True, timeout=120)
    again = teacher.asked - before
    assert not {key for key in again if key[1] in known[key[0]]}, "nothing finished is asked again"
    assert all(count <= 2 for count in teacher.asked.values())
    assert known[stage], "it was killed in the middle"
    assert again
    records = read_trajectories(out / "trajectories.jsonl")
    assert sorted(int(item.task.id) for item in records) == list(range(10))
    assert all(item.correct and item.steps[0].first_thought is not None for item in records)
    thoughts = read_trajectories(out / "first-thought" / "trajectories.jsonl")
    assert sorted(int(item.task.id) for item in thoughts) == list(range(10))


def test_the_command_collects_compares_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = "collect --teacher expert --tasks gym:lcm+almanac:hops=2 --n 6 --sandbox local --json"
    options = ["--first-thought", "--compare", "--out", str(out)]
    run = [sys.executable, "-m", "agentkd", *command.split(), *options]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["first_thoughts"] == {"used": 6, "dropped": {}, "via": "prefill"}
    for record in read_trajectories(out / "trajectories.jsonl"):
        (first, *later) = record.steps
        assert first.first_thought is not None
        assert first.output.startswith("Thought: To answer this I need ")
        assert first.code is not None
        assert all(step.first_thought is None for step in later)
    assert "not a language model" in (out / "first-thought.md").read_text()
