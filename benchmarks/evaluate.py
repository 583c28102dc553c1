"""Do the scorers lie, how fast are they, and what does an expression that hangs cost?

The labelled pairs of ``tests/data/scorer_pairs.jsonl`` (answer, gold answer, scorer, label; fixed before the
scorers were written, those of kind ``held_out`` after) are scored by agentkd and, those of mathematics, by
math-verify as it is used alone: in this process, with its own time limits. Then a stream of ordinary
comparisons is graded with and without
expressions that never end: each should cost its time limit in one worker, and nothing else.

About two minutes on two cores; ``--quick`` takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from agentkd.record import provenance
from agentkd.scorer import score
from agentkd.scorer.workers import CPU_SECONDS, Workers
from agentkd.task import Task

PAIRS = Path(__file__).parent.parent / "tests" / "data" / "scorer_pairs.jsonl"
HANGS = ("9^{9^{9^{9^9}}}", "10^{10^{10^{10}}}", "2^{2^{2^{2^{2^{2^2}}}}}", "3^{3^{3^{3^3}}}")


class Verdicts(NamedTuple):
    """What a grader said of the pairs."""

    false_positives: int
    false_negatives: int
    seconds: float


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    tasks = [_task(row) for row in rows]
    score(tasks[-1], "x^2+1")  # a worker is started before anything is timed

    print(f"{'scorer':22} {'pairs':>6} {'false +':>8} {'false -':>8} {'pairs/s':>9}")
    total = Counter[str]()
    for name in ("exact", "numeric", "f1", "choice", "math"):
        mine = [(row, task) for row, task in zip(rows, tasks, strict=True) if row["scorer"] == name]
        found = _verdicts(mine, lambda task, answer: score(task, answer).correct)
        total.update(fp=found.false_positives, fn=found.false_negatives)
        _show(name, len(mine), found)
    maths = [
        (row, task)
        for row, task in zip(rows, tasks, strict=True)
        if row["scorer"] == "math" and row["kind"] != "hang"
    ]
    peer = _verdicts(maths, _math_verify)
    _show("math-verify alone *", len(maths), peer)
    print("* without the pairs that hang: it may only be interrupted by a signal in the main thread")

    throughput = _throughput(200 if quick else 2000)
    print(f"\n{throughput:8.0f} comparisons of fractions a second, 4 threads, worker processes")
    runs = 1 if quick else 3
    alone, with_hangs, per_hang = _hanging(40 if quick else 200, runs)
    print(f"{alone:8.2f} s for ordinary comparisons alone, {with_hangs:.2f} s with one that hangs among them")
    print(f"{per_hang:8.2f} s a hanging expression costs (its limit is {CPU_SECONDS} CPU seconds)")
    metrics = {
        "false_positives": total["fp"],
        "false_negatives": total["fn"],
        "n_pairs": len(rows),
        "peer_false_positives": peer.false_positives,
        "peer_false_negatives": peer.false_negatives,
        "comparisons_per_s": round(throughput, 1),
        "hang_s": round(per_hang, 2),
        "hang_limit_cpu_s": CPU_SECONDS,
    }
    commit = provenance()["commit"]
    print(
        json.dumps({"name": "evaluate", "metrics": metrics, "n": len(rows), "runs": runs, "commit": commit})
    )


def _task(row: dict[str, Any]) -> Task:
    meta = {**row.get("meta", {}), "aliases": row.get("aliases", [])}
    return Task(id=row["id"], question="q", answer=row["gold"], scorer=row["scorer"], meta=meta)


def _verdicts(pairs: Sequence[tuple[dict[str, Any], Task]], grade: Callable[[Task, str], bool]) -> Verdicts:
    began = time.perf_counter()
    wrong = Counter[bool]()
    for row, task in pairs:
        said = grade(task, row["answer"])
        if said != row["correct"]:
            wrong[said] += 1
    return Verdicts(wrong[True], wrong[False], time.perf_counter() - began)


def _math_verify(task: Task, answer: str | None) -> bool:
    """As its documentation shows it; an answer counts that is right as it stands or as LaTeX."""
    from math_verify import parse, verify

    gold = parse(f"${task.answer}$")
    return any(verify(gold, parse(text)) for text in (answer or "", f"${answer or ''}$"))


def _show(name: str, n: int, found: Verdicts) -> None:
    rate = n / max(found.seconds, 1e-9)
    print(f"{name:22} {n:6} {found.false_positives:8} {found.false_negatives:8} {rate:9.0f}")


def _requests(n: int) -> list[dict[str, str]]:
    return [{"gold": f"\\frac{{{i}}}{{7}}", "answer": f"{2 * i}/14"} for i in range(1, n + 1)]


def _throughput(n: int) -> float:
    workers = Workers()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(workers.ask, _requests(16)))
        began = time.perf_counter()
        replies = list(pool.map(workers.ask, _requests(n)))
        seconds = time.perf_counter() - began
    workers.close()
    assert all(reply.value for reply in replies)
    return n / seconds


def _hanging(n: int, runs: int) -> tuple[float, float, float]:
    """Median seconds of n comparisons in one worker, the same with one hanging, and of the hanging one."""
    alone, mixed, costs = [], [], []
    for run in range(runs):
        workers = Workers(1)
        workers.ask(_requests(1)[0])
        began = time.perf_counter()
        assert all(workers.ask(request).value for request in _requests(n))
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        for place, request in enumerate(_requests(n)):
            if place == n // 2:
                start = time.perf_counter()
                assert workers.ask({"gold": "2", "answer": HANGS[run % len(HANGS)]}).problem
                costs.append(time.perf_counter() - start)
            assert workers.ask(request).value
        mixed.append(time.perf_counter() - began)
        workers.close()
    return statistics.median(alone), statistics.median(mixed), statistics.median(costs)


if __name__ == "__main__":
    main()
