"""The stage: from trajectories to the data sets of both trainings, in one call that can be stopped.

::

    OUT/adapt.json         what it is made of; a folder goes on with the same trajectories and rewriter only
    OUT/rewrite/           the calls of a rewriting teacher
    OUT/knowledge.jsonl    questions with solutions without tools: the first training
    OUT/partition/         the student's direct answers, append-only; of one student, sampled in one way
    OUT/partition.jsonl    easy or hard, each decision with its evidence
    OUT/mix.jsonl          the second training
    OUT/dropped.jsonl      what is in no data set, with the reason
    OUT/manifest.json      written last
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from agentkd.adapt.config import AdaptConfig
from agentkd.adapt.knowledge import Rejected, Rewriter, Solution, literal_rewriter, needs_rewriting
from agentkd.adapt.mix import Rows, balanced_copies
from agentkd.adapt.partition import Decision, Respondent, partition
from agentkd.errors import ConfigError, DataError
from agentkd.record import file_hash, read_json, read_trajectories, write_json, write_jsonl, write_manifest
from agentkd.rollouts import Progress
from agentkd.tool_use import used_tool
from agentkd.trajectory import StopReason, Trajectory

__all__ = ["Adapted", "Left", "adapt"]


class Left(BaseModel):
    """A question that is left out of a data set; one line of ``dropped.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_id: str
    data: str
    """"knowledge" or "mix"."""
    reason: str
    trajectory: str | None = None
    """Id of the trajectory that was judged."""


class Adapted(NamedTuple):
    """What an adaptation wrote."""

    folder: Path
    counts: dict[str, Any]
    """Questions and rows of each data set, and the reasons of what was left out."""

    @property
    def mixed(self) -> bool:
        """Whether a student was asked, and the second data set is there."""
        return "mix" in self.counts


class _Known(NamedTuple):
    """The trajectories that are used, one a question, and their solutions without tools."""

    traces: list[Trajectory]
    solutions: dict[str, Solution | None]
    """By trajectory; None where the trajectory itself has no tools in it."""
    left: list[Left]


def adapt(
    source: Path | str,
    out: Path | str,
    config: AdaptConfig | None = None,
    *,
    student: Respondent | None = None,
    rewriter: tuple[dict[str, str], Rewriter] | None = None,
    workers: int = 32,
    on_progress: Callable[[Progress], None] | None = None,
) -> Adapted:
    """Write the data sets of tool-usage adaptation.

    Args:
        source: trajectories with tools, or the folder that holds them; only right ones are used.
        out: a folder; an unfinished adaptation in it goes on.
        config: the settings.
        student: who is asked what it knows. Without one only ``knowledge.jsonl`` is written: train on it
            first, then run this again in the same folder with the student so taught.
        rewriter: what it is, for the record, and the function; :func:`literal_rewriter` by default.
        workers: questions in flight.
        on_progress: told of each direct answer.

    Raises:
        DataError: nothing to learn from, or all questions are easy, or all are hard (the files are written
            all the same).
        ConfigError: ``out`` holds an adaptation of other trajectories, or the answers of another student.
        ProviderError: an endpoint failed; what is finished is kept.
    """
    source, out = Path(source), Path(out)
    config = config or AdaptConfig()
    path = source / "trajectories.jsonl" if source.is_dir() else source
    named, rewrite = rewriter or ({"rewriter": "literal"}, literal_rewriter(config))
    made_of = {"input": _hash(path), **named}
    traces, left = _chosen(read_trajectories(path), config)
    _claim(out / "adapt.json", made_of, "trajectories, or another rewriter")
    known = _knowledge(traces, left, rewrite, config)
    rows = Rows(known.traces)
    knowledge = _knowledge_rows(known, rows, config)
    write_jsonl(out / "knowledge.jsonl", knowledge)
    counts: dict[str, Any] = {"questions": len(known.traces), "knowledge": _count(knowledge)}
    outputs = [out / "knowledge.jsonl"]
    mix: list[Trajectory] | None = None
    if student is not None:
        asked = {**student.identity, **config.model_dump(mode="json", include={"temperature", "max_tokens"})}
        _claim(
            out / "partition" / "student.json",
            asked,
            "direct answers: of another student, or otherwise sampled",
        )
        tasks = [trace.task for trace in known.traces]
        decisions = partition(
            tasks, student, out / "partition", config, workers=workers, on_progress=on_progress
        )
        write_jsonl(out / "partition.jsonl", decisions)
        mix = [*_kept(knowledge, decisions, config), *_mix(known, decisions, rows, config)]
        write_jsonl(out / "mix.jsonl", mix)
        easy = sum(decision.easy for decision in decisions)
        counts |= {"easy": easy, "hard": len(decisions) - easy, "mix": _count(mix)}
        outputs += [out / "partition.jsonl", out / "mix.jsonl"]
    write_jsonl(out / "dropped.jsonl", known.left)
    counts["dropped"] = dict(Counter(item.reason.split(":")[0] for item in known.left))
    identity = student.identity if student else None
    settings = {**config.model_dump(mode="json"), **named, "student": identity}
    write_manifest(out, stage="adapt", config=settings, counts=counts, inputs=[path], outputs=outputs)
    _refuse_one_sided(out, mix, counts)
    return Adapted(out, counts)


def _hash(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"There is no file {path}.", "Give a kept.jsonl, or the folder of a collection.")
    return file_hash(path)


