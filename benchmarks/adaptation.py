"""Does a student learn to use tools only where it needs them, and what does that save?

Questions that a student can know (facts of some entities of the almanac, taught by world-knowledge
distillation; each is tested in a phrasing in which that fact was never asked) and questions it cannot
(look-ups about entities of another world, products of five- and six-digit numbers). One student is
distilled from the offline expert's trajectories and always uses tools; it is taught the facts, asked
directly what it knows, and trained on the balanced mix (``agentkd adapt``, ``agentkd distill --from``).

Compared are the student before (always-tool), the adapted one under its stock prompt, and the adapted one
under the prompt without tools (never-tool). Accuracy with 95% Wilson intervals, tool-usage accuracy
(easy and hard by the adapted student's own direct answers) with a 95% interval, and prompt plus sampled
tokens a question. About forty minutes of CPU time; ``--quick`` shows in some minutes that it runs. An
unfinished run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from agentkd.adapt import AdaptConfig, Respondent, adapt
from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.collect import CollectConfig, collect
from agentkd.distill import DistillConfig, distill
from agentkd.evaluate.figures import paired_difference, wilson
from agentkd.filter import FilterConfig, filter_run
from agentkd.pipeline import expert_endpoint
from agentkd.record import provenance, read_trajectories, write_jsonl
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.rollouts import run_rollouts
from agentkd.router import RouterConfig
from agentkd.system import open_system
from agentkd.task import Task
from agentkd.taskset import load_taskset
from agentkd.taskset.almanac import RELATIONS, World, build_world
from agentkd.taskset.split import stable_hash
from agentkd.tool_use import ToolUsage, tool_usage_accuracy, used_tool
from agentkd.trajectory import Trajectory

TAUGHT = {
    "person": ("born", "birthplace", "occupation", "teacher"),
    "town": ("founded", "mayor", "specialty"),
    "ship": ("captain", "built", "port"),
}
"""Relations that are asked for, by kind of entity; each has three phrasings."""


class Size(NamedTuple):
    """How large a run is."""

    entities: int
    """Entities of each kind whose facts are taught."""
    lookups: int
    """Look-ups of facts that are not taught, to learn from."""
    products: int
    """Products to learn from."""
    n: int
    """Hard questions of each kind in the test."""
    steps: tuple[int, int, int]
    """Optimiser steps: of the student with tools, of the knowledge, of the mix."""


FULL = Size(entities=12, lookups=250, products=20, n=100, steps=(40, 360, 300))
QUICK = Size(entities=2, lookups=24, products=8, n=8, steps=(20, 60, 40))


class Questions(NamedTuple):
    """What is learnt, and what is tested."""

    known: list[Task]
    unknown: list[Task]
    test: list[Task]
    passages: list[Any]


def question(world: World, entity: str, relation: str, phrasing: int, family: str) -> Task:
    """One look-up. Phrasing 2 is the one that the almanac's own train split never uses."""
    asks = (*RELATIONS[relation].asks, RELATIONS[relation].heldout_ask)
    text, answer = asks[phrasing].format(x=entity), world.lookup(entity, relation)
    assert answer is not None
    return Task(
        id=f"{family}-{stable_hash(world.split, text):016x}",
        question=text,
        answer=answer,
        scorer="numeric" if answer.isdigit() else "exact",
        family=family,
        split=world.split,
    )


def questions(size: Size, seed: int) -> Questions:
    """The taught facts in two of three phrasings to learn and in the third to test; and the hard ones."""
    rng = random.Random(seed)
    home, abroad = build_world(seed, "train"), build_world(seed, "test")
    known: list[Task] = []
    test: list[Task] = []
    elsewhere: list[tuple[str, str]] = []
    for kind, relations in TAUGHT.items():
        own = [name for name in home.entities[kind] if name not in abroad.entities[kind]]
        rng.shuffle(own)
        for entity in own[: size.entities]:
            for relation in relations:
                held = rng.randrange(3)
                for phrasing in range(3):
                    part = test if phrasing == held else known
                    part.append(question(home, entity, relation, phrasing, "known"))
        elsewhere += [(kind, entity) for entity in own[size.entities :]]
    rng.shuffle(elsewhere)
    unknown = [
        question(home, entity, rng.choice(TAUGHT[kind]), rng.randrange(3), "look-up")
        for kind, entity in elsewhere[: size.lookups]
    ]
    foreign = [
        (kind, name) for kind in TAUGHT for name in abroad.entities[kind] if name not in home.entities[kind]
    ]
    test += [
        question(abroad, entity, rng.choice(TAUGHT[kind]), rng.randrange(3), "look-up")
        for kind, entity in rng.sample(foreign, size.n)
    ]
    unknown += _products(size.products, "train", seed)
    test += _products(size.n, "test", seed)
    return Questions(known, unknown, test, [*home.passages, *abroad.passages])


