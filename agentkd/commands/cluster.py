"""``agentkd collect --engine ray``: what the command prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkd.commands.bill import bill_figures, bill_lines
from agentkd.commands.console import print_json, progress_bar

if TYPE_CHECKING:
    from agentkd.collect import CollectConfig

__all__ = ["run_on_ray"]


def run_on_ray(
    config: CollectConfig, out: Path, store: str | None, shards: int, address: str | None, as_json: bool
) -> None:
    """Collect on a cluster and say what came of it."""
    from agentkd.cluster import ClusterConfig, collect_on_ray

    cluster = ClusterConfig(shards=shards, address=address)
    if as_json:
        done = collect_on_ray(config, out, store, cluster)
        figures = {**done._asdict(), "folder": str(done.folder)}
        del figures["spent"], figures["unpriced"]
        print_json({**figures, **bill_figures(done.spent, done.unpriced, done.faults)})
        return
    with progress_bar() as bar:
        task: Any = bar.add_task("shards", total=None, note="")
        done = collect_on_ray(
            config, out, store, cluster, lambda ended, of: bar.update(task, completed=ended, total=of)
        )
    print(f"{done.trajectories} trajectories, {done.correct} correct, in {out / 'trajectories.jsonl'}")
    for line in bill_lines(done.spent, done.unpriced, done.faults, f"{out}/faults-*.jsonl"):
        print(line)
    for problem in done.problems:
        print(problem)
    for stopped in done.stopped:
        print(f"{stopped}: its part is spent.")
    if done.missing:
        print(f"{done.missing} tasks have no trajectory; run again to go on with them.")
    print(f"Next: agentkd filter {out} --out {out / 'kept'}")
