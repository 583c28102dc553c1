"""``agentkd collect --engine ray``: what the command prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        print_json({**done._asdict(), "folder": str(done.folder)})
        return
    with progress_bar() as bar:
        task: Any = bar.add_task("shards", total=None, note="")
        done = collect_on_ray(
            config, out, store, cluster, lambda ended, of: bar.update(task, completed=ended, total=of)
        )
    print(f"{done.trajectories} trajectories, {done.correct} correct, in {out / 'trajectories.jsonl'}")
    for problem in done.problems:
        print(problem)
    if done.missing:
        print(f"{done.missing} tasks have no trajectory; run again to go on with them.")
    print(f"Next: agentkd filter {out} --out {out / 'kept'}")
