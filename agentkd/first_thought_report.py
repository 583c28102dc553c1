"""What first thoughts do to the teacher: the same tasks with and without, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentkd.collect import CollectConfig, Collected, Estimate, collect, expect, price_table
from agentkd.errors import ConfigError
from agentkd.evaluate import Cell, PairedDifference, paired_difference, summarise
from agentkd.expert import EXPERT_LABEL
from agentkd.first_thought import FOLDER, FirstThoughts
from agentkd.record import provenance, read_trajectories, write_json, write_text
from agentkd.rollouts import Progress, count_past
from agentkd.spend import Ledger
from agentkd.trajectory import Trajectory

__all__ = ["compare_first_thoughts", "expect_comparison"]

WITHOUT = "without-first-thought"
_PROGRAM = (
    "The teacher is a program, not a language model: it goes on from a prefix by rules and solves every task "
    "as it would have without. The table shows that prefixes are taken, given, continued and recorded; it "
    "says nothing about what they do to a model."
)

Show = Callable[[Progress], None] | None


def compare_first_thoughts(
    config: CollectConfig,
    out: Path,
    on_progress: Show = None,
    on_first_thought: Show = None,
    on_plain: Show = None,
) -> Collected:
    """Collect with first thoughts, then without, and report both on the tasks that both finished.

    The run without is kept in a folder of its own, ``OUT/without-first-thought``; the report is
    ``OUT/first-thought.md`` and ``.json``. All of it goes on where it stopped. Both runs share the
    budget, and each manifest has what its own run has spent.

    Args:
        config: settings of the run with first thoughts.
        out: the run's folder.
        on_progress, on_first_thought: see :func:`agentkd.collect.collect`.
        on_plain: told of each rollout without a first thought.

    Returns:
        The run with first thoughts, with the bill, the faults and the limit of both, and what is
        missing in both.

    Raises:
        ConfigError: the settings have no first thoughts.
        AgentkdError: as :func:`agentkd.collect.collect`.
    """
    without, prices = _without(config), price_table(config)
    before = Ledger(prices=prices)
    count_past(out / WITHOUT, before)
    ledger = Ledger(config.budget, prices, others=before.spent())
    given = collect(config, out, on_progress, on_first_thought, ledger)
    plain = collect(without, out / WITHOUT, on_plain, ledger=ledger.after(given.spent))
    assert given.first_thoughts is not None
    thoughts = read_trajectories(out / FOLDER / "trajectories.jsonl")
    figures = _figures(given.trajectories, plain.trajectories, thoughts, given.first_thoughts)
    figures["teacher"] = config.labels.get("teacher", config.agent.model)
    figures["programmatic"] = config.labels.get("teacher") == EXPERT_LABEL
    figures |= provenance()
    write_json(out / "first-thought.json", figures)
    write_text(out / "first-thought.md", _markdown(figures))
    return given._replace(
        wanted=given.wanted + plain.missing,
        spent=given.spent.plus(plain.spent),
        faults=dict((Counter(given.faults) + Counter(plain.faults)).most_common()),
        stopped=given.stopped or plain.stopped,
    )


def expect_comparison(config: CollectConfig, out: Path) -> Estimate:
    """What is left of both runs will cost; see :func:`agentkd.collect.expect`.

    Raises:
        ConfigError: as :func:`compare_first_thoughts`.
    """
    without = _without(config)
    return expect(config, out).plus(expect(without, out / WITHOUT))


def _without(config: CollectConfig) -> CollectConfig:
    if config.first_thought is None:
        raise ConfigError("There is nothing to compare.", "Use --compare together with --first-thought.")
    return config.model_copy(update={"first_thought": None})


def _figures(
    given: Sequence[Trajectory],
    plain: Sequence[Trajectory],
    thoughts: Sequence[Trajectory],
    found: FirstThoughts,
) -> dict[str, Any]:
    """All figures, over the tasks that both runs finished, and over those of them with a prefix."""
    both = {item.id for item in given} & {item.id for item in plain}
    begun = {item.id for item in given if item.steps and item.steps[0].first_thought is not None}
    tasks = {item.task.id for item in given if item.id in both}

    def compared(ids: set[str]) -> dict[str, Any]:
        ours, theirs = ([item for item in items if item.id in ids] for items in (given, plain))
        return {
            "with": _cell(ours),
            "without": _cell(theirs),
            "difference": paired_difference(ours, theirs)._asdict(),
        }

    return {
        **found.counts(),
        "all": compared(both),
        "with_prefix": compared(both & begun),
        "chain_of_thought": _cell([item for item in thoughts if item.task.id in tasks]),
    }


def _cell(runs: Sequence[Trajectory]) -> dict[str, Any]:
    return summarise("", runs).overall.model_dump(mode="json")


def _markdown(figures: dict[str, Any]) -> str:
    via = {
        "prefill": "the endpoint continued it",
        "instruction": "the endpoint cannot continue a message, so it was put into the question",
    }[figures["via"]]
    tasks = figures["used"] + sum(figures["dropped"].values())
    dropped = ", ".join(f"{count} {reason}" for reason, count in figures["dropped"].items())
    lines = [
        "# The teacher with and without first thoughts",
        "",
        f"Teacher: {figures['teacher']}. Prefixes were given for {figures['used']} of {tasks} tasks"
        + (f" (dropped: {dropped})" if dropped else "")
        + f"; {via}.",
        "",
        *([f"**{_PROGRAM}**", ""] if figures["programmatic"] else []),
        *_table("All tasks that both runs finished", figures["all"], figures["chain_of_thought"]),
    ]
    if figures["dropped"]:
        lines += _table("Only rollouts that were given a prefix", figures["with_prefix"], None)
    lines += [
        *_cost(figures),
        "Intervals are 95% Wilson intervals; the difference is paired by task, with a bootstrap interval. "
        "Rollouts that ended by an error of the machinery are not in n.",
        "",
    ]
    return "\n".join(lines)


def _cost(figures: dict[str, Any]) -> list[str]:
    """What the prefixes cost: the chains of thought come on top, one for all samples of a task."""
    given, thought, plain = figures["all"]["with"], figures["chain_of_thought"], figures["all"]["without"]
    if not given["n"] or not thought["n"]:
        return []
    whole = given["tokens_per_task"] + thought["tokens_per_task"] * thought["n"] / given["n"]
    return [
        f"The chains of thought are the price of the prefixes: with them a rollout cost {whole:,.0f} tokens, "
        f"without first thoughts {plain['tokens_per_task']:,.0f}.",
        "",
    ]


def _table(title: str, part: dict[str, Any], thought: dict[str, Any] | None) -> list[str]:
    rows = [("with first thoughts", part["with"]), ("without", part["without"])]
    if thought is not None:
        rows.append(("the chains of thought themselves", thought))
    difference = PairedDifference(**part["difference"])
    return [
        f"## {title}",
        "",
        "| | n | correct | accuracy | 95% interval | steps | tokens | of which sampled |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, Cell.model_validate(cell)) for name, cell in rows),
        "",
        f"Difference in accuracy (with minus without): {_points(difference.mean)} points "
        f"[{_points(difference.low)}, {_points(difference.high)}], n = {difference.n_pairs} tasks."
        if difference.n_pairs
        else "No task was finished by both.",
        "",
    ]


def _row(name: str, cell: Cell) -> str:
    if cell.accuracy is None:
        return f"| {name} | 0 | - | - | - | - | - | - |"
    means = (cell.steps_per_task, cell.tokens_per_task, cell.output_tokens_per_task)
    shown = " | ".join(
        f"{value:,.{digits}f}" for value, digits in zip(means, (2, 0, 0), strict=True) if value is not None
    )
    share = f"{cell.accuracy:.1%} | {cell.low:.1%} to {cell.high:.1%}"
    return f"| {name} | {cell.n} | {cell.correct} | {share} | {shown} |"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
