"""compare, score and study on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkd.cli import app
from tests.unit.test_measures import folder, run, step


def said(*arguments: str | Path) -> Any:
    done = CliRunner().invoke(app, [str(item) for item in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    mine = [run(f"t{i}", i % 2 == 0, steps=(step(),)) for i in range(10)]
    theirs = [run(f"t{i}", True, steps=(step("final_answer(2 - 1)"),)) for i in range(10)]
    return folder(tmp_path / "a", mine, temperature=0.0), folder(tmp_path / "b", theirs, temperature=0.7)


def test_compare(runs: tuple[Path, Path]) -> None:
    found = json.loads(said("compare", *runs, "--json"))
    assert found["accuracy"]["mean"] == 0.5
    assert found["real"]["accuracy"] is True
    assert found["changed"] == {"temperature": [0.0, 0.7]}
    text = said("compare", *runs)
    assert "A real difference: +50.0 points" in text
    assert "temperature: 0.0 -> 0.7" in text


def test_score(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = json.loads(said("score", runs[0], "--scorer", "f1", "--against", "numeric", "--json"))
    assert (found["n"], found["agreement"]) == (10, 1.0)
    assert "5 of 10 correct by exact" in said(
        "score", runs[0], "--scorer", "exact", "--out", tmp_path / "new"
    )
    assert (tmp_path / "new" / "manifest.json").is_file()


def test_study_of_the_record(runs: tuple[Path, Path]) -> None:
    found = json.loads(said("study", "mismatch", runs[0], "--json"))
    assert found["unsupported"]["n"] == 10
