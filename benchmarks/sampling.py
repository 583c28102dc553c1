"""Does self-consistent action sampling help a student, and what does it cost?

Two strengths of one student (an early checkpoint and the full training, from the offline expert's
trajectories), two one-step families and the two-hop one. Settings: greedy, one sample, N = 2, 4, 8, and
an adaptive number. All N share their drafts: where two settings see the same conversation, the smaller
one takes the first of the larger one's draws. Accuracy with 95% Wilson intervals; sampled tokens a
question; CPU time of a step beyond the model's.

n = 100 a cell is sized for about two hours on two cores; ``--quick`` (n = 8, one family, N = 4) takes some
minutes. An unfinished run goes on where it stopped. ``--weak`` and ``--full`` take students that are
there already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from smolagents.models import ChatMessage, MessageRole, Model
from smolagents.monitoring import TokenUsage

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.collect import CollectConfig, collect
from agentkd.distill import DistillConfig, distill
from agentkd.draw import Draft
from agentkd.evaluate.figures import wilson
from agentkd.filter import FilterConfig, filter_run
from agentkd.pipeline import expert_endpoint
from agentkd.record import provenance
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.rollouts import run_rollouts
from agentkd.sampler import SamplerConfig, SelfConsistentSampler
from agentkd.sandbox.fork import ForkSandbox
from agentkd.system import open_system
from agentkd.taskset import load_taskset

TRAIN = "gym:chain_sum,letter_counting+almanac:hops=2"
FAMILIES = ("gym:chain_sum", "gym:letter_counting", "almanac:hops=2")


class Nested(Model):
    """One rollout's view of a model whose drafts are shared by all settings.

    For a conversation, ``most`` drafts are drawn once; a rollout is handed them in order.
    """

    cache: dict[str, list[Any]] = {}
    lock = threading.Lock()

    def __init__(self, model: Model, most: int) -> None:
        super().__init__(model_id=model.model_id)
        self.model, self.most = model, most
        self.handed: Counter[str] = Counter()

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        text = repr([(message.role, message.content) for message in messages])
        key = hashlib.sha256(f"{self.model_id}{text}".encode()).hexdigest()
        with self.lock:
            drawn = self.cache.get(key)
        if drawn is None:
            wanted = {**options, "n": self.most, "seed": int(key[:7], 16)}
            drawn = self.model.generate(messages, **wanted).raw.choices
            with self.lock:
                drawn = self.cache.setdefault(key, drawn)
        first = self.handed[key]
        self.handed[key] += (count := options.get("n", 1))
        choices = drawn[first : first + count]
        used = TokenUsage(0, sum(len(choice.token_ids) for choice in choices))
        raw = SimpleNamespace(choices=choices, prompt_token_ids=None)
        return ChatMessage(
            role=MessageRole.ASSISTANT, content=choices[0].message.content, raw=raw, token_usage=used
        )


def students(out: Path, steps: tuple[int, int], n: int) -> dict[str, Path]:
    """The same data, a short training and a whole one."""
    found = {name: out / name for name in ("weak", "full")}
    if all((folder / "manifest.json").is_file() for folder in found.values()):
        return found
    with expert_endpoint(seed=0, error_rate=0.1) as url:
        agent = AgentConfig(model="offline-expert", api_base=url, search_k=2)
        collect(CollectConfig(tasks=TRAIN, n=n, agent=agent), out / "collected")
    kept = out / "kept"
    filter_run(out / "collected", kept, FilterConfig())
    for folder, count in zip(found.values(), steps, strict=True):
        distill(kept / "kept.jsonl", folder, DistillConfig(steps=count))
    return found


def settings(most: int) -> dict[str, SamplerConfig | None]:
    chosen: dict[str, SamplerConfig | None] = {"greedy": None, "one": SamplerConfig(n=1, confidence=None)}
    chosen |= {f"fixed{n}": SamplerConfig(n=n, confidence=None) for n in (2, 4, 8) if n <= most}
    chosen["adaptive"] = SamplerConfig(n=most)
    return chosen


def evaluate(student: Path, out: Path, n: int, families: tuple[str, ...], most: int) -> list[dict[str, Any]]:
    rows = []
    with open_system(str(student), max_tokens=200) as system:
        for family in families:
            taskset = load_taskset(family, "test", n, 1)
            retriever = BM25Retriever(taskset.passages) if taskset.passages else None
            tools = search_tools(retriever, system.config)
            for name, sampler in settings(most).items():
                config = system.config.model_copy(update={"sampler": sampler})

                def make(task: Any, sample: int, config: AgentConfig = config, tools: Any = tools) -> Any:
                    model = system.model if config.sampler is None else Nested(system.model, most)
                    return agent_factory(config, tools, model)(task, sample)

                runs = run_rollouts(
                    taskset.tasks,
                    make,
                    out / student.name / family.replace(":", "-") / name / "trajectories.jsonl",
                    workers=8,
                    log_calls=False,
                )
                tokens = sum(step.usage.output_tokens for run in runs for step in run.steps) / len(runs)
                correct = sum(run.correct for run in runs)
                rows.append(
                    {
                        "student": student.name,
                        "family": family,
                        "setting": name,
                        "n": len(runs),
                        "correct": correct,
                        "tokens": tokens,
                    }
                )
                low, high = wilson(correct, len(runs))
                print(
                    f"{student.name:6} {family:22} {name:9} {correct / len(runs):6.1%} "
                    f"[{low:.0%}, {high:.0%}] {tokens:7.1f} tokens a question",
                    flush=True,
                )
    return rows


def overhead(rounds: int) -> float:
    """CPU milliseconds of a step with eight candidates, the model's own time left out."""
    from sandbox import Meter  # the benchmark beside this one

    texts = [f"Thought: go.\n```python\nx = {n % 3}\nprint(x * 7)\n```" for n in range(8)]

    def draw(count: int, first: int, config: SamplerConfig) -> Any:
        from agentkd.trajectory import Usage

        return [Draft(text) for text in texts[first : first + count]], Usage()

    from agentkd.action import parse_action

    meter, sandbox = Meter(), ForkSandbox()
    sampler = SelfConsistentSampler(SamplerConfig(n=8, confidence=None))
    sampler.act(draw, parse_action, sandbox)
    before = meter.seconds()
    for _ in range(rounds):
        sampler.act(draw, parse_action, sandbox)
    spent = (meter.seconds() - before) / rounds * 1000
    sandbox.close()
    meter.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="n = 8, one family, at most four candidates")
    parser.add_argument("--n", type=int, default=100, help="questions a cell")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-sampling"))
    options = parser.parse_args()
    began = time.monotonic()
    out = options.out / ("quick" if options.quick else "full")
    n, most, families = (8, 4, FAMILIES[:1]) if options.quick else (options.n, 8, FAMILIES)
    spent = overhead(5 if options.quick else 30)
    found = students(out, (4, 10) if options.quick else (8, 46), 48 if options.quick else 240)
    rows = [row for student in found.values() for row in evaluate(student, out, n, families, most)]
    metrics: dict[str, float] = {"cpu_ms_n8": round(spent, 1), "seconds": round(time.monotonic() - began)}
    for student in found:
        for setting, name in (
            ("greedy", "greedy"),
            (f"fixed{most}", f"fixed{most}"),
            ("adaptive", "adaptive"),
        ):
            cell = [row for row in rows if (row["student"], row["setting"]) == (student, setting)]
            metrics[f"{student}:acc_{name}"] = sum(row["correct"] for row in cell) / sum(
                row["n"] for row in cell
            )
        tokens = {
            name: sum(row["tokens"] for row in rows if (row["student"], row["setting"]) == (student, name))
            for name in ("greedy", f"fixed{most}", "adaptive")
        }
        metrics[f"{student}:token_ratio"] = tokens["adaptive"] / tokens[f"fixed{most}"]
        metrics[f"{student}:token_ratio_greedy"] = tokens["adaptive"] / tokens["greedy"]
    line = {
        "name": "sampling",
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "n": n,
        "runs": 1,
        "commit": provenance()["commit"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
