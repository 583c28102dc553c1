"""The training questions of arXiv 2505.17612, from the Hugging Face hub into one ``tasks.jsonl``.

1,000 of HotpotQA (train), 1,000 of MATH of levels 2 and 3, and 1,000 of levels 4 and 5, drawn with a seed:
other ones than the paper's. MATH is a copy without the 500 questions of MATH-500, which is a test set.

    python examples/paper/tasks.py tasks.jsonl [--each 1000] [--seed 1] [--hotpotqa SPEC] [--math SPEC]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agentkd import Task, load_taskset
from agentkd.errors import AgentkdError, DataError
from agentkd.record import write_jsonl

HOTPOTQA = "hf:hotpotqa/hotpot_qa:distractor:train?scorer=exact&split=all"
MATH = "hf:rasbt/math_full_minus_math500::train?scorer=math&split=all"
LEVELS = (("2", "3"), ("4", "5"))


def plain(task: Task, family: str) -> Task:
    """Without the columns that nobody needs, such as HotpotQA's ten passages."""
    return task.model_copy(update={"family": family, "split": "train", "meta": {}})


def questions(hotpotqa: str, math: str, each: int, seed: int) -> list[Task]:
    """So many of HotpotQA, and of each pair of MATH's levels ("Level 2" as in MATH).

    Raises:
        DataError: a set is too small.
    """
    found = {"HotpotQA": [plain(it, "hotpotqa") for it in load_taskset(hotpotqa, "all", each, seed)]}
    problems = load_taskset(math, "all", None, seed).tasks
    for levels in LEVELS:
        of_them = [it for it in problems if it.level.removeprefix("Level ") in levels]
        found[f"MATH, levels {levels[0]} and {levels[1]}"] = [plain(it, "math") for it in of_them[:each]]
    for name, tasks in found.items():
        if len(tasks) < each:
            raise DataError(
                f"{name} has {len(tasks)} questions of {each}.", "Name another set, or lower --each."
            )
    return [task for tasks in found.values() for task in tasks]


def main() -> None:
    """Write the file; errors are one line."""
    parser = argparse.ArgumentParser(description="The training questions of arXiv 2505.17612.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="0 takes the first of each set.")
    parser.add_argument("--hotpotqa", default=HOTPOTQA)
    parser.add_argument("--math", default=MATH)
    given = parser.parse_args()
    try:
        count = write_jsonl(given.out, questions(given.hotpotqa, given.math, given.each, given.seed))
    except AgentkdError as exc:
        sys.exit(f"Error: {exc}")
    print(f"{count} questions in {given.out}")


if __name__ == "__main__":
    main()
