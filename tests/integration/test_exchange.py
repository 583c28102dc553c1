"""Imported trajectories go the same way as collected ones: filtered, distilled; and the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentkd.distill import distill
from agentkd.exchange import export_run, import_run
from agentkd.filter import filter_run
from agentkd.record import read_json, read_trajectories
from tests.integration.test_distill import base, settings
from tests.unit.test_exchange import DATA, samples

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("atif")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

__all__ = ["base"]  # the fixture

ROOT = Path(__file__).parents[2]
SET = ROOT / "trajectories" / "almanac"


def agentkd(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agentkd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("name", ["react", "reference", "atif"])
def test_what_was_imported_is_filtered_and_distilled(name: str, base: Path, tmp_path: Path) -> None:
    """Without what travels beside: as if others had written it."""
    export_run(SET, tmp_path / "x.jsonl", name, plain=True)
    import_run(tmp_path / "x.jsonl", tmp_path / "run", name)
    kept = filter_run(tmp_path / "run", tmp_path / "kept").kept
    ours = filter_run(SET, tmp_path / "ours").kept
    assert [item.task.question for item in kept] == [item.task.question for item in ours]
    student = distill(
        tmp_path / "kept" / "kept.jsonl",
        tmp_path / "student",
        settings(base, steps=2, save_every=10, max_length=2000),
    )
    assert [json.loads(tool)["name"] for tool in student.tools] == ["search"]
    assert "search(query)" in student.system_prompt


def test_recorded_data_of_others_is_distilled(base: Path, tmp_path: Path) -> None:
    source = DATA / "qa_musique_decomposition_100.jsonl"
    if not source.is_file():
        pytest.skip(f"no recorded data at {DATA}; set AGENTKD_SHARED_DATA")
    import_run(source, tmp_path / "run", "steps")
    assert len(filter_run(tmp_path / "run", tmp_path / "kept").kept) == 100
    student = distill(
        tmp_path / "kept" / "kept.jsonl",
        tmp_path / "student",
        settings(base, steps=2, save_every=10, max_length=4000),
    )
    assert "search(query)" in student.system_prompt


def test_the_commands(tmp_path: Path) -> None:
    done = agentkd("export", SET, "--format", "chat", "--out", tmp_path / "x.jsonl", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert (figures["exported"], figures["lost"]) == (120, {})
    assert figures["beside"]["task.meta"] == 120
    done = agentkd("import", tmp_path / "x.jsonl", "--format", "chat", "--out", tmp_path / "run")
    assert done.returncode == 0 and "120 trajectories of 120 tasks" in done.stdout
    assert read_trajectories(tmp_path / "run" / "trajectories.jsonl") == read_trajectories(
        SET / "trajectories.jsonl"
    )
    done = agentkd("merge", tmp_path / "run", SET, "--out", tmp_path / "both", "--any-settings", "--json")
    assert json.loads(done.stdout) == {
        "out": str(tmp_path / "both"),
        "trajectories": 120,
        "correct": read_json(SET / "manifest.json")["counts"]["correct"],
        "duplicates": 120,
        "missing_shards": [],
        "missing_tasks": 0,
        "logged": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["export", SET, "--format", "nothing", "--out", "OUT"], 2, "Unknown format"),
        (["export", "nothing.jsonl", "--format", "chat", "--out", "OUT/x.jsonl"], 3, "There is no file"),
        (["import", ROOT / "README.md", "--format", "atif", "--out", "OUT"], 3, "line 1: not JSON"),
        (["merge", ROOT, "--out", "OUT"], 3, "is not a run"),
        (["collect", "--tasks", "gym:lcm", "--api-base", "http://127.0.0.1:9/v1", "--model", "m", "--sandbox",
          "local", "--shard", "9/8", "--out", "OUT"], 2, "not a shard"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(arguments: list[object], code: int, said: str, tmp_path: Path) -> None:
    done = agentkd(*(str(item).replace("OUT", str(tmp_path / "out")) for item in arguments))
    assert done.returncode == code
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_samples_of_every_kind_go_through_the_filter(tmp_path: Path) -> None:
    from agentkd.record import write_jsonl

    write_jsonl(tmp_path / "trajectories.jsonl", samples())
    export_run(tmp_path, tmp_path / "x.parquet", "datasets")
    import_run(tmp_path / "x.parquet", tmp_path / "run", "datasets")
    assert [item.id for item in filter_run(tmp_path / "run", tmp_path / "kept").kept] == ["t#1"]
