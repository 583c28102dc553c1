"""The first thoughts of merged runs: the pass of each task from one run, with its prefix and its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from agentkd.errors import ConfigError
from agentkd.first_thought import FOLDER, Prefix, load_first_thoughts
from agentkd.merge.logs import merge_calls, merge_faults, plan_calls
from agentkd.merge.trajectories import LOG, Found, copy_lines, find_trajectories, open_errors
from agentkd.record import read_json, write_json, write_jsonl

__all__ = ["given_alike", "merge_first_thoughts"]


def given_alike(runs: Sequence[Path], any_settings: bool) -> bool:
    """Whether all runs gave first thoughts in one way, so that they can be merged.

    Raises:
        ConfigError: some gave them by prefill, some by instruction; not with ``any_settings``.
    """
    ways = [(run, known.via) for run in runs if (known := load_first_thoughts(run)) is not None]
    for run, way in ways:
        if way != ways[0][1] and not any_settings:
            raise ConfigError(
                f"{ways[0][0]} and {run} gave first thoughts in different ways ({ways[0][1]}, {way}).",
                "Merge them all the same with --any-settings; first thoughts are then left out.",
            )
    return len({way for _, way in ways}) <= 1


def merge_first_thoughts(runs: Sequence[Path], out: Path, order: Mapping[str, int], found: Found) -> None:
    """Merge the passes into ``out/first-thought``, where there are any.

    Args:
        runs: run folders.
        out: the merged run.
        order: of the tasks, by id.
        found: the trajectories of the merged run: a task's prefix is that which they were given.
    """
    folders = [run / FOLDER for run in runs if (run / FOLDER / LOG).is_file()]
    if not folders:
        return
    prefer: dict[str, Path] = {}
    for name, place in found.places.items():
        prefer.setdefault(f"{name.rpartition('#')[0]}#0", place.path.parent / FOLDER)
    thoughts = find_trajectories(folders, order, prefer)
    merge_calls(folders, plan_calls(folders, thoughts.folders()), out / FOLDER)
    merge_faults(folders, out / FOLDER)
    if errors := list(open_errors(folders, thoughts)):
        write_jsonl(out / FOLDER / "errors.jsonl", errors)
    copy_lines(thoughts, out / FOLDER / LOG)
    _merge_prefixes(folders, out / FOLDER, thoughts)


def _merge_prefixes(folders: Sequence[Path], out: Path, thoughts: Found) -> None:
    known = {folder: load_first_thoughts(folder.parent) for folder in folders}
    lines: list[Prefix] = []
    for name, folder in thoughts.folders().items():
        task, from_it = name.rpartition("#")[0], known[folder]
        if from_it is not None and task in from_it.lines:  # else its pass was cut off before they were taken
            lines.append(from_it.lines[task])
    first = next((folder for folder in folders if known[folder] is not None), None)
    if first is not None:
        write_json(out / "endpoint.json", read_json(first / "endpoint.json"))
        write_jsonl(out / "prefixes.jsonl", lines)
