"""What a person sees while all stages run: one live list of stages, then the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Display"]


class Display:
    """One line a stage, live on a terminal and plain elsewhere.

    Args:
        quiet: show nothing (for ``--json``).
    """

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.live = self.console.is_terminal and not quiet
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._stage: TaskID | None = None
        self._name = ""
        self._began = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._name, self._began = name, time.monotonic()
        self._stage = self._progress.add_task(f"{name:<28}", total=None, note="")

    def done(self, note: str) -> None:
        """The current stage has ended."""
        assert self._stage is not None
        self._progress.update(self._stage, total=1, completed=1, note=escape(note))
        if not self.live:
            seconds = time.monotonic() - self._began
            self.console.print(f"{self._name:<28} {escape(note)} ({seconds:.1f} s)", highlight=False)

    def rollouts(self, progress: Any) -> None:
        """For ``on_progress`` of rollouts."""
        self._update(
            progress.done, progress.total, f"{progress.done}/{progress.total}, {progress.correct} correct"
        )

    def training(self, step: int, steps: int, loss: float) -> None:
        """For ``on_progress`` of training."""
        self._update(step, steps, f"step {step}/{steps}, loss {loss:.3f}")

    def _update(self, done: int, total: int, note: str) -> None:
        if self._stage is not None:
            self._progress.update(self._stage, completed=done, total=max(total, 1), note=note)

    def finish(
        self, table: Any, notes: Sequence[str], page: Path, next_steps: Sequence[str], began: float
    ) -> None:
        """The result: table, plain words, where the report lies, and what to do next."""
        out = Console()
        out.print(table)
        for note in notes:
            out.print(f"[dim]{escape(note)}[/dim]", highlight=False)
        minutes = (time.monotonic() - began) / 60
        out.print(f"\nReport: {page.resolve()}   ({minutes:.1f} min)", highlight=False, soft_wrap=True)
        out.print("Next:", highlight=False)
        for line in next_steps:
            out.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
