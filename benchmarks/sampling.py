"""Does self-consistent action sampling help a student, and what does it cost?

Two strengths of one student (an early checkpoint and the full training, from the offline expert's
trajectories), two one-step families and the two-hop one. Settings: greedy, one sample, N = 2, 4, 8, and
an adaptive number. All N share their drafts: where two settings see the same conversation, the smaller
one takes the first of the larger one's draws. Accuracy with 95% Wilson intervals; sampled tokens a
question; CPU time of a step beyond the model's.

n = 100 a cell is sized for about two hours on two cores; ``--quick`` (n = 8, one family, N = 4) takes some
minutes. An unfinished run goes on where it stopped. ``--steps WEAK,FULL`` says how long the two are
trained: the weak one should be near 50%, which two hops reach later than one step does. ``--weak`` and
``--full`` take students that are there already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import time
from collections import Counter
from collections.abc import Sequence
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
STUDENTS = ("weak", "full")
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


class Size(NamedTuple):
    """How much is done."""

    n: int
    """Questions a cell."""
    most: int
    """Candidates of a step, at most."""
    families: Sequence[str]
    steps: tuple[int, int]
    """Optimiser steps of the weak and of the full student."""
    collected: int
    """Training tasks, of all families together."""
    rounds: int
    """Steps of which the CPU time is measured."""


FULL = Size(n=100, most=8, families=FAMILIES, steps=(10, 46), collected=240, rounds=30)
QUICK = Size(n=8, most=4, families=FAMILIES[:1], steps=(4, 10), collected=48, rounds=5)


def students(out: Path, size: Size, given: dict[str, Path | None]) -> dict[str, Path]:
    """The same data, a short training and a whole one; what is given or finished is not done again."""
    steps = dict(zip(STUDENTS, size.steps, strict=True))
    found = {name: given[name] or out / "students" / f"{steps[name]}-steps" for name in STUDENTS}
    missing = [name for name in STUDENTS if not given[name] and not (found[name] / "manifest.json").is_file()]
    if not missing:
        return found
    with expert_endpoint(seed=0, error_rate=0.1) as url:
        agent = AgentConfig(model="offline-expert", api_base=url, search_k=2)
        collect(CollectConfig(tasks=TRAIN, n=size.collected, agent=agent), out / "collected")
    kept = out / "kept"
    filter_run(out / "collected", kept, FilterConfig())
    for name in missing:
        distill(kept / "kept.jsonl", found[name], DistillConfig(steps=steps[name]))
    return found


def settings(most: int) -> dict[str, SamplerConfig | None]:
    """The largest first, so that the others find their drafts."""
    chosen: dict[str, SamplerConfig | None] = {f"fixed{most}": SamplerConfig(n=most, confidence=None)}
    chosen |= {"adaptive": SamplerConfig(n=most), "greedy": None}
    chosen["one"] = SamplerConfig(n=1, confidence=None)
    return chosen | {f"fixed{n}": SamplerConfig(n=n, confidence=None) for n in (4, 2) if n < most}


def evaluate(name: str, student: Path, family: str, out: Path, size: Size) -> list[Row]:
    """All settings on one family; prints each as it is done."""
    rows = []
    taskset = load_taskset(family, "test", size.n, 1)
    retriever = BM25Retriever(taskset.passages) if taskset.passages else None
    cells = out / f"{name}-{student.resolve().name}" / family.replace(":", "-")
    drafts = cells / "drafts.pickle"
    Nested.cache = pickle.loads(drafts.read_bytes()) if drafts.is_file() else {}
    with open_system(str(student), max_tokens=MAX_TOKENS) as system:
        tools = search_tools(retriever, system.config)
        for setting, sampler in settings(size.most).items():
            config = system.config.model_copy(update={"sampler": sampler})

            def make(task: Any, sample: int, config: AgentConfig = config) -> Any:
                model = system.model if config.sampler is None else Nested(system.model)
                return agent_factory(config, tools, model)(task, sample)

            log = cells / setting / "trajectories.jsonl"
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


def pooled(rows: list[Row], most: int) -> dict[str, list[Trajectory]]:
    """The runs of all rows together, by setting."""
    return {name: [run for row in rows if row.setting == name for run in row.runs] for name in settings(most)}


def figures(rows: list[Row], most: int) -> dict[str, float]:
    """Accuracy and tokens over all families, of each student; the weak one's by their bare names, too."""
    found: dict[str, float] = {}
    for student in dict.fromkeys(row.student for row in rows):
        runs = pooled([row for row in rows if row.student == student], most)
        tokens = {name: sum(run.usage.output_tokens for run in members) for name, members in runs.items()}
        mine = {
            f"acc_{name}": sum(run.correct for run in members) / len(members)
            for name, members in runs.items()
        }
        mine["token_ratio"] = tokens["adaptive"] / tokens[f"fixed{most}"]
        found |= mine if student == "weak" else {}
        found |= {f"{student}:{name}": value for name, value in mine.items()}
        found[f"{student}:token_ratio_greedy"] = tokens["adaptive"] / tokens["greedy"]
    return found


