"""The benchmark of the server runs, and its figures are there; whether they are good is not asked here."""

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
def test_the_benchmark_of_the_server_measures_what_it_says() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    metrics = json.loads(last)["metrics"]
    assert {"added_ms_p50", "added_ms_per_step", "stream_added_first_token_ms_p50"} <= set(metrics)
    assert all(value > 0 for name, value in metrics.items() if "added" not in name), metrics
    assert metrics["added_ms_per_step"] > 0, "a sandboxed action takes time"
    judged = [line for line in table if "(bar:" in line]
    assert len(judged) == 2 and all("PASS" in line or "FAIL" in line for line in judged)
