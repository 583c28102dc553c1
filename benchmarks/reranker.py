"""Is a cross-encoder worth its time? Recall of hybrid search before and after reranking.

No cross-encoder ships its weights on the package registry, so one is trained here: all-MiniLM-L6-v2 with a
score on top, on the questions of one set (HotpotQA or 2WikiMultihopQA) and what hybrid search finds for
them, gold against not. It orders the candidates of the other set, so no question is both. The peer in the
same run is the hybrid search itself. Give a published one to ``benchmarks/retrieval.py --reranker``.

Needs the index that ``benchmarks/retrieval.py`` leaves in its ``--work`` folder. About ten minutes on two
cores; ``--quick`` takes a tenth of the questions and shows only that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agentkd.record import provenance
from agentkd.retrieval.index import Index
from agentkd.retrieval.rerank import Reranked
from agentkd.retrieval.staging import passage_text

MAX_TOKENS, NEGATIVES, BATCH, LEARNING_RATE, DEPTH = 160, 5, 32, 3e-5, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the questions")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-retrieval"))
    options = parser.parse_args()
    bench = _retrieval_benchmark()
    folder = bench._corpus()
    if folder is None:
        parser.exit(message="The passages are not here: set AGENTKD_SHARED_DATA.\n")
    size = "quick" if options.quick else "full"
    if not (options.work / size / "hybrid" / "manifest.json").is_file():
        parser.exit(message="There is no index: run benchmarks/retrieval.py with the same options first.\n")
    _, questions = bench._read(folder, options.quick)
    index = Index.open(options.work / size / "hybrid").load()
    recalls: dict[str, list[list[float]]] = {"hybrid": [], "rerank": []}
    seconds = 0.0
    for held_out in bench.SETS:
        model = options.work / size / f"cross-without-{held_out}"
        if not (model / "config.json").is_file():
            train([q for q in questions if q["set"] != held_out], index, model)
        asked = [q for q in questions if q["set"] == held_out]
        texts = [q["question"] for q in asked]
        began = time.perf_counter()
        found = {"hybrid": index.search(texts, 10), "rerank": []}
        plain = time.perf_counter() - began
        found["rerank"] = Reranked(index, str(model), depth=DEPTH).search(texts, 10)
        seconds += time.perf_counter() - began - 2 * plain
        for label, hits in found.items():
            recalls[label] += [
                [bench._recall(q, each[:k]) for k in (5, 10)] for q, each in zip(asked, hits, strict=True)
            ]
    table = Table("system", "recall@5", "recall@10", title=f"{len(questions)} questions")
    metrics: dict[str, float] = {}
    for label, values in recalls.items():
        means = [sum(value[place] for value in values) / len(values) for place in (0, 1)]
        table.add_row(label, *(f"{mean:.3f}" for mean in means))
        metrics |= {f"recall5_{label}": round(means[0], 4), f"recall10_{label}": round(means[1], 4)}
    metrics["rerank_ms"] = round(1000 * seconds / len(questions), 1)
    Console().print(table)
    commit = provenance()["commit"]
    print(
        json.dumps({"name": "reranker", "metrics": metrics, "n": len(questions), "runs": 1, "commit": commit})
    )


def _retrieval_benchmark() -> Any:
    path = Path(__file__).with_name("retrieval.py")
    spec = importlib.util.spec_from_file_location("retrieval_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(questions: Sequence[dict[str, Any]], index: Index, out: Path) -> None:
    """One epoch over gold passages and the best wrong ones of each question."""
    from agentkd.retrieval.encoder import model_path

    torch.manual_seed(0)
    pairs = _pairs(questions, index)
    base = model_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = -(-len(pairs) // BATCH)
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * steps), 1.0) * (1 - step / steps)
    )
    model.train()
    for begin in range(0, len(pairs), BATCH):
        batch = pairs[begin : begin + BATCH]
        inputs = tokenizer(
            [query for query, _, _ in batch],
            [text for _, text, _ in batch],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        target = torch.tensor([gold for _, _, gold in batch])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(**inputs).logits[:, 0], target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        warm.step()
    tokenizer.model_max_length = MAX_TOKENS
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def _pairs(questions: Sequence[dict[str, Any]], index: Index) -> list[tuple[str, str, float]]:
    """(question, passage, 1.0 for gold), shuffled; gold that the search misses is left out, as at use."""
    rng = random.Random(0)
    pairs = []
    found = index.search([q["question"] for q in questions], DEPTH)
    for question, hits in zip(questions, found, strict=True):
        gold = set(question["gold_passages"])
        right = [hit.passage for hit in hits if hit.passage.id in gold]
        wrong = [hit.passage for hit in hits if hit.passage.id not in gold]
        chosen = rng.sample(wrong, min(NEGATIVES, len(wrong)))
        pairs += [(question["question"], passage_text(p), 1.0) for p in right]
        pairs += [(question["question"], passage_text(p), 0.0) for p in chosen]
    rng.shuffle(pairs)
    return pairs


if __name__ == "__main__":
    main()
