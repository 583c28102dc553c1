from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentkd.errors import ConfigError, RetrievalError
from agentkd.retrieval import Passage
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.tool import load_tool, tool_names, tool_schema, tools_folder

PASSAGES = [
    Passage(id="1", title="Silver Harbor", text="Silver Harbor is a town\nfounded in 1802."),
    Passage(id="2", title="Amber Falcon", text="Amber Falcon is a painter born in Silver Harbor."),
    Passage(id="3", title="Copper Meadow", text="Copper Meadow is a village."),
]


def test_every_shipped_tool_loads_and_has_its_papers() -> None:
    assert tool_names() == ["search", "today"]
    for name in tool_names():
        assert (tools_folder() / name / "README.md").is_file()
        assert (tools_folder() / name / "requirements.txt").is_file()
    assert load_tool("search", retriever=BM25Retriever(PASSAGES)).name == "search"


def test_search_returns_titled_lines_best_first() -> None:
    search = load_tool("search", retriever=BM25Retriever(PASSAGES), k=2)
    lines = search("Who is Amber Falcon?").splitlines()
    assert lines[0] == "[Amber Falcon] Amber Falcon is a painter born in Silver Harbor."
    assert len(lines) == 2
    assert search("zzz") == "No passage found."
    assert search("") == "No passage found."


def test_a_search_is_the_same_every_time_and_k_may_exceed_the_corpus() -> None:
    retriever = BM25Retriever(PASSAGES)
    first, again = (retriever.search(["silver harbor"], k=50) for _ in range(2))
    assert first == again
    assert [hit.passage.id for hit in first[0]] == ["1", "2"]
    assert retriever.search(["town " * 50_000], k=1)[0][0].passage.id == "1"


def test_bad_corpora_are_refused() -> None:
    with pytest.raises(RetrievalError, match="no passages"):
        BM25Retriever([])
    with pytest.raises(RetrievalError, match="same id"):
        BM25Retriever([PASSAGES[0], PASSAGES[0]])


def test_a_schema_is_one_json_text() -> None:
    schema = json.loads(tool_schema(load_tool("today")))
    assert schema["name"] == "today"
    assert schema["inputs"] == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x = 1", "defines 0"),
        ("from smolagents import Tool", "defines 0"),
        ("import nonexistent_module", "nonexistent_module"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_tool_file_that_is_none_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "tool.py").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_tool(tmp_path)


def test_an_unknown_tool_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="search"):
        load_tool("serach")


def test_wrong_arguments_are_a_config_error() -> None:
    with pytest.raises(ConfigError):
        load_tool("search", colour="red")
