from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentkd.errors import ConfigError, DataError, StorageError, boundary
from agentkd.record import AppendLog, load_tasks, read_trajectories, write_json, write_jsonl, write_manifest
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


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As a disk that fills up: a write takes what fits, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def large(name: str) -> Trajectory:
    return trajectory(name).model_copy(update={"system_prompt": "x" * 50_000})


def test_a_line_that_does_not_fit_leaves_nothing_and_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    log = AppendLog(path)
    log.append(trajectory("a"))
    whole = path.read_bytes()
    with no_file_larger_than(len(whole) + 20_000), pytest.raises(StorageError, match=r"t\.jsonl") as caught:
        log.append(large("b"))
    assert caught.value.hint
    assert path.read_bytes() == whole, "what the disk took of the line is cut off"
    with pytest.raises(StorageError, match="Nothing more is written") as caught:
        log.append(trajectory("c"))  # there would be room for it again
    assert caught.value.hint
    log.close()
    assert path.read_bytes() == whole
    with AppendLog(path) as log:
        log.append(trajectory("c"))
    assert [item.task.id for item in read_trajectories(path)] == ["a", "c"]


def test_what_cannot_be_cut_off_is_cut_off_at_the_next_start(tmp_path: Path) -> None:
    class Stuck(io.FileIO):
        def truncate(self, size: int | None = None, /) -> int:
            raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "t.jsonl"
    log = AppendLog(path)
    log.append(trajectory("a"))
    log._file.close()
    log._file = Stuck(path, "ab")
    with no_file_larger_than(20_000), pytest.raises(StorageError):
        log.append(large("b"))
    with pytest.raises(StorageError, match="Nothing more is written"):
        log.append(trajectory("c"))
    log.close()
    assert path.stat().st_size == 20_000
    with AppendLog(path) as log:
        log.append(trajectory("c"))
    assert [item.task.id for item in read_trajectories(path)] == ["a", "c"]


def test_a_flush_that_failed_is_not_believed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with AppendLog(tmp_path / "t.jsonl") as log:
        with monkeypatch.context() as patch, pytest.raises(StorageError, match="Input/output error"):
            patch.setattr(os, "fsync", fails)
            log.append(trajectory("a"))
        with pytest.raises(StorageError, match="Nothing more is written"):
            log.append(trajectory("b"))


def test_a_whole_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def fsync(number: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{number}").readlink().name)
        assert not (tmp_path / "x.json").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "x.json", {"a": 1})
    assert flushed == ["x.json.partial"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


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
