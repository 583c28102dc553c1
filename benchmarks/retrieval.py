"""How well, how quickly and how large does retrieval work? Recall, latency, and a million vectors.

``quality``  recall of the gold passages, on Wikipedia passages and the multi-hop questions of
             HotpotQA and 2WikiMultihopQA, for BM25, dense, hybrid and (with ``--reranker NAME``) hybrid
             reranked. The peer in the same run is bm25s as its documentation starts it.
``latency``  ``agentkd retriever`` over the same hybrid index, asked by 1 and by 32 clients.
``scale``    a million vectors, made by moving real passage vectors along differences of other real
             ones: the chosen approximate index against exact search, for the real questions.

The passages are read from ``../shared/data/corpus``, or below the folder named by
AGENTKD_SHARED_DATA. About a quarter of an hour on two cores, most of it encoding; ``--quick`` takes a
tenth of the passages and of the vectors. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from agentkd.record import provenance
from agentkd.retrieval import Hit, Passage, Retriever
from agentkd.retrieval.ann import ANN, choose_kind
from agentkd.retrieval.build import IndexBuilder
from agentkd.retrieval.client import HTTPRetriever
from agentkd.retrieval.corpus import Source
from agentkd.retrieval.encoder import load_encoder
from agentkd.retrieval.index import Index
from agentkd.retrieval.manifest import IndexConfig

PARTS = ("quality", "latency", "scale")
SETS = {"2wiki": "2wiki_questions_500", "hotpotqa": "hotpotqa_questions"}
CORPORA = ("2wiki_passages", "hotpotqa_passages", "musique_train_passages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--only", choices=PARTS, action="append", help="repeatable; all by default")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--reranker", help="a cross-encoder, by name or folder")
    parser.add_argument("--rows", type=int, help="vectors of the scale part")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-retrieval"))
    options = parser.parse_args()
    parts = options.only or PARTS
    folder = _corpus()
    if folder is None:
        sys.exit("The passages are not here: set AGENTKD_SHARED_DATA to the folder that has corpus/.")
    work = options.work / ("quick" if options.quick else "full")
    passages, questions = _read(folder, options.quick)
    console = Console()
    metrics: dict[str, float] = {}
    metrics |= build(work, passages, options.encoder, console)
    if "quality" in parts:
        metrics |= quality(work, passages, questions, options.reranker, console)
    if "latency" in parts:
        metrics |= latency(work, [q["question"] for q in questions], console)
    if "scale" in parts:
        rows = options.rows or (100_000 if options.quick else 1_000_000)
        metrics |= scale(work, [q["question"] for q in questions], rows, options.encoder, console)
    n = {"passages": len(passages), "questions": len(questions)}
    line = {"name": "retrieval", "metrics": metrics, "n": n, "runs": 1, "commit": provenance()["commit"]}
    print(json.dumps(line))


def _corpus() -> Path | None:
    root = os.environ.get("AGENTKD_SHARED_DATA")
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = (Path(root) if root else default) / "corpus"
    return folder if folder.is_dir() else None


def _read(folder: Path, quick: bool) -> tuple[list[Passage], list[dict[str, Any]]]:
    """All passages, and the questions with gold; the first tenth of the questions and what they need."""
    passages = [p for name in CORPORA for p in Source(str(folder / f"{name}.jsonl"))]
    questions = []
    for name, file in SETS.items():
        lines = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text().splitlines()]
        gold = [{**line, "set": name} for line in lines if line["gold_passages"]]
        questions += gold[: len(gold) // 10] if quick else gold
    if quick:
        needed = {id for question in questions for id in question["gold_passages"]}
        passages = [p for n, p in enumerate(passages) if n % 10 == 0 or p.id in needed]
    return passages, questions


def build(work: Path, passages: Sequence[Passage], encoder: str, console: Console) -> dict[str, float]:
    """Both indexes; the times of an earlier run stand where the index is there already."""
    table = Table("index", "build s", "passages/s", "MB", title=f"{len(passages):,} passages")
    metrics: dict[str, float] = {}
    for kind in ("bm25", "hybrid"):
        folder, stored = work / kind, work / f"{kind}.json"
        config = IndexConfig.model_validate({"kind": kind} | ({"encoder": encoder} if kind != "bm25" else {}))
        if not stored.is_file():
            began = time.perf_counter()
            built = IndexBuilder(folder).build(passages, config, replace=True)
            seconds = time.perf_counter() - began
            figures = {"seconds": seconds, "bytes": built.manifest.bytes, "encoded": built.encoded}
            stored.write_text(json.dumps(figures))
        figures = json.loads(stored.read_text())
        metrics |= {f"build_s_{kind}": figures["seconds"], f"bytes_{kind}": figures["bytes"]}
        rate = len(passages) / figures["seconds"]
        table.add_row(kind, f"{figures['seconds']:.1f}", f"{rate:,.0f}", f"{figures['bytes'] / 1e6:.1f}")
    console.print(table)
    return metrics


def quality(
    work: Path,
    passages: Sequence[Passage],
    questions: Sequence[dict[str, Any]],
    reranker: str | None,
    console: Console,
) -> dict[str, float]:
    """Recall at 5 and 10: the share of a question's gold passages that is found, averaged."""
    systems: dict[str, Callable[[], Retriever]] = {
        "bm25s as it comes": lambda: Peer(passages),
        "bm25": lambda: Index.open(work / "hybrid", kind="bm25"),
        "dense": lambda: Index.open(work / "hybrid", kind="dense").load(),
        "hybrid": lambda: Index.open(work / "hybrid").load(),
    }
    if reranker:
        from agentkd.retrieval.rerank import Reranked

        systems["hybrid + rerank"] = lambda: Reranked(Index.open(work / "hybrid").load(), reranker)
    else:
        console.print("hybrid + rerank: left out, no --reranker was given")
    sets = [*SETS, "all"]
    table = Table(
        "system",
        *(f"{name.removesuffix('qa')} @{k}" for name in sets for k in (5, 10)),
        "queries/s",
        title="Recall",
    )
    metrics: dict[str, float] = {}
    for label, opened in systems.items():
        retriever = opened()
        began = time.perf_counter()
        found = retriever.search([q["question"] for q in questions], 10)
        seconds = time.perf_counter() - began
        row = []
        for name in sets:
            chosen = [
                (q, hits) for q, hits in zip(questions, found, strict=True) if name in (q["set"], "all")
            ]
            for k in (5, 10):
                value = float(np.mean([_recall(q, hits[:k]) for q, hits in chosen]))
                row.append(f"{value:.3f}")
                short = "peer" if label.startswith("bm25s") else label.replace("hybrid + ", "")
                metrics[f"recall{k}_{short}" + ("" if name == "all" else f":{name}")] = round(value, 4)
        table.add_row(label, *row, f"{len(questions) / seconds:,.0f}")
        metrics[f"queries_per_s_{label.split()[0]}"] = round(len(questions) / seconds, 1)
    console.print(table)
    return metrics


