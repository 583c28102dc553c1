"""Builders that are killed at any moment: nothing is lost, nothing is half there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentkd.errors import RetrievalError
from agentkd.retrieval import Passage
from agentkd.retrieval.index import Index
from tests.hash_encoder import HashEncoder

pytest.importorskip("faiss", reason="the dense extra is not installed")

ROOT = Path(__file__).resolve().parents[2]
COUNT = 1_500
QUERIES = ["place 7", "number 1400", "place 300 number 300"]

BUILD = """
import sys, time
from agentkd.retrieval.build import IndexBuilder
from agentkd.retrieval.manifest import IndexConfig
from tests.e2e.test_index_killed import passages
from tests.hash_encoder import HashEncoder
class Slow(HashEncoder):
    def encode(self, texts, role):
        time.sleep(0.05)
        return super().encode(texts, role)
builder = IndexBuilder(sys.argv[1], Slow())
print("begin", flush=True)
config = IndexConfig(kind="hybrid", encoder="hash")
built = builder.add(passages(300, 1500)) if sys.argv[2] == "add" else builder.build(passages(1500), config)
print(built.encoded, flush=True)
"""


def passages(count: int, first: int = 0) -> list[Passage]:
    return [
        Passage(id=str(n), title=f"Number {n}", text=f"This is place {n}.")
        for n in range(first, first + count)
    ]


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder), what], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process


def finish(folder: Path, what: str) -> int:
    process = start(folder, what)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return int(out)


def answers(index: Index) -> list[list[tuple[str, float]]]:
    return [[(hit.passage.id, round(hit.score, 5)) for hit in hits] for hits in index.search(QUERIES, 8)]


def test_a_build_and_an_addition_survive_kills(tmp_path: Path) -> None:
    rng = random.Random(0)
    wanted = answers(Index.build(tmp_path / "whole", passages(COUNT), kind="hybrid", encoder=HashEncoder()))
    folder = tmp_path / "killed"
    for _ in range(6):
        process = start(folder, "build")
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.communicate()
        if (folder / "manifest.json").is_file():
            break  # it was quicker than the kill
        with pytest.raises(RetrievalError, match=r"not finished|no index"):
            Index.open(folder)
    else:
        # What the killed ones encoded, in steps of 256, was not encoded again.
        assert finish(folder, "build") < COUNT
    assert answers(Index.open(folder, encoder=HashEncoder(), verify=True)) == wanted
    for _ in range(4):
        process = start(folder, "add")
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.communicate()
        index = Index.open(folder, encoder=HashEncoder(), verify=True)
        if len(index) != COUNT:
            break
        assert answers(index) == wanted
    else:
        finish(folder, "add")
    index = Index.open(folder, encoder=HashEncoder(), verify=True)
    assert len(index) == COUNT + 300
    assert index.search(["number 1799"], 1)[0][0].passage.id == "1799"
