"""The viewer: which runs are found, what is read of broken ones, what is served and exported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, DataError, StorageError
from agentkd.exchange import import_run
from agentkd.filter import Dropped
from agentkd.record import write_json, write_jsonl
from agentkd.trajectory import Trajectory
from agentkd.view import Viewer, export_page, open_runs
from agentkd.view.row import COLUMNS
from tests.unit.test_report import HOSTILE, make_run

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, runs: list[Trajectory], *, closed: bool = True) -> Path:
    write_jsonl(folder / "trajectories.jsonl", runs)
    if closed:
        write_json(folder / "manifest.json", {})
    return folder


def cell(row: list[Any], name: str) -> Any:
    return row[COLUMNS.index(name)]


def get(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return json.loads(answer.read())


def test_a_run_a_file_a_kept_folder_and_a_recipes_folder(tmp_path: Path) -> None:
    runs = [make_run(i, i < 2) for i in range(3)]
    write_run(tmp_path / "collect-agent", runs)
    write_run(tmp_path / "evaluate" / "base", runs[:1])
    write_jsonl(tmp_path / "kept" / "kept.jsonl", runs[:2])
    write_jsonl(tmp_path / "kept" / "dropped.jsonl", [Dropped(reason="wrong answer", trajectory=runs[2])])
    found = open_runs([tmp_path])
    assert [run.name for run in found] == ["evaluate/base", "kept", "collect-agent"]
    kept = found[1]
    assert [cell(row, "verdict") for row in kept.rows] == ["kept", "kept", "wrong answer"]
    assert kept.detail(2)["id"] == runs[2].id
    [single] = open_runs([tmp_path / "kept" / "dropped.jsonl"])
    assert (single.name, len(single.rows), single.open) == ("kept", 1, False)
    row = found[2].rows[0]
    assert [cell(row, name) for name in ("result", "steps", "tokens", "tools", "failures")] == [
        "correct", 1, 100, ["search"], [],
    ]  # fmt: skip


def test_a_run_that_is_still_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", [make_run(0, True)], closed=False)
    line = make_run(1, False).model_dump_json()
    with (folder / "trajectories.jsonl").open("a") as file:
        file.write(line[:40])
    [run] = open_runs([folder])
    assert (len(run.rows), run.problems, run.open) == (1, [], True)
    with (folder / "trajectories.jsonl").open("a") as file:
        file.write(line[40:] + "\n")
    assert run.refresh()
    assert not run.refresh()
    assert [cell(row, "result") for row in run.rows] == ["correct", "wrong"]
    write_run(folder, [make_run(5, True)])  # written anew
    run.refresh()
    assert ([cell(row, "id") for row in run.rows], run.open) == (["products-5#0"], False)


def test_a_run_without_a_finished_trajectory(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    (tmp_path / "tasks.jsonl").write_text("")
    [run] = open_runs([tmp_path])
    assert (run.rows, run.open) == ([], True)


def test_records_of_other_versions_and_broken_lines(tmp_path: Path) -> None:
    new = json.loads(make_run(0, True).model_dump_json())
    older = {**new, "schema_version": 0, "id": "old"}
    del older["usage"], older["score"]
    odd = {"steps": "none", "task": None, "id": 7, "score": {"value": "NaN"}, "stop_reason": ["x"]}
    lines = [json.dumps(older), json.dumps(odd), "{not json", '{"a": 1}', '"text"', json.dumps(new)]
    nan = json.dumps({**new, "seconds": float("nan"), "score": {"value": float("nan"), "scorer": "x"}})
    nan = nan.replace('"commit": null', '"commit": 1e999')
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([*lines, nan, '{"steps": [], "id": "\\ud800"}']))  # and no line end
    [run] = open_runs([path])
    assert [cell(row, "id") for row in run.rows] == ["old", "7", "products-0#0", "products-0#0", "\ud800"]
    assert [re.split(r"[,:]", text)[1] for text in run.problems] == [" line 3", " line 4", " line 5"]
    assert "schema version 0, an older one than 1" in run.detail(0)["note"]
    assert "does not say its version" in run.detail(1)["note"]
    assert run.detail(2)["note"] is None
    assert cell(run.rows[3], "result") == "not graded"
    assert export_page([run], tmp_path / "page.html") == 5


def test_without_gold_and_a_long_answer(tmp_path: Path) -> None:
    run = make_run(0, True)
    no_gold = run.model_copy(update={"task": run.task.model_copy(update={"answer": None}), "score": None})
    long = make_run(1, True).model_copy(update={"answer": "x" * 1_000_000})
    [read] = open_runs([write_run(tmp_path, [no_gold, long])])
    assert [cell(row, "result") for row in read.rows] == ["no gold", "correct"]
    assert len(json.dumps(read.rows)) < 2000
    assert len(read.detail(1)["answer"]) == 1_000_000


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no"):
        open_runs([tmp_path / "nothing"])
    with pytest.raises(DataError, match="holds no run"):
        open_runs([tmp_path])
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="agentkd import"):
        open_runs([tmp_path / "chat.jsonl"])


def test_a_file_without_a_finished_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("garbage")
    with pytest.raises(DataError, match="no finished trajectory"):
        open_runs([tmp_path / "x.jsonl"])


def test_the_server(tmp_path: Path) -> None:
    runs = [make_run(i, i < 2, text=f"Straße number {i}") for i in range(3)]
    opened = open_runs([write_run(tmp_path / "a", runs)])
    with Viewer(opened) as viewer:
        listed = get(viewer.url + "api/runs")
        assert [len(run["rows"]) for run in listed["runs"]] == [3]
        assert get(viewer.url + "api/trajectory?run=0&n=1")["id"] == "products-1#0"
        assert get(viewer.url + "api/search?run=0&q=STRASSE%20NUMBER%202") == [2]
        assert get(viewer.url + "api/search?run=0&q=%22raw%22") == []  # names of fields are no texts
        for wrong in ("api/trajectory?run=0&n=9", "api/trajectory?run=x&n=0", "api/trajectory?run=-1&n=0",
                      "api/mask?run=0&n=0", "api/search?run=0", "etc/passwd", "../x"):  # fmt: skip
            with pytest.raises(urllib.error.HTTPError) as failed:
                get(viewer.url + wrong)
            assert failed.value.code in (404, 500)
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(viewer.url + "api/runs", Host="evil.example")
        assert refused.value.code == 403
        with urllib.request.urlopen(viewer.url, timeout=10) as answer:
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
    with pytest.raises(OSError):
        urllib.request.urlopen(viewer.url, timeout=2)


def test_the_export_holds_everything_and_nothing_foreign_is_markup(tmp_path: Path) -> None:
    runs = [make_run(i, True, text=HOSTILE) for i in range(2)]
    opened = open_runs([write_run(tmp_path / "a", runs)])
    out = tmp_path / "new" / "page.html"
    assert export_page(opened, out, mask=lambda record: {"runs": [["a", 1]], "tokens": 1}) == 2
    text = out.read_text()
    assert text.count("<script") == text.count("</script") == 4
    assert "alert(1)" in text
    assert "<img" not in text
    assert "connect-src 'none'" in text
    assert re.findall(r"\b(?:src|href)=\"(?!data:)", text) == []
    block = re.search(r'id="t-0-1">(.*?)</script>', text)
    assert block is not None
    assert json.loads(block[1])["answer"] == HOSTILE
    assert json.loads(block[1])["mask"] == {"runs": [["a", 1]], "tokens": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        export_page(opened, tmp_path / "file" / "page.html")


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [make_run(0, True)])
    command = [sys.executable, "-m", "agentkd", "view", str(tmp_path / "a"), "--no-browser", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert get(said["url"] + "api/state") == [[1, False]]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["qa_musique_decomposition_100", "qa_reflexion_gpt3_react_hotpot"])
def test_recorded_runs_of_others(name: str, tmp_path: Path) -> None:
    path = (
        Path(os.environ.get("AGENTKD_SHARED_DATA", ROOT.parent / "shared" / "data"))
        / f"recorded/{name}.jsonl"
    )
    if not path.is_file():
        pytest.skip(f"no {path}; set AGENTKD_SHARED_DATA")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    done = import_run(path, tmp_path / "run", "steps")
    [run] = open_runs([tmp_path / "run"])
    assert len(run.rows) == len(rows) == done.count
    assert sum(cell(row, "result") == "correct" for row in run.rows) == done.correct
    assert [run.detail(n)["task"]["question"] for n in range(len(rows))] == [row["question"] for row in rows]
