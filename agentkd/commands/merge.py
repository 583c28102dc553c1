"""``agentkd merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agentkd.commands.console import Json, print_json, progress_bar

__all__ = ["register"]

_EXAMPLE = (
    "Example:\n\n`agentkd collect --shard 1/2 ... --out runs/a` on one machine and "
    "`agentkd collect --shard 2/2 ... --out runs/b` on another, then\n\n"
    "`agentkd merge runs/a runs/b --out runs/all`"
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge", epilog=_EXAMPLE)(merge)


def merge(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write; it must not hold a run.")],
    any_settings: Annotated[
        bool, typer.Option("--any-settings", help="Merge runs that were made with different settings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make one run of several, or of the shards of one: each trajectory once, in the order of the tasks."""
    from agentkd.merge import merge_runs

    if as_json:
        done = merge_runs(runs, out, any_settings=any_settings)
        print_json({"out": str(out), **done._asdict()})
        return
    with progress_bar() as bar:
        task: Any = bar.add_task("merge", total=None, note="")
        done = merge_runs(
            runs, out, any_settings=any_settings, on_progress=lambda seen: bar.update(task, completed=seen)
        )
    print(f"{done.trajectories} trajectories, {done.correct} correct, in {out / 'trajectories.jsonl'}")
    if done.duplicates:
        print(f"{done.duplicates} stood in more than one run; the first is kept.")
    if not done.logged:
        print("No run has a call log: the result cannot be replayed, and what it has cost is not known.")
    if done.missing_shards:
        print(f"No run was given of the shards {', '.join(done.missing_shards)}.")
    if done.missing_tasks:
        print(
            f"{done.missing_tasks} tasks have no trajectory; agentkd collect --out {out} goes on with them."
        )
