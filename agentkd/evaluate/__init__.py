"""Evaluation: run a system on held-out tasks (:mod:`.run`), and say what it adds up to (:mod:`.figures`)."""

from agentkd.evaluate.compare import Comparison, StepAgreement, compare_runs, step_agreement
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
from agentkd.evaluate.measures import Calibration, Measures, calibration, measure, pass_at_k
from agentkd.evaluate.overlap import Overlap, overlaps
from agentkd.evaluate.run import run_evaluation

__all__ = [
    "Calibration",
    "Cell",
    "Comparison",
    "Measures",
    "Overlap",
    "PairedDifference",
    "StepAgreement",
    "SystemResult",
    "calibration",
    "compare_runs",
    "comparison_table",
    "contamination",
    "latest_runs",
    "measure",
    "overlaps",
    "paired_difference",
    "pass_at_k",
    "run_evaluation",
    "step_agreement",
    "summarise",
    "wilson",
]