def _products(n: int, split: str, seed: int) -> list[Task]:
    tasks = load_taskset("gym:products@hard", split, n, seed).tasks
    return [task.model_copy(update={"family": "product"}) for task in tasks]


def trajectories(part: Sequence[Task], data: Questions, out: Path) -> Path:
    """What the offline expert does with tools, filtered."""
    write_jsonl(out / "tasks.jsonl", part)
    write_jsonl(out / "passages.jsonl", data.passages)
    with expert_endpoint(seed=0, error_rate=0.0) as url:
        config = CollectConfig(
            tasks=str(out / "tasks.jsonl"),
            split="all",
            corpus=out / "passages.jsonl",
            agent=AgentConfig(model="offline-expert", api_base=url, search_k=2),
        )
        collect(config, out)
    filter_run(out, out / "kept", FilterConfig())
    return out / "kept" / "kept.jsonl"


THOUGHT = "{goal} I know it: it is {answer}."
"""Both kinds of solution begin with the same words, which name the entity. A thought that begins "I know
this" would decide before the name is said."""


def respondent(student: Path) -> Respondent:
    """A student to be asked what it knows."""

    @contextmanager
    def source(config: AdaptConfig) -> Iterator[tuple[AgentConfig, Any]]:
        with open_system(str(student), max_tokens=config.max_tokens) as system:
            yield system

    return Respondent({"student": student.name}, source)


def train(out: Path, data: Questions, size: Size) -> tuple[Path, Path]:
    """The student that always uses tools, and the one that was adapted."""
    known = trajectories(data.known, data, out / "known")
    unknown = trajectories(data.unknown, data, out / "unknown")
    everything = read_trajectories(known) + read_trajectories(unknown)
    write_jsonl(out / "all.jsonl", everything)
    before, informed, after = out / "always-tool", out / "informed", out / "adapted"
    first, second, third = size.steps
    distill(unknown, before, DistillConfig(steps=first), shown("tools"))
    adapt(known, out / "adapt-known", AdaptConfig(thought=THOUGHT))
    teach = DistillConfig(steps=second, parent=str(before))
    distill(out / "adapt-known" / "knowledge.jsonl", informed, teach, shown("knowledge"))
    config = AdaptConfig(keep_direct="easy", thought=THOUGHT)
    counts = adapt(out / "all.jsonl", out / "adapt", config, student=respondent(informed)).counts
    print(json.dumps(counts), flush=True)
    last = DistillConfig(steps=third, parent=str(informed))
    distill(out / "adapt" / "mix.jsonl", after, last, shown("mix"))
    return before, after


