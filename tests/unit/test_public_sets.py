"""The eight public test sets, from files in their published forms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import AgentkdError, ConfigError, DataError
from agentkd.scorer import score
from agentkd.taskset import load_taskset
from agentkd.taskset.public import PUBLIC_SETS

SHARED = Path(os.environ.get("AGENTKD_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")

PUBLISHED: dict[str, tuple[str, Any, str]] = {
    "hotpotqa": (
        "dev.json",
        [{"_id": "5a8b", "question": "Same nationality?", "answer": "yes", "type": "comparison",
          "level": "hard", "supporting_facts": [["A", 0]], "context": [["A", ["text"]]]}],
        "Yes.",
    ),
    "musique": (
        "dev.jsonl",
        [{"id": "2hop__1_2", "paragraphs": [], "question": "Who founded it?", "question_decomposition": [],
          "answer": "Lev Tolstoy", "answer_aliases": ["Leo Tolstoy"], "answerable": True},
         {"id": "2hop__1_3", "question": "Unanswerable?", "answer": "x", "answerable": False}],
        "Leo Tolstoy",
    ),
    "2wiki": (
        "dev.json",
        [{"_id": "c67e", "type": "compositional", "question": "Where?", "context": [], "evidences": [],
          "answer": "Cahiers du cin\u00e9ma"}],
        "cahiers du cin\u00e9ma",
    ),
    "bamboogle": ("bamboogle.csv", 'Question,Answer\n"Who, first?",Ada Lovelace\n', "ada lovelace"),
    "math_500": (
        "test.jsonl",
        [{"problem": "Convert.", "solution": "...", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
          "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"}],
        "(3, pi/2)",
    ),
    "gsm_hard": (
        "gsmhardv2.jsonl",
        [{"input": "How much?", "code": "def solution(): ...", "target": 561161.7000000001}],
        "561161.7",
    ),
    "aime": ("aime.csv", "ID,Problem,Solution,Answer\n2024-I-1,Find m+n.,long,033\n", "33"),
    "olymmath": (
        "OlymMATH-EN-HARD.jsonl",
        [{"problem": "Find x.", "answer": "$\\frac{2}{3}$", "subject": "Algebra", "unique_id": "HARD-0-EN"}],
        "2/3",
    ),
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    file, content, _ = PUBLISHED[name]
    path = folder / file
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(PUBLIC_SETS))
def test_a_published_file_is_read_and_scored(name: str, tmp_path: Path) -> None:
    [task] = load_taskset(f"set:{name}={write(tmp_path, name)}", "test")
    assert task.id.startswith(name)
    assert (task.family, task.split, task.scorer) == (name, "test", PUBLIC_SETS[name].scorer)
    if task.scorer == "math":
        pytest.importorskip("math_verify")
    assert score(task, PUBLISHED[name][2]).correct
    assert not score(task, "nothing of the kind").correct


@pytest.mark.parametrize(
    ("file", "said"),
    [("[]", "no questions"), ('[{"question": "x"}]', "row 1"), ("[1]", "row 1"), ('{"a": ', "reading")],
)
def test_a_file_that_is_not_the_set(file: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(file, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        load_taskset(f"set:hotpotqa={path}", "test")


def test_names_and_splits_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hotpotqa"):
        load_taskset("set:nothing=x.json", "test")
    with pytest.raises(AgentkdError):
        load_taskset(f"set:aime={write(tmp_path, 'aime')}", "train")
    with pytest.raises(DataError, match="no file"):
        load_taskset("set:aime=nowhere.csv", "test")


@pytest.mark.parametrize("name", ["hotpotqa", "2wiki", "math_500", "gsm_hard"])
def test_the_sets_at_hand(name: str) -> None:
    path = SHARED / "benchmarks" / (f"{name}.jsonl" if name == "math_500" else f"{name}_500.jsonl")
    if not path.is_file():
        pytest.skip(f"no {path}")
    tasks = load_taskset(f"set:{name}={path}", "test").tasks
    assert len(tasks) == PUBLIC_SETS[name].size
    if name != "math_500":
        for task in tasks:
            assert score(task, task.answer).correct, task
