"""Evaluation: run a system on held-out tasks (:mod:`.run`), and say what it adds up to (:mod:`.figures`)."""

from agentkd.evaluate.figures import (
    Cell,
    PairedDifference,
    SystemResult,
    comparison_table,
    contamination,
    latest_runs,
    paired_difference,
    summarise,
    wilson,
)
from agentkd.evaluate.run import run_evaluation

__all__ = [
    "Cell",
    "PairedDifference",
    "SystemResult",
    "comparison_table",
    "contamination",
    "latest_runs",
    "paired_difference",
    "run_evaluation",
    "summarise",
    "wilson",
]
