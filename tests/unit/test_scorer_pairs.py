"""The scorers on labelled pairs, and on what breaks graders.

The labels were fixed before the scorers were written; the counts are pinned, so that a change that makes
a scorer more lenient or more strict shows here.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError
from agentkd.scorer import check_scorers, score
from agentkd.scorer.workers import Workers
from agentkd.task import Task
from agentkd.trajectory import Score

PAIRS = Path(__file__).parent.parent / "data" / "scorer_pairs.jsonl"

HELD_OUT = "held_out"
"""The kind of the pairs that the scorers were not tuned on; docs/scorers.md has their first figures."""
FALSE_POSITIVES = {"numeric": 1, "math": 1}
"""42.50 cents for a gold answer 42.5 that names no unit; held out: 10 in base two for a gold answer 10."""
FALSE_NEGATIVES = {"numeric": 2, "exact": 2, "choice": 1}
"""All held out: number words, words before a number, a "yes" with a reason, an accent, "(C), not (B)"."""


def pairs(*scorers: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if not scorers or row["scorer"] in scorers]


def graded(row: dict[str, Any]) -> Score:
    meta = {**row.get("meta", {}), "aliases": row.get("aliases", [])}
    task = Task(id=row["id"], question="q", answer=row["gold"], scorer=row["scorer"], meta=meta)
    return score(task, row["answer"])


def test_there_are_pairs_of_every_kind() -> None:
    rows = pairs()
    assert len(rows) >= 700
    assert len({row["id"] for row in rows}) == len(rows)
    kinds = Counter(row["kind"] for row in rows)
    for kind in (
        "percent_factor_100",
        "unordered_set",
        "interval",
        "fraction",
        "units",
        "negative_zero",
        "empty",
    ):
        assert kinds[kind] >= 5, kind


def test_false_positives_and_false_negatives() -> None:
    pytest.importorskip("math_verify")
    rows = pairs()
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(graded, rows))
    wrong = [(row, got) for row, got in zip(rows, verdicts, strict=True) if got.correct != row["correct"]]
    said = Counter(row["scorer"] for row, got in wrong if got.correct)
    missed = Counter(row["scorer"] for row, got in wrong if not got.correct)
    assert (said, missed) == (FALSE_POSITIVES, FALSE_NEGATIVES), [row["id"] for row, _ in wrong]
    hung = [got for row, got in zip(rows, verdicts, strict=True) if row["kind"] == "hang"]
    assert any(got.value is None and "CPU seconds" in got.reason for got in hung)


@pytest.mark.parametrize("scorer", ["exact", "numeric", "f1", "math", "choice"])
@pytest.mark.parametrize(
    "answer", ["7" * 1_000_000, "\\frac{" * 200_000, "\x00", "\ud800", "nan", "$" * 5000]
)
def test_what_no_answer_looks_like(scorer: str, answer: str) -> None:
    if scorer == "math":
        pytest.importorskip("math_verify")
    began = time.process_time()
    got = score(Task(id="1", question="q", answer="7" if scorer != "choice" else "B", scorer=scorer), answer)
    assert not got.correct
    assert time.process_time() - began < 2


def test_a_hanging_comparison_is_an_error_and_the_next_one_is_graded() -> None:
    pytest.importorskip("math_verify")
    workers = Workers(1, cpu_seconds=1)
    try:
        hung = workers.ask({"gold": "2", "answer": "9^{9^{9^{9^9}}}"})
        assert hung.value is None
        assert hung.problem
        after = workers.ask({"gold": "\\frac{1}{2}", "answer": "2/4"})
        assert (after.value, after.problem) == (True, None)
    finally:
        workers.close()
    assert not workers._alive


def test_a_comparison_has_its_memory_and_no_more() -> None:
    pytest.importorskip("math_verify")
    limit = 256 << 20
    workers = Workers(1, cpu_seconds=20, memory=limit)
    try:
        greedy = workers.ask({"gold": "2", "answer": "2^{8000000000}"})  # a number of a gigabyte
        assert not greedy.value
        assert "CPU seconds" not in (greedy.problem or "")
        for worker in workers._alive:
            said = Path(f"/proc/{worker.pid}/status").read_text(encoding="utf-8")
            peak = next(line.split()[1] for line in said.splitlines() if line.startswith("VmPeak"))
            assert int(peak) << 10 <= limit
        assert workers.ask({"gold": "\\frac{1}{2}", "answer": "2/4"}).value is True
    finally:
        workers.close()


def test_an_interrupted_comparison_leaves_no_verdict_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    workers = Workers(1)
    real = workers._exchange

    def interrupted(worker: Any, request: dict[str, Any]) -> Any:
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        raise KeyboardInterrupt

    try:
        monkeypatch.setattr(workers, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workers.ask({"gold": "x", "answer": "x"})
        monkeypatch.setattr(workers, "_exchange", real)
        assert workers.ask({"gold": "x", "answer": "y"}).value is False
    finally:
        workers.close()


CODE = Task(
    id="1", question="Write f.", scorer="code", meta={"tests": ["assert f(2) == 4", "assert f(-3) == 9"]}
)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("def f(x):\n    return x * x", 1.0),
        ("Here it is:\n```python\ndef f(x):\n    return x ** 2\n```", 1.0),
        ("def f(x):\n    return 4", 0.0),
        ("def f(x:", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("raise SystemExit", 0.0),
        ("", 0.0),
    ],
)
def test_code_by_tests(answer: str, wanted: float) -> None:
    assert score(CODE, answer).value == wanted


def test_code_without_tests_is_not_scored() -> None:
    assert score(CODE.model_copy(update={"meta": {}}), "pass").value is None


def test_a_judge_is_asked_afterwards() -> None:
    got = score(Task(id="1", question="q", answer="a", scorer="judge"), "a")
    assert got.value is None
    assert "agentkd score" in got.reason


def test_a_missing_library_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="math-verify"):
        check_scorers([Task(id="1", question="q", scorer="math")])
