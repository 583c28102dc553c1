"""Recorded trajectories of others: imported, scored, compared with what their makers say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agentkd.evaluate.rescore import rescore
from agentkd.exchange import import_run
from agentkd.record import read_trajectories

SHARED = Path(os.environ.get("AGENTKD_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")

SETS = {
    "math_gsm8k_human_calc_1000": ("numeric", 1000, 1000),
    "math_mathcoder70b_svamp_600": ("numeric", 600, 504),
    "qa_2wiki_evidence_500": ("exact", 500, 500),
    "qa_musique_decomposition_100": ("exact", 100, 100),
    "qa_reflexion_gpt3_react_hotpot": ("exact", 226, 60),
}
"""Scorer, rows, and how many of them their makers call correct."""


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_recorded_set_is_scored_as_its_makers_did(name: str, tmp_path: Path) -> None:
    source = SHARED / "recorded" / f"{name}.jsonl"
    if not source.is_file():
        pytest.skip(f"no {source}")
    scorer, rows, correct = SETS[name]
    done = import_run(source, tmp_path / "run", "steps", scorer=scorer)
    assert (done.count, done.correct, done.unscored) == (rows, correct, 0)
    theirs = [json.loads(line)["correct"] for line in source.read_text(encoding="utf-8").splitlines()]
    ours = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    assert [run.id for run, label in zip(ours, theirs, strict=True) if run.correct != label] == []
    found, _ = rescore(tmp_path / "run", "f1")
    assert found.n == rows
