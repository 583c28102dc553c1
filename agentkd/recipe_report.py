"""The report of a recipe: what its stages left in the run folder, on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentkd.evaluate import SystemResult, overlaps
from agentkd.filter import Filtered
from agentkd.recipe import Recipe
from agentkd.record import provenance, read_trajectories
from agentkd.run_report import (
    differences_from,
    examples_of,
    paper_rows,
    tool_use_of,
    training_losses,
    write_viewer,
)
from agentkd.task import Task
from agentkd.trajectory import Trajectory

__all__ = ["BASE", "next_steps", "report_recipe", "student_folder"]

BASE = "base"
"""What the untrained model is called in tables."""


def student_folder(out: Path, name: str) -> Path:
    """Where a recipe's student lies."""
    return out / "students" / name.replace(" ", "-")


def report_recipe(
    recipe: Recipe,
    out: Path,
    train: Sequence[Task],
    test: Sequence[Task],
    kept: dict[str, Filtered],
    runs: dict[str, tuple[SystemResult, list[Trajectory]]],
    served: dict[str, str] | None,
) -> Path:
    """Write the report page of a finished run; the path of the page.

    Args:
        recipe: what was run.
        out: folder of the run.
        train, test: tasks that were learnt from, and those held out.
        kept: what the filter kept, by the kind of teacher.
        runs: figures and trajectories, by system.
        served: question and answer of the served student, where it was asked.
    """
    from agentkd.report import write_report

    main = _main(recipe, list(runs))
    made = {label: trajectories for label, (_, trajectories) in runs.items()}
    results = [result for result, _ in runs.values()]
    folders = {label: out / "evaluate" / label.replace(" ", "-") for label in runs}
    return write_report(
        out / "report",
        title=recipe.title,
        results=results,
        differences=differences_from(main, made),
        collection={kind: _collection(out, kind, filtered) for kind, filtered in kept.items()},
        losses={name: training_losses(student_folder(out, name)) for name in recipe.students},
        config=recipe.model_dump(mode="json"),
        versions=provenance()["versions"],
        notes=[*recipe.notes, _overlap(train, test)],
        served=served,
        next_steps=next_steps(recipe, out),
        examples=examples_of(made[main]),
        tool_use={label: tool_use_of(trajectories) for label, trajectories in made.items()},
        published=paper_rows(results, [student.base for student in recipe.students.values()]),
        viewer=write_viewer(out / "report", list(folders.values()), folders[main]),
    )


def _main(recipe: Recipe, labels: Sequence[str]) -> str:
    """The system that the others are compared with: the last agent, else the last student."""
    agents = [name for name, student in recipe.students.items() if student.kind == "agent" and name in labels]
    others = [label for label in labels if label != BASE]
    return (agents or others or list(labels))[-1]


def _overlap(train: Sequence[Task], test: Sequence[Task]) -> str:
    kinds = Counter(item.kind for item in overlaps(train, test))
    return (
        f"Of {len(test)} test questions {kinds['exact']} stand among the training questions as they are, "
        f"{kinds['numbers']} with other numbers (as in families made from a template), and {kinds['near']} "
        "share half of their 5-grams with one."
    )


def _collection(out: Path, kind: str, filtered: Filtered) -> dict[str, Any]:
    collected = read_trajectories(out / f"collect-{kind}" / "trajectories.jsonl")
    return {
        "collected": len(collected),
        "correct": sum(item.correct for item in collected),
        "kept": len(filtered.kept),
        "dropped": dict(filtered.reasons),
    }


def next_steps(recipe: Recipe, out: Path) -> list[str]:
    name = next((name for name, student in recipe.students.items() if student.kind == "agent"), None)
    served = student_folder(out, name) if name else out / "students"
    return [
        f"agentkd serve {served} --port 8000",
        "# a real teacher (any OpenAI-compatible endpoint, for instance vLLM on a GPU machine):",
        "vllm serve Qwen/Qwen2.5-32B-Instruct --port 8001",
        "agentkd collect --api-base http://127.0.0.1:8001/v1 --model Qwen/Qwen2.5-32B-Instruct "
        "--tasks tasks.jsonl --corpus passages.jsonl --out runs/mine",
        "agentkd filter runs/mine --out runs/mine/kept",
        "# a larger student; a GPU is used when there is one:",
        "agentkd distill runs/mine/kept/kept.jsonl --base Qwen/Qwen2.5-0.5B-Instruct --lr 2e-4 --rank 64 "
        "--max-length 4096 --out student",
    ]