def _recall(question: dict[str, Any], hits: Sequence[Hit]) -> float:
    gold = set(question["gold_passages"])
    return len(gold & {hit.passage.id for hit in hits}) / len(gold)


class Peer:
    """bm25s with its own tokenizer and settings, over "title text"."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        import bm25s

        self.bm25s, self.passages = bm25s, passages
        texts = [f"{p.title} {p.text}" for p in passages]
        self.index = bm25s.BM25()
        self.index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        tokens = self.bm25s.tokenize(list(queries), show_progress=False)
        rows, scores = self.index.retrieve(tokens, k=k, show_progress=False)
        return [
            [Hit(passage=self.passages[row], score=float(score)) for row, score in zip(*pair, strict=True)]
            for pair in zip(rows, scores, strict=True)
        ]


def latency(work: Path, queries: list[str], console: Console) -> dict[str, float]:
    """Milliseconds of one search over HTTP, and resident memory of the server."""
    table = Table("index", "clients", "p50 ms", "p99 ms", "queries/s", "server MB", title="agentkd retriever")
    metrics: dict[str, float] = {}
    for kind in ("bm25", "hybrid"):
        command = [sys.executable, "-m", "agentkd", "retriever", str(work / kind), "--port", "0", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            _ask(url, queries[:20], 4)
            for clients in (1, 32):
                times, rate = _ask(url, queries, clients)
                p50, p99 = (float(np.percentile(times, q)) * 1000 for q in (50, 99))
                memory = _memory(process.pid, "VmRSS") / 1e6
                table.add_row(
                    kind, str(clients), f"{p50:.1f}", f"{p99:.1f}", f"{rate:,.0f}", f"{memory:,.0f}"
                )
                metrics |= {
                    f"p50_ms_{kind}_{clients}": round(p50, 2),
                    f"p99_ms_{kind}_{clients}": round(p99, 2),
                }
                metrics[f"qps_{kind}_{clients}"] = round(rate, 1)
            metrics[f"memory_mb_{kind}"] = round(memory)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)
    console.print(table)
    return metrics


def _ask(url: str, queries: Sequence[str], clients: int) -> tuple[list[float], float]:
    client = HTTPRetriever(url)

    def one(query: str) -> float:
        began = time.perf_counter()
        assert client.search([query], 10)[0]
        return time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = list(pool.map(one, queries))
    client.close()
    return times, len(queries) / (time.perf_counter() - began)


def scale(work: Path, queries: list[str], rows: int, encoder: str, console: Console) -> dict[str, float]:
    """Many vectors in a process of its own, so that its memory is the index's."""
    index = Index.open(work / "hybrid")
    assert index.manifest.encoder is not None
    dimension = index.manifest.encoder.dimension
    base = work / "hybrid" / index.manifest.segments[0].name / "vectors.f32"
    asked = load_encoder(encoder).encode(queries, "query")
    vectors, path = work / "many.f32", work / "many.faiss"
    perturb(base, dimension, rows, vectors)
    kind, why = choose_kind(rows)
    if kind == "flat":
        sys.exit(f"{rows:,} vectors are searched exactly; ask for more.")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        built = pool.apply(build_many, (kind, vectors, rows, dimension, path))
    with context.Pool(1) as pool:
        found, times, opened = pool.apply(search_many, (kind, path, asked))
    with context.Pool(1) as pool:
        exact = pool.apply(search_exactly, (vectors, rows, dimension, asked))
    recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]))
    size = rows * dimension * 4
    p50, p99 = (float(np.percentile(times, q)) * 1000 for q in (50, 99))
    table = Table("what", "measured", title=f"{rows:,} vectors of {dimension}: {kind} ({why})")
    table.add_row("recall@10 against exact search", f"{recall:.4f} ({len(queries)} questions)")
    table.add_row("build", f"{built['seconds']:.0f} s")
    table.add_row("largest memory while building", f"{built['memory'] / size:.2f} x the vectors' size")
    table.add_row("memory after searching, mapped pages too", f"{opened['memory'] / size:.2f} x")
    table.add_row("one search, p50 and p99", f"{p50:.1f} ms, {p99:.1f} ms")
    console.print(table)
    for file in (vectors, path):
        file.unlink()
    return {
        f"ann_recall_{'1m' if rows == 1_000_000 else rows}": round(recall, 4),
        "ann_build_s": round(built["seconds"], 1),
        "ann_build_memory_ratio": round(built["memory"] / size, 3),
        "ann_search_memory_ratio": round(opened["memory"] / size, 3),
        "ann_p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
    }