def _claim(path: Path, content: dict[str, Any], what: str) -> None:
    if path.is_file() and read_json(path) != content:
        raise ConfigError(
            f"{path.parent} holds other {what}.",
            "Choose another --out, or remove the folder.",
        )
    write_json(path, content)


def _chosen(trajectories: Sequence[Trajectory], config: AdaptConfig) -> tuple[list[Trajectory], list[Left]]:
    """One right trajectory of each question: one with tools before one without, then the shortest."""
    usable: dict[str, list[Trajectory]] = {}
    for item in trajectories:
        if item.kind != "agent":
            continue
        good = item.correct and item.stop_reason == StopReason.FINAL_ANSWER
        usable.setdefault(item.task.id, []).extend([item] if good else [])
    if not trajectories:
        raise DataError("There are no trajectories.", "Run agentkd collect first, and agentkd filter.")
    if not usable:
        raise DataError(
            f"None of the {len(trajectories)} trajectories is an agent's.",
            "Collect with --kind agent: the tools' results are what is distilled.",
        )
    chosen = [
        min(items, key=lambda it: (not used_tool(it, config.tools), len(it.steps), it.sample))
        for items in usable.values()
        if items
    ]
    if not chosen:
        raise DataError("None of the trajectories is right.", "Collect with a better teacher.")
    wrong = [
        Left(task_id=task, data=data, reason="no right trajectory")
        for task, items in usable.items()
        if not items
        for data in ("knowledge", "mix")
    ]
    return chosen, wrong


def _knowledge(traces: list[Trajectory], left: list[Left], rewrite: Rewriter, config: AdaptConfig) -> _Known:
    with_tools = [trace for trace in traces if needs_rewriting(trace, config)]
    solutions: dict[str, Solution | None] = {
        trace.id: None for trace in traces if not needs_rewriting(trace, config)
    }
    for name, solution in rewrite(with_tools).items():
        if isinstance(solution, Rejected):
            task = next(trace.task.id for trace in with_tools if trace.id == name)
            left.append(Left(task_id=task, data="knowledge", reason=solution.reason, trajectory=name))
        else:
            solutions[name] = solution
    return _Known(traces, solutions, left)


def _knowledge_rows(known: _Known, rows: Rows, config: AdaptConfig) -> list[Trajectory]:
    """All questions under P_n, and, where wanted, under P_f."""
    found = [
        rows.direct(trace, known.solutions[trace.id], "direct")
        for trace in known.traces
        if trace.id in known.solutions
    ]
    if config.required:
        forced = [trace for trace in known.traces if used_tool(trace, config.tools)]
        found += [rows.with_tools(trace, "required") for trace in forced]
    if not found:
        first = next(item.reason for item in known.left if item.trajectory is not None)
        raise DataError(
            f"All {len(known.traces)} solutions were rejected, the first: {first}.",
            "Try another rewriter.",
        )
    return found


def _kept(
    knowledge: Sequence[Trajectory], decisions: Sequence[Decision], config: AdaptConfig
) -> list[Trajectory]:
    """What the second training repeats of the first one's."""
    easy = {decision.task_id for decision in decisions if decision.easy}
    wanted = {"all": lambda row: True, "easy": lambda row: row.task.id in easy, "none": lambda row: False}
    keep = wanted[config.keep_direct]
    return [row for row in knowledge if row.labels["prompt"] != "direct" or keep(row)]


def _mix(known: _Known, decisions: Sequence[Decision], rows: Rows, config: AdaptConfig) -> list[Trajectory]:
    """All questions under P_i: the easy ones answered directly, the hard ones with tools, in balance."""
    easy: list[Trajectory] = []
    hard: list[Trajectory] = []
    for trace, decision in zip(known.traces, decisions, strict=True):
        if decision.easy and trace.id in known.solutions:
            easy.append(trace)
        elif not decision.easy and used_tool(trace, config.tools):
            hard.append(trace)
        else:
            reason = "easy, but without a solution" if decision.easy else "hard, but without a tool in use"
            known.left.append(Left(task_id=trace.task.id, data="mix", reason=reason, trajectory=trace.id))
    copies = balanced_copies(len(easy), len(hard))
    found = [
        rows.direct(trace, known.solutions[trace.id], "allowed", **{"class": "easy", "copy": str(copy)})
        for copy in range(1, copies["easy"] + 1)
        for trace in easy
    ]
    found += [
        rows.with_tools(trace, "allowed", **{"class": "hard", "copy": str(copy)})
        for copy in range(1, copies["hard"] + 1)
        for trace in hard
    ]
    return found


def _count(rows: Sequence[Trajectory]) -> dict[str, int]:
    """Rows by prompt and target: ``{"direct direct": 80, "allowed tools": 40}``."""
    return dict(Counter(f"{row.labels['prompt']} {row.labels['target']}" for row in rows))


def _refuse_one_sided(out: Path, mix: list[Trajectory] | None, counts: dict[str, Any]) -> None:
    if mix is None:
        return
    sides = {row.labels["target"] for row in mix if row.labels["prompt"] == "allowed"}
    if len(sides) < 2:
        raise DataError(
            f"The mix would teach one thing only: {counts['easy']} questions are easy and {counts['hard']} "
            "hard for this student.",
            f"See {out / 'partition.jsonl'}; change tau, teach more knowledge first, or add other questions.",
        )