def print_differences(rows: list[Row], most: int) -> None:
    """What a setting gains on the same questions, with 95% intervals: in each family, and in all."""
    fixed = f"fixed{most}"
    for student in dict.fromkeys(row.student for row in rows):
        mine = [row for row in rows if row.student == student]
        families = dict.fromkeys(row.family for row in mine)
        groups = {family: [row for row in mine if row.family == family] for family in families}
        for name, members in {**groups, "all": mine}.items():
            runs = pooled(members, most)
            for one, other in (("adaptive", fixed), (fixed, "greedy"), (fixed, "one")):
                gain = paired_difference(runs[one], runs[other])
                print(
                    f"{student:5} {name:20} {one} - {other}: {gain.mean:+.1%} "
                    f"[{gain.low:+.1%}, {gain.high:+.1%}] n={gain.n_pairs}"
                )


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


def two_steps(text: str) -> tuple[int, int]:
    """Reads ``WEAK,FULL``."""
    weak, full = map(int, text.split(","))
    if not 0 < weak < full:
        raise argparse.ArgumentTypeError(f"{text}: give two numbers of steps, the smaller one first")
    return weak, full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="n = 8, one family, at most four candidates")
    parser.add_argument("--n", type=int, help="questions a cell (100)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-sampling"))
    parser.add_argument(
        "--steps", type=two_steps, metavar="WEAK,FULL", help="optimiser steps of the two students (10,46)"
    )
    parser.add_argument("--weak", type=Path, help="student folder to use as the weak one")
    parser.add_argument("--full", type=Path, help="student folder to use as the strong one")
    parser.add_argument("--families", nargs="+", help=f"what is asked ({' '.join(FAMILIES)})")
    options = parser.parse_args()
    began = time.monotonic()
    out = options.out / ("quick" if options.quick else "full")
    asked = {name: getattr(options, name) for name in ("n", "steps", "families")}
    size = (QUICK if options.quick else FULL)._replace(**{k: v for k, v in asked.items() if v})
    spent = overhead(size.rounds)
    print(f"a step with eight candidates: {spent:.1f} CPU-ms beyond the model's own", flush=True)
    found = students(out, size, {"weak": options.weak, "full": options.full})
    print(*(f"{name} student: {folder}" for name, folder in found.items()), sep="\n", flush=True)
    rows = [
        row
        for family in size.families
        for name, student in found.items()
        for row in evaluate(name, student, family, out, size)
    ]
    print_differences(rows, size.most)
    metrics = {"cpu_ms_n8": spent, **figures(rows, size.most), "seconds": time.monotonic() - began}
    line = {
        "name": "sampling",
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "n": size.n,
        "runs": 1,
        "commit": provenance()["commit"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