def perturb(base: Path, dimension: int, rows: int, out: Path) -> None:
    """Unit vectors v + 0.5 (a - b), for real v, a and b: new places that are spread as real ones are."""
    real = np.fromfile(base, dtype="<f4").reshape(-1, dimension)
    rng = np.random.default_rng(0)
    with out.open("wb") as file:
        for begin in range(0, rows, 50_000):
            count = min(50_000, rows - begin)
            v, a, b = (real[rng.integers(len(real), size=count)] for _ in range(3))
            moved = v + np.float32(0.5) * (a - b)
            file.write((moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype("<f4").tobytes())


def build_many(kind: Any, vectors: Path, rows: int, dimension: int, out: Path) -> dict[str, float]:
    """Build and save; seconds and the largest resident memory of this process, less what it began with."""
    import faiss  # noqa: F401

    before = _memory(os.getpid(), "VmRSS")

    def read(begin: int, end: int) -> Any:
        count = (end - begin) * dimension
        return np.fromfile(vectors, "<f4", count, offset=4 * begin * dimension).reshape(-1, dimension)

    began = time.perf_counter()
    ANN.build(kind, rows, dimension, read).save(out)
    return {"seconds": time.perf_counter() - began, "memory": _memory(os.getpid(), "VmHWM") - before}


def search_many(kind: Any, path: Path, asked: Any) -> tuple[list[list[int]], list[float], dict[str, float]]:
    """The ten nearest of each, one at a time, by the memory-mapped index."""
    none = np.zeros(0, np.int64)
    before = _memory(os.getpid(), "VmRSS")
    ann = ANN.load(path, kind)
    ann.search(asked, 10, none)
    found, times = [], []
    for query in asked:
        began = time.perf_counter()
        (hits,) = ann.search(query[None], 10, none)
        times.append(time.perf_counter() - began)
        found.append([row for row, _ in hits])
    return found, times, {"memory": _memory(os.getpid(), "VmRSS") - before}


def search_exactly(vectors: Path, rows: int, dimension: int, asked: Any) -> list[list[int]]:
    """The ten nearest of each, by comparing all."""
    import faiss

    mapped = np.memmap(vectors, "<f4", "r", shape=(rows, dimension))
    _, found = faiss.knn(asked, np.ascontiguousarray(mapped), 10, metric=faiss.METRIC_INNER_PRODUCT)
    return [[int(row) for row in each] for each in found]


def _memory(pid: int, which: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc has no {which}")


if __name__ == "__main__":
    main()
