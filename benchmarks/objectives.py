"""Which objective makes the better student of the same trajectories, steps and examples a step?

The offline expert solves the quick start's training tasks four times each and errs often, so that the
filter leaves right trajectories to learn from and wrong ones to hold against them. Every row is one student,
trained for the same number of steps on the same batches; a row with negatives or a teacher computes more in
each step, which stands in its seconds. What comes before the first step does not: the reference of DPO and
the local teacher, which is the same base model, trained four times as long by cross-entropy. DPO has the
cross-entropy beside it (RPO): by itself it teaches nobody to begin. As it is meant for students that can act
already, two rows go on from the SFT student, by DPO and, to compare, by cross-entropy. All are tested on the
same tasks; accuracy with 95% Wilson intervals, and the paired difference to SFT of the same seed. The seed
sets the adapter's first values and the order of the batches; what it moves stands in no interval, so
``--seeds 3`` trains every student three times, and the last lines give the mean of each row and each seed's.
So does the precision, which is the machine's (bfloat16 where it is fast): compare rows of one machine.

A teacher that is a program, tasks that tools solve: the order of rows within their intervals says nothing.
Sized for one to two hours on two cores a seed; ``--quick`` takes some minutes and shows only that it runs.
What is finished is kept, so the script can be stopped, and ``--only aft,dpo`` runs it in parts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from agentkd.agent_config import AgentConfig
from agentkd.collect import CollectConfig, collect
from agentkd.distill import DistillConfig, distill
from agentkd.evaluate import SystemResult, paired_difference, run_evaluation
from agentkd.filter import FilterConfig, filter_run
from agentkd.pipeline import expert_endpoint
from agentkd.record import load_tasks, provenance, write_jsonl
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.system import open_system
from agentkd.task import Task
from agentkd.taskset import load_taskset
from agentkd.trajectory import Trajectory


class Size(NamedTuple):
    """How large a run is."""

    train: dict[str, int]
    """Tasks by taskset."""
    test: dict[str, int]
    steps: int
    """Of each student; the teacher has four times as many."""
    batch: int


FULL = Size(
    {
        "gym:products": 30,
        "gym:chain_sum": 30,
        "gym:lcm": 30,
        "gym:calendar_arithmetic": 60,
        "almanac:hops=2": 90,
    },
    {
        "gym:products": 24,
        "gym:chain_sum": 24,
        "gym:lcm": 24,
        "gym:calendar_arithmetic": 24,
        "almanac:hops=2": 40,
    },
    steps=24,
    batch=4,
)
QUICK = Size({"gym:products,lcm": 16}, {"gym:products,lcm": 4}, steps=3, batch=2)

ROWS: dict[str, dict[str, Any]] = {
    "sft": {},
    "span-weights": {"weights": {"thought": 0.5, "action": 1.0, "final_answer": 2.0}},
    "masked": {"objective": "masked"},
    "aft": {"objective": "aft"},
    "dpo": {"objective": "dpo", "sft_weight": 1.0},
    "gkd": {"objective": "jsd"},
    "taid": {"objective": "taid"},
    "sft-longer": {"parent": "sft"},
    "dpo-after-sft": {"parent": "sft", "objective": "dpo", "sft_weight": 1.0, "learning_rate": 1e-4},
}
"""Settings of each student beyond the common ones. The last two train the first for as many steps again."""


def tasks_of(parts: dict[str, int], split: str, folder: Path) -> tuple[list[Task], Path]:
    """The tasks of a split and the file of their passages, made once."""
    tasks, passages = folder / f"{split}.jsonl", folder / f"{split}-passages.jsonl"
    if not tasks.is_file():
        sets = [load_taskset(name, split, n, 0) for name, n in parts.items()]
        write_jsonl(passages, [passage for each in sets for passage in each.passages])
        write_jsonl(tasks, [task for each in sets for task in each.tasks])
    return load_tasks(tasks), passages


def trajectories(size: Size, out: Path) -> Path:
    """Right and wrong trajectories of the expert; the folder of the filter."""
    _, passages = tasks_of(size.train, "train", out)
    with expert_endpoint(seed=0, error_rate=0.3) as url:
        config = CollectConfig(
            tasks=str(out / "train.jsonl"),
            corpus=passages if passages.stat().st_size else None,
            agent=AgentConfig(model="offline-expert", api_base=url, search_k=2),
            samples=4,
            temperatures=(0.0, 0.7, 0.7, 0.7),
        )
        collect(config, out / "collected")
    filter_run(out / "collected", out / "kept", FilterConfig())
    return out / "kept"


def local_teacher(size: Size, kept: Path, out: Path) -> Path:
    """The base model trained four times as long, its adapter merged, as a model folder."""
    import torch

    from agentkd.engine.student import load_student
    from agentkd.engine.torch_engine import merge_adapter
    from agentkd.engine.weights import load_model, load_tokenizer, resolve_model

    folder = out / "teacher"
    if not (folder / "config.json").is_file():
        config = DistillConfig(steps=4 * size.steps, batch_size=size.batch, replays=0)
        distill(kept / "kept.jsonl", out / "students" / "teacher", config)
        student = load_student(out / "students" / "teacher")
        base = resolve_model(student.base)
        partial = out / "teacher.partial"
        shutil.rmtree(partial, ignore_errors=True)
        merge_adapter(load_model(base, torch.float32), student.adapter).to(torch.bfloat16).save_pretrained(
            partial
        )
        load_tokenizer(base).save_pretrained(partial)
        partial.replace(folder)
    return folder


def student_folder(name: str, seed: int) -> str:
    """The name of a row's student; there is one teacher."""
    return f"{name}-{seed}" if seed and name != "teacher" else name