def shown(name: str) -> Any:
    def show(step: int, steps: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            print(f"{name}: step {step}/{steps}, loss {loss:.3f}", flush=True)

    return show


def run(student: Path, data: Questions, out: Path, direct: bool = False) -> list[Trajectory]:
    """A student on the test questions: with its own prompt and tools, or directly."""
    with open_system(str(student), max_tokens=160) as system:
        config = system.config.model_copy(update={"search_k": 2})
        tools = search_tools(BM25Retriever(data.passages), config)
        if direct:
            config = config.model_copy(update={"router": RouterConfig(kind="never")})
        return run_rollouts(
            data.test,
            agent_factory(config, tools, system.model),
            out / "trajectories.jsonl",
            workers=16,
            log_calls=False,
        )


def tokens(runs: Sequence[Trajectory]) -> float:
    """Prompt plus sampled tokens a question."""
    return sum(run.usage.input_tokens + run.usage.output_tokens for run in runs) / max(1, len(runs))


def interval(usage: ToolUsage) -> tuple[float, float]:
    """95% interval of the mean of two independent shares, from their Wilson intervals (Newcombe 1998)."""
    assert usage.on_easy is not None and usage.on_hard is not None and usage.accuracy is not None
    easy = wilson(usage.easy_without, usage.easy_without + usage.easy_with)
    hard = wilson(usage.hard_with, usage.hard_with + usage.hard_without)
    down = ((usage.on_easy - easy[0]) ** 2 + (usage.on_hard - hard[0]) ** 2) ** 0.5 / 2
    up = ((easy[1] - usage.on_easy) ** 2 + (hard[1] - usage.on_hard) ** 2) ** 0.5 / 2
    return usage.accuracy - down, usage.accuracy + up


def row(name: str, runs: Sequence[Trajectory]) -> str:
    correct, used = sum(item.correct for item in runs), sum(used_tool(item) for item in runs)
    low, high = wilson(correct, len(runs))
    return (
        f"{name:24} {correct / len(runs):6.1%} [{low:.0%}, {high:.0%}]  "
        f"tools {used / len(runs):6.1%}  {tokens(runs):7.1f} tokens a question  n = {len(runs)}"
    )


def report(systems: dict[str, list[Trajectory]]) -> dict[str, Any]:
    """The table, and the figures."""
    easy_ids = {item.task.id for item in systems["never-tool"] if item.correct and not used_tool(item)}
    metrics: dict[str, Any] = {}
    for name, runs in systems.items():
        print(row(name, runs))
        for family in ("known", "look-up", "product"):
            print(row(f"  {family}", [item for item in runs if item.task.family == family]))
        usage = tool_usage_accuracy((item.task.id in easy_ids, used_tool(item)) for item in runs)
        if usage.accuracy is not None:
            low, high = interval(usage)
            counts = f"a, b, c, d = {', '.join(map(str, usage))}"
            print(f"  tool-usage accuracy {usage.accuracy:.1%} [{low:.0%}, {high:.0%}], {counts}")
        metrics[f"tool_usage_{name.replace('-', '_')}"] = usage.accuracy
    before, after = systems["always-tool"], systems["adapted"]
    difference = paired_difference(after, before)
    print(
        f"adapted - always-tool: {difference.mean:+.1%} [{difference.low:+.1%}, {difference.high:+.1%}] "
        f"n = {difference.n_pairs}"
    )
    easy = [[item for item in runs if item.task.id in easy_ids] for runs in (after, before)]
    right = [sum(item.correct for item in runs) for runs in (after, before)]
    return {
        "tool_usage_accuracy": metrics.pop("tool_usage_adapted"),
        "acc_adapted": right[0] / len(after),
        "acc_always_tool": right[1] / len(before),
        "acc_adapted_interval": wilson(right[0], len(after)),
        "acc_always_tool_interval": wilson(right[1], len(before)),
        "acc_difference_interval": (difference.low, difference.high),
        "token_ratio": tokens(easy[0]) / tokens(easy[1]) if easy_ids else None,
        "easy_by_own_answers": len(easy_ids),
        **metrics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="some minutes, too small to conclude anything")
    parser.add_argument("--out", type=Path, default=None, help="folder; an unfinished run in it goes on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    out = arguments.out or Path("runs") / ("adaptation-quick" if arguments.quick else "adaptation")
    data = questions(size, arguments.seed)
    before, after = train(out, data, size)
    systems = {
        "never-tool": run(after, data, out / "test" / "never-tool", direct=True),
        "adapted": run(after, data, out / "test" / "adapted"),
        "always-tool": run(before, data, out / "test" / "always-tool"),
    }
    metrics = report(systems)
    commit = provenance()["commit"]
    print(
        json.dumps(
            {"name": "adaptation", "metrics": metrics, "n": len(data.test), "runs": 1, "commit": commit}
        )
    )


if __name__ == "__main__":
    main()
