"""Tool-usage adaptation from end to end at toy size, and what a kill in the middle costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from agentkd.distill import distill
from agentkd.engine.student import load_student
from agentkd.record import read_trajectories, write_jsonl
from tests.integration.test_distill import base, settings  # noqa: F401
from tests.unit.test_adapt import trace

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TAUGHT = {"sky": "blue", "rose": "red", "sun": "gold"}
UNTAUGHT = {"wine": "dark", "rust": "brown", "ash": "grey", "ink": "black"}


def agentkd(*arguments: str | Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "agentkd", *map(str, arguments), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_the_whole_way_from_trajectories_to_an_adapted_student(base: Path, tmp_path: Path) -> None:  # noqa: F811
    facts = [trace(name, colour) for name, colour in TAUGHT.items()]
    write_jsonl(tmp_path / "facts.jsonl", facts)
    write_jsonl(tmp_path / "all.jsonl", [*facts, *(trace(*item) for item in UNTAUGHT.items())])
    first = agentkd("adapt", tmp_path / "facts.jsonl", "--out", tmp_path / "facts")
    assert first["knowledge"] == {"direct direct": 3}

    informed = tmp_path / "informed"
    taught = settings(base, steps=120, learning_rate=2e-2, batch_size=3)
    distill(tmp_path / "facts" / "knowledge.jsonl", informed, taught)

    out = tmp_path / "adapt"
    second = agentkd("adapt", tmp_path / "all.jsonl", "--student", informed, "--out", out)
    assert (second["easy"], second["hard"]) == (3, 4)
    assert second["mix"] == {"direct direct": 7, "allowed direct": 3, "allowed tools": 4}
    last = agentkd(
        "distill", out / "mix.jsonl", "--from", informed, "--steps", "2", "--out", tmp_path / "adapted"
    )
    assert last["out"] == str(tmp_path / "adapted")
    student = load_student(tmp_path / "adapted")
    assert student.training["parent"]["student"] == str(informed)
    assert student.system_prompt == load_student(informed).system_prompt


SLOW = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from agentkd.adapt import Respondent, adapt
from agentkd.agent_config import AgentConfig
from tests.unit.test_adapt import Knows

class Slow(Knows):
    def generate(self, *arguments, **options):
        time.sleep(0.05)
        return super().generate(*arguments, **options)

@contextmanager
def source(config):
    model = Slow({f"thing {n}": ['final_answer("blue")'] for n in range(20)})
    yield AgentConfig(model="student", sandbox="local"), model

adapt(Path(sys.argv[1]), Path(sys.argv[2]), student=Respondent({"student": "slow"}, source), workers=2)
"""


def test_a_kill_in_the_middle_of_the_partition_loses_no_finished_answer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "kept.jsonl", [trace(f"thing {number}", "blue") for number in range(40)])
    command = [sys.executable, "-c", SLOW, str(tmp_path / "kept.jsonl"), str(tmp_path / "out")]
    log = tmp_path / "out" / "partition" / "trajectories.jsonl"
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = log.read_bytes().rpartition(b"\n")[0]
    assert before.count(b"\n") < 39
    assert not (tmp_path / "out" / "mix.jsonl").exists()
    subprocess.run(command, check=True)
    assert log.read_bytes().startswith(before + b"\n")
    assert set(Counter(item.id for item in read_trajectories(log)).values()) == {1}
    decisions = [json.loads(line) for line in (tmp_path / "out" / "partition.jsonl").read_text().splitlines()]
    assert sum(row["easy"] for row in decisions) == 20
    assert len(decisions) == 40
