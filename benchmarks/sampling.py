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
import pickle
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from smolagents.models import ChatMessage, MessageRole, Model
from smolagents.monitoring import TokenUsage

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.collect import CollectConfig, collect
from agentkd.distill import DistillConfig, distill
from agentkd.draw import Draft
from agentkd.evaluate.figures import paired_difference, wilson
from agentkd.filter import FilterConfig, filter_run
from agentkd.pipeline import expert_endpoint
from agentkd.record import provenance
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.rollouts import run_rollouts
from agentkd.sampler import SamplerConfig, SelfConsistentSampler
from agentkd.sandbox.fork import ForkSandbox
from agentkd.system import open_system
from agentkd.taskset import load_taskset
from agentkd.trajectory import Trajectory

TRAIN = "gym:products,chain_sum+almanac:hops=2"
FAMILIES = ("gym:products", "gym:chain_sum", "almanac:hops=2")
MAX_TOKENS = 128
"""Of one step; an action of these families has 40 to 90."""
WORKERS = 16


class Nested(Model):
    """One rollout's view of a model whose drafts are shared by all settings.

    The drafts of a conversation are kept in the order in which they were drawn. A rollout is handed
    the first ones; what is missing is drawn and kept for those who come later.
    """

    cache: dict[str, list[Any]] = {}

    def __init__(self, model: Model) -> None:
        super().__init__(model_id=model.model_id)
        self.model = model
        self.handed: Counter[str] = Counter()

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        text = repr([(message.role, message.content) for message in messages])
        key = hashlib.sha256(text.encode()).hexdigest()
        drawn = self.cache.setdefault(key, [])  # no other rollout under way has this conversation
        first = self.handed[key]
        self.handed[key] = last = first + options.get("n", 1)
        if (missing := last - len(drawn)) > 0:
            seed = (int(key[:7], 16) + len(drawn)) % 2**31
            drawn += self.model.generate(messages, **{**options, "n": missing, "seed": seed}).raw.choices
        choices = drawn[first:last]
        used = TokenUsage(0, sum(len(choice.token_ids) for choice in choices))
        raw = SimpleNamespace(choices=choices, prompt_token_ids=None)
        return ChatMessage(
            role=MessageRole.ASSISTANT, content=choices[0].message.content, raw=raw, token_usage=used
        )


def students(out: Path, steps: tuple[int, int], n: int) -> dict[str, Path]:
    """The same data, a short training and a whole one; what is finished is not done again."""
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
    """The largest first, so that the others find their drafts."""
    chosen: dict[str, SamplerConfig | None] = {f"fixed{most}": SamplerConfig(n=most, confidence=None)}
    chosen |= {"adaptive": SamplerConfig(n=most), "greedy": None}
    chosen["one"] = SamplerConfig(n=1, confidence=None)
    return chosen | {f"fixed{n}": SamplerConfig(n=n, confidence=None) for n in (4, 2) if n < most}


def evaluate(name: str, student: Path, family: str, out: Path, n: int, most: int) -> list[Row]:
    """All settings on one family; prints each as it is done."""
    rows = []
    taskset = load_taskset(family, "test", n, 1)
    retriever = BM25Retriever(taskset.passages) if taskset.passages else None
    drafts = out / name / family.replace(":", "-") / "drafts.pickle"
    Nested.cache = pickle.loads(drafts.read_bytes()) if drafts.is_file() else {}
    with open_system(str(student), max_tokens=MAX_TOKENS) as system:
        tools = search_tools(retriever, system.config)
        for setting, sampler in settings(most).items():
            config = system.config.model_copy(update={"sampler": sampler})

            def make(task: Any, sample: int, config: AgentConfig = config) -> Any:
                model = system.model if config.sampler is None else Nested(system.model)
                return agent_factory(config, tools, model)(task, sample)

            log = out / name / family.replace(":", "-") / setting / "trajectories.jsonl"
            runs = run_rollouts(taskset.tasks, make, log, workers=WORKERS, log_calls=False)
            drafts.write_bytes(pickle.dumps(Nested.cache))
            rows.append(Row(name, family, setting, runs))
            print(rows[-1], flush=True)
    return rows


class Row(NamedTuple):
    """One cell of the table."""

    student: str
    family: str
    setting: str
    runs: list[Trajectory]

    @property
    def correct(self) -> int:
        return sum(run.correct for run in self.runs)

    @property
    def tokens(self) -> int:
        """Sampled, of all questions."""
        return sum(step.usage.output_tokens for run in self.runs for step in run.steps)

    @property
    def without_answer(self) -> int:
        return sum(run.answer is None for run in self.runs)

    def __str__(self) -> str:
        n = len(self.runs)
        low, high = wilson(self.correct, n)
        return (
            f"{self.student:5} {self.family:20} {self.setting:8} {self.correct / n:6.1%} "
            f"[{low:4.0%}, {high:4.0%}] n={n} {self.tokens / n:7.1f} tokens a question, "
            f"{self.without_answer} without an answer"
        )


def figures(rows: list[Row], most: int) -> dict[str, float]:
    """Accuracy and tokens over all families of each student, and the paired differences."""
    found: dict[str, float] = {}
    for student in dict.fromkeys(row.student for row in rows):
        runs = {
            setting: [
                run for row in rows if (row.student, row.setting) == (student, setting) for run in row.runs
            ]
            for setting in settings(most)
        }
        tokens = {name: sum(run.usage.output_tokens for run in members) for name, members in runs.items()}
        for setting, members in runs.items():
            found[f"{student}:acc_{setting}"] = sum(run.correct for run in members) / len(members)
        fixed = f"fixed{most}"
        found[f"{student}:token_ratio"] = tokens["adaptive"] / tokens[fixed]
        found[f"{student}:token_ratio_greedy"] = tokens["adaptive"] / tokens["greedy"]
        for one, other in ((fixed, "greedy"), (fixed, "one"), ("adaptive", fixed)):
            found_difference = paired_difference(runs[one], runs[other])
            print(
                f"{student:5} {one} - {other}: {found_difference.mean:+.1%} "
                f"[{found_difference.low:+.1%}, {found_difference.high:+.1%}] n={found_difference.n_pairs}"
            )
    return found


def overhead(rounds: int) -> float:
    """CPU milliseconds of a step with eight candidates, the model's own time left out."""
    from sandbox import Meter  # the benchmark beside this one

    texts = [f"Thought: go.\n```python\nx = {n}\nprint(x % 3 * 7)\n```" for n in range(8)]

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
    parser.add_argument("--weak", type=Path, help="student folder to use as the weak one")
    parser.add_argument("--full", type=Path, help="student folder to use as the strong one")
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    options = parser.parse_args()
    began = time.monotonic()
    out = options.out / ("quick" if options.quick else "full")
    n, most, families = (8, 4, FAMILIES[:1]) if options.quick else (options.n, 8, options.families)
    spent = overhead(5 if options.quick else 30)
    print(f"a step with eight candidates: {spent:.1f} CPU-ms beyond the model's own", flush=True)
    given = {"weak": options.weak, "full": options.full}
    found = (
        given
        if all(given.values())
        else students(out, (4, 10) if options.quick else (10, 46), 48 if options.quick else 240)
    )
    rows = [
        row
        for family in families
        for name, student in found.items()
        for row in evaluate(name, student, family, out, n, most)
    ]
    metrics = {"cpu_ms_n8": spent, **figures(rows, most), "seconds": time.monotonic() - began}
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