def settings_of(name: str, seed: int, size: Size, kept: Path, out: Path) -> DistillConfig:
    """The settings of a row's student."""
    extra = dict(ROWS[name])
    if "parent" in extra:
        extra["parent"] = str(out / "students" / student_folder(extra["parent"], seed))
    if extra.get("objective") in ("aft", "dpo"):
        extra["negatives"] = str(kept / "dropped.jsonl")
    if extra.get("objective") in ("jsd", "taid"):
        extra["teacher"] = str(local_teacher(size, kept, out))
    common = {"steps": size.steps, "batch_size": size.batch, "replays": 0, "seed": seed}
    return DistillConfig(**{**common, **extra})


def evaluated(name: str, size: Size, out: Path) -> tuple[SystemResult, list[Trajectory]]:
    """A student on the test tasks."""
    from agentkd.record import iter_jsonl
    from agentkd.retrieval import Passage

    tasks, passages = tasks_of(size.test, "test", out)
    found = list(iter_jsonl(passages, Passage))

    @contextmanager
    def source() -> Iterator[tuple[AgentConfig, Any]]:
        with open_system(str(out / "students" / name), max_tokens=200) as system:
            yield system.config.model_copy(update={"search_k": 2}), system.model

    retriever = BM25Retriever(found) if found else None
    return run_evaluation(name, tasks, source, out / "evaluate" / name, retriever=retriever)


def row(name: str, seed: int, size: Size, kept: Path, out: Path) -> tuple[dict[str, float], list[Trajectory]]:
    """Train and test one student."""
    folder = student_folder(name, seed)
    if name != "teacher":
        distill(kept / "kept.jsonl", out / "students" / folder, settings_of(name, seed, size, kept, out))
    result, runs = evaluated(folder, size, out)
    summary = json.loads((out / "students" / folder / "student.json").read_text(encoding="utf-8"))["training"]
    cell = result.overall
    return {
        "accuracy": cell.accuracy,
        "low": cell.low,
        "high": cell.high,
        "n": cell.n,
        "seconds": summary["seconds"],
    }, runs


def over_seeds(metrics: dict[str, float], names: list[str], seeds: range) -> dict[str, float]:
    """The mean of what the seeds measured, printed with each one's."""
    found: dict[str, float] = {}
    for name in names:
        for what in ("accuracy", "minus_sft"):
            values = [metrics[key] for k in seeds if (key := f"{name}:{k}:{what}") in metrics]
            if values:
                found[f"{name}:{what}"] = round(statistics.mean(values), 3)
                span = " ".join(
                    f"{value:+.1%}" if what == "minus_sft" else f"{value:.1%}" for value in values
                )
                print(
                    f"{name:13} {what:9} mean {statistics.mean(values):+.1%} of {len(values)} seeds: {span}"
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between them")
    parser.add_argument("--seeds", type=int, default=1, help="how often each student is trained")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first time")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-objectives"))
    options = parser.parse_args()
    began, size = time.monotonic(), QUICK if options.quick else FULL
    out = options.out / ("quick" if options.quick else "full")
    names = [name for name in ROWS if name in options.only.split(",")]
    kept = trajectories(size, out)
    metrics: dict[str, float] = {}
    n = 0
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed in seeds:
        runs: dict[str, list[Trajectory]] = {}
        teacher = ["teacher"] if seed == seeds[0] and {"gkd", "taid"} & set(names) else []
        for name in [*names, *teacher]:
            figures, runs[name] = row(name, seed, size, kept, out)
            n, key = int(figures["n"]), f"{name}:{seed}"
            metrics |= {
                f"{key}:{what}": round(figures[what], 3) for what in ("accuracy", "low", "high", "seconds")
            }
            against = ""
            if name != "sft" and "sft" in runs:
                less = paired_difference(runs[name], runs["sft"])
                metrics[f"{key}:minus_sft"] = round(less.mean, 3)
                against = f"  {less.mean:+.1%} [{less.low:+.0%}, {less.high:+.0%}] to SFT"
            print(
                f"{seed} {name:13} {figures['accuracy']:6.1%} [{figures['low']:.0%}, {figures['high']:.0%}] "
                f"of {n}, trained {figures['seconds']:.0f} s{against}",
                flush=True,
            )
    metrics |= over_seeds(metrics, names, seeds)
    metrics["seconds"] = round(time.monotonic() - began)
    line = {
        "name": "objectives",
        "metrics": metrics,
        "n": n,
        "runs": options.seeds,
        "commit": provenance()["commit"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
