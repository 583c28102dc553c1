"""The report of any evaluation runs: what stands in their folders, on one page with a viewer beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from agentkd.errors import ConfigError, DataError, boundary, first_problem
from agentkd.evaluate import PairedDifference, SystemResult, latest_runs, paired_difference, summarise
from agentkd.record import read_json
from agentkd.report import PAPER_SETS, Published, beside_published, size_of, write_report
from agentkd.trajectory import Trajectory

__all__ = [
    "differences_from",
    "examples_of",
    "paper_rows",
    "report_runs",
    "tool_use_of",
    "training_losses",
    "write_viewer",
]

EXAMPLES = 12
VIEWER_LIMIT = 64 * 2**20
"""Bytes of trajectories that are put into a page beside the report; of more, there is none."""


def report_runs(
    paths: Sequence[Path],
    out: Path,
    *,
    title: str = "Evaluation",
    main: str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    paper: str | None = None,
) -> Path:
    """Write a report of evaluation folders; the path of its page.

    Args:
        paths: evaluation folders, or folders with an ``evaluate/`` in them (a recipe's).
        out: folder of the report.
        title: heading of the page.
        main: the system that the others are compared with; by default the last.
        groups: families to pool, by name; those of a recipe are taken from it.
        paper: size of the paper's student to put the published means beside, as "0.5B".

    Raises:
        ConfigError: no such folder, system or size.
        DataError: no evaluation in a folder.
    """
    folders = _named([folder for path in paths for folder in _evaluations(path)])
    recipes = [read_json(path / "recipe.json") for path in paths if (path / "recipe.json").is_file()]
    pooled = dict(groups or {})
    for recipe in recipes:
        pooled = {**(recipe.get("groups") or {}), **pooled}
    runs: dict[str, list[Trajectory]] = {}
    notes = [note for recipe in recipes for note in recipe.get("notes") or ()]
    for label, folder in folders.items():
        runs[label], problems = _read(folder / "trajectories.jsonl")
        notes += _notes(label, folder, runs[label], problems)
    main = main or list(runs)[-1]
    if main not in runs:
        raise ConfigError(f"There is no system {main!r} here.", f"There are: {', '.join(runs)}.")
    results = [summarise(label, found, pooled) for label, found in runs.items()]
    students = {label: _student(folder) for label, folder in folders.items()}
    bases = {label: _base(folder) for label, folder in students.items() if folder}
    return write_report(
        out,
        title=title,
        results=results,
        differences=differences_from(main, runs),
        losses={label: training_losses(folder) for label, folder in students.items() if folder},
        config={label: _settings(folder) for label, folder in folders.items()},
        versions=_versions(runs, notes),
        notes=notes,
        examples=examples_of(runs[main]),
        tool_use={label: tool_use_of(found) for label, found in runs.items()},
        published=beside_published(results, paper) if paper else paper_rows(results, bases.values()),
        viewer=write_viewer(out, list(folders.values()), folders[main]),
    )


def _evaluations(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ConfigError(f"There is no folder {path}.", "Name what agentkd evaluate wrote.")
    if (path / "trajectories.jsonl").is_file():
        return [path]
    found = sorted(file.parent for file in path.glob("evaluate/*/trajectories.jsonl"))
    if not found:
        raise DataError(
            f"{path} holds no evaluation.",
            "Write one by: agentkd evaluate.",
        )
    return sorted(found, key=_order)


def _order(folder: Path) -> tuple[int, str]:
    """The untrained model first, agents last."""
    kind = 2 if folder.name.startswith("agent") else 0 if folder.name == "base" else 1
    return kind, folder.name


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    names = Counter(folder.resolve().name for folder in folders)
    labels: dict[str, Path] = {}
    for folder in folders:
        label = folder.resolve().name
        if names[label] > 1:
            label = str(folder)
        if label in labels:
            raise ConfigError(f"{folder} was named twice.", "Name every evaluation once.")
        labels[label] = folder
    return labels


def _read(path: Path) -> tuple[list[Trajectory], list[str]]:
    """The trajectories that can be read, and what is wrong with the others."""
    found: list[Trajectory] = []
    problems: list[str] = []
    with boundary(DataError, f"reading {path}"), path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                found.append(Trajectory.model_validate_json(raw))
            except ValidationError as exc:
                if not raw.endswith(b"\n"):
                    continue  # the last line of a run that is still being written
                problems.append(f"line {number}: {first_problem(exc)}")
    return found, problems


def _notes(label: str, folder: Path, runs: Sequence[Trajectory], problems: Sequence[str]) -> list[str]:
    notes = []
    if problems:
        notes.append(
            f"{label}: {len(problems)} lines could not be read and are not counted ({problems[0]}); "
            "they may be of another version of agentkd."
        )
    if not (folder / "manifest.json").is_file():
        wanted = folder / "tasks.jsonl"
        of = f" of {sum(1 for line in wanted.open('rb') if line.strip())}" if wanted.is_file() else ""
        notes.append(f"{label}: not finished; {len(latest_runs(runs))}{of} tasks are counted.")
    ungraded = sum(run.task.answer is None for run in runs)
    if ungraded:
        notes.append(f"{label}: {ungraded} runs have no gold answer; they count as not correct.")
    return notes


def _student(folder: Path) -> Path | None:
    """The student that was evaluated, where it lies beside its evaluation as a recipe leaves it."""
    beside = folder.resolve().parent.parent / "students" / folder.resolve().name
    return beside if (beside / "student.json").is_file() else None


def _base(student: Path) -> str:
    return str(read_json(student / "student.json").get("base", ""))


def _settings(folder: Path) -> dict[str, Any]:
    manifest = folder / "manifest.json"
    return dict(read_json(manifest).get("config") or {}) if manifest.is_file() else {}


def _versions(runs: Mapping[str, Sequence[Trajectory]], notes: list[str]) -> dict[str, str]:
    """Of the first run; a note for every run that was made with others."""
    first: dict[str, str] = {}
    for label, found in runs.items():
        if not found:
            continue
        own = {**found[0].versions, **({"commit": found[0].commit[:12]} if found[0].commit else {})}
        first = first or own
        other = {name: value for name, value in own.items() if first.get(name) != value}
        if other:
            shown = ", ".join(f"{name} {value}" for name, value in other.items())
            notes.append(f"{label} was made with other versions than the first system: {shown}.")
    return first


def differences_from(main: str, runs: Mapping[str, Sequence[Trajectory]]) -> dict[str, PairedDifference]:
    """Paired differences in accuracy of one system from each of the others, by "MAIN minus OTHER"."""
    return {
        f"{main} minus {other}": paired_difference(runs[main], found)
        for other, found in runs.items()
        if other != main
    }


def examples_of(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """A right and a wrong one of every family, so that a reader sees both."""
    chosen: dict[tuple[str, bool], Trajectory] = {}
    for item in trajectories:
        chosen.setdefault((item.task.family, item.correct), item)
    return list(chosen.values())[:EXAMPLES]


def tool_use_of(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Share of the runs (0 to 1) that called each tool, errored runs left out; most used first."""
    runs = [run for run in latest_runs(trajectories) if not run.stop_reason.is_error]
    called = ({use.name for step in run.steps for use in step.tool_uses} for run in runs)
    counts = Counter(tool for tools in called for tool in tools)
    return {tool: count / len(runs) for tool, count in counts.most_common()}


def training_losses(student: Path) -> list[tuple[int, float]]:
    """``(step, loss)`` of a student's training; empty where it left none."""
    path = student / "loss.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(row["step"], row["loss"]) for row in rows]


def paper_rows(results: Sequence[SystemResult], bases: Iterable[str]) -> list[Published]:
    """The paper's means, where these are its models on its eight test sets; else nothing."""
    sizes = {size_of(base) for base in bases}
    ran = {family for result in results for family in result.families}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    return beside_published(results, size) if size and ran.issuperset(PAPER_SETS) else []


def write_viewer(out: Path, folders: Sequence[Path], main: Path) -> str:
    """Write ``trajectories.html`` beside a report; its address from there, open on the main system.

    Runs that are too much for a page are left out of it; the address is then empty.
    """
    from agentkd.view import export_page, open_runs

    if sum((folder / "trajectories.jsonl").stat().st_size for folder in folders) > VIEWER_LIMIT:
        return ""
    runs = open_runs(list(folders))
    export_page(runs, out / "trajectories.html")
    return f"trajectories.html#run={quote(runs[list(folders).index(main)].name)}"
