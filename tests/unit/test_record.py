from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentkd.errors import ConfigError, DataError, StorageError, boundary
from agentkd.record import AppendLog, load_tasks, read_trajectories, write_jsonl, write_manifest
from agentkd.task import Task
from agentkd.trajectory import StopReason, Trajectory


def trajectory(name: str) -> Trajectory:
    task = Task(id=name, question="q", answer="a")
    return Trajectory(
        id=f"{name}#0", task=task, model="m", system_prompt="s", stop_reason=StopReason.FINAL_ANSWER
    )


def test_a_written_record_is_read_back_equal(tmp_path: Path) -> None:
    records = [trajectory("a"), trajectory("ü\u2028\U0001f600")]
    assert write_jsonl(tmp_path / "t.jsonl", records) == 2
    assert read_trajectories(tmp_path / "t.jsonl") == records


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"id": "1", "question": "q"}\n{"id": "2"}\n', "line 2: question"),
        (b'{"id": "1", "question": "q"}\nnot json\n', "line 2"),
        (b'{"id": "1", "question": "q"}\n\xff\xfe\n', "line 2: not UTF-8"),
        (b'{"id": "1", "question": "q", "colour": 3}\n', "colour"),
        (b"[1, 2]\n", "line 1"),
        (b"", "no tasks"),
        (b'{"id": "1", "question": "q"}\n{"id": "1", "question": "r"}\n', "twice"),
    ],
)
def test_a_bad_task_file_names_the_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tasks(path)
    assert said in str(caught.value)
    assert caught.value.hint


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        load_tasks(tmp_path / "nothing.jsonl")


def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with AppendLog(path) as log:
        log.append(trajectory("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(read_trajectories(path)) == 1
    with AppendLog(path) as log:
        log.append(trajectory("b"))
    assert [item.task.id for item in read_trajectories(path)] == ["a", "b"]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"id": ' + b"x" * 200_000)
    AppendLog(path).close()
    assert path.read_bytes() == b""


def test_a_second_writer_is_refused_and_the_lock_dies_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    hold = (
        "import sys, time; from pathlib import Path; from agentkd.record import AppendLog;"
        "log = AppendLog(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="Another process"):
            AppendLog(path)
    finally:
        owner.kill()
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
    AppendLog(path).close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error() -> None:
    with (
        pytest.raises(StorageError, match="No space left"),
        boundary(DataError, "writing"),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_the_published_schema_is_the_models(request: pytest.FixtureRequest) -> None:
    published = json.loads((request.config.rootpath / "docs" / "trajectory.schema.json").read_text())
    assert published == Trajectory.model_json_schema(), "run: python docs/make_schema.py"


def test_a_manifest_names_files_of_its_folder_wherever_that_lies(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "tasks.jsonl"
    run.mkdir()
    (run / "kept.jsonl").write_text("{}\n")
    other.write_text("{}\n")
    write_manifest(run, stage="filter", config={}, counts={}, inputs=[run / "kept.jsonl", other])
    assert list(json.loads((run / "manifest.json").read_text())["inputs"]) == ["kept.jsonl", str(other)]
