"""The soak test at the size of a gate: many clients, some of which hang up, and an engine that is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_under_load_every_answer_is_right_or_says_that_it_failed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])["metrics"]
    assert (metrics["wrong_answers"], metrics["failed_dishonestly"]) == (0, 0), done.stdout
    assert metrics["engine_kills"] == 2
    assert metrics["right_answers"] > 200, "there was something to be right about"
    assert metrics["hung_up"] > 5
    assert metrics["memory_growth_mib"] < 64
    assert (metrics["processes_left"], metrics["exit_code"]) == (0, 0)
