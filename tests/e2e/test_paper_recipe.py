"""The paper's recipe at toy size: the same scripts, with the offline expert and a random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentkd.pipeline import expert_endpoint
from agentkd.record import load_tasks, read_trajectories, write_jsonl
from agentkd.taskset import load_taskset
from tests.integration.test_distill import base

__all__ = ["base"]

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "paper"
SYSTEMS = ("cot-rag", "agent-ftp-sag")
STUDENTS = ("agent", "agent-ftp", "cot", "cot-rag")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stages_of_the_paper_run_one_after_another(base: Path, tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "agentkd"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m agentkd "$@"\n')
    program.chmod(0o755)
    world = load_taskset("almanac:hops=2", "train", 3, 0)
    write_jsonl(tmp_path / "passages.jsonl", world.passages)
    write_jsonl(tmp_path / "tasks.jsonl", [*world.tasks, *load_taskset("gym:products", "train", 3, 0).tasks])
    with expert_endpoint(seed=0, error_rate=0.0) as url:
        settings = {
            "OUT": str(tmp_path / "out"),
            "TEACHER": "offline-expert",
            "API_BASE": url,
            "BASE": str(base),
            "CORPUS": str(tmp_path / "passages.jsonl"),
            "TRAIN_TASKS": str(tmp_path / "tasks.jsonl"),
            "TRAIN_N": "6",
            "TEST_SETS": "gym:products",
            "TEST_N": "2",
            "SYSTEMS": " ".join(SYSTEMS),
            "TRAIN_FOR": "--steps 1",
            "LORA_RANK": "4",
            "ACTIONS": "2",
            "K": "1",
            "AGENT_LENGTH": "1000",
            "COT_LENGTH": "1000",
            "STEP_TOKENS": "8",
            "SANDBOX": "local",
            "WORKERS": "4",
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        }
        for name in ("0-tasks", "1-collect", "2-filter", "3-distill", "4-evaluate"):
            more = {"STEP_TOKENS": "512"} if name == "1-collect" else {}
            done = subprocess.run(
                ["sh", str(SCRIPTS / f"{name}.sh")],
                env={**os.environ, **settings, **more},
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert all(it.context for it in read_trajectories(out / "cot-rag" / "kept" / "kept.jsonl"))
    for name in STUDENTS:
        folder = out / "students" / base.name / name
        student = json.loads((folder / "student.json").read_text())
        assert student["training"]["config"]["lora_dropout"] == 0.05
        assert student["passages"] == (1 if name == "cot-rag" else None)
    for name in SYSTEMS:
        runs = read_trajectories(out / "evaluate" / base.name / name / "gym-products" / "trajectories.jsonl")
        assert len(runs) == 2
        assert all((it.context is not None) == (name == "cot-rag") for it in runs)
    first = next(it for it in read_trajectories(out / "agent-ftp" / "kept" / "kept.jsonl"))
    assert first.steps[0].first_thought is not None


def test_the_training_questions_are_drawn_by_set_and_level(tmp_path: Path) -> None:
    """From local folders with the columns of the hub's datasets."""
    pytest.importorskip("datasets")
    hops = [
        {
            "id": str(n),
            "question": f"Who is {n}?",
            "answer": f"n{n}",
            "type": "bridge",
            "level": "hard",
            "context": "x",
        }
        for n in range(4)
    ]
    levels = [f"Level {1 + n % 5}" for n in range(20)]
    problems = [
        {
            "problem": f"What is {n}?",
            "level": it,
            "type": "Algebra",
            "solution": f"$\\boxed{{{n}}}$",
            "answer": str(n),
        }
        for n, it in enumerate(levels)
    ]
    for name, rows in (("hops", hops), ("math", problems)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def draw(each: int) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(SCRIPTS / "tasks.py"),
            str(tmp_path / "tasks.jsonl"),
            "--each",
            str(each),
        ]
        command += ["--hotpotqa", f"hf:{tmp_path / 'hops'}::train?scorer=exact&split=all"]
        command += ["--math", f"hf:{tmp_path / 'math'}::train?scorer=math&split=all"]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    done = draw(3)
    assert done.returncode == 0, done.stderr
    tasks = load_tasks(tmp_path / "tasks.jsonl")
    assert [(it.family, it.scorer) for it in tasks] == [("hotpotqa", "exact")] * 3 + [("math", "math")] * 6
    assert [it.level in ("Level 2", "Level 3") for it in tasks[3:]] == [True] * 3 + [False] * 3
    assert all(it.level in ("Level 4", "Level 5") for it in tasks[6:])
    assert all(it.split == "train" and not it.meta for it in tasks)
    few = draw(5)
    assert few.returncode == 1 and "HotpotQA has 4 questions of 5" in few.stderr
