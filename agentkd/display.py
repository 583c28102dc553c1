"""What a person sees while all stages run: one live list of stages, then the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.text import Text

if TYPE_CHECKING:
    from agentkd.rollouts import Progress

__all__ = ["Display", "RolloutDisplay"]

PLAIN_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Display:
    """One line a stage, live on a terminal and plain elsewhere.

    Args:
        quiet: show nothing (for ``--json``).
    """

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.live = self.console.is_terminal and not quiet
        self._progress = Bars(
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

    def say(self, line: str) -> None:
        """A line of its own, above what is live."""
        self.console.print(escape(line), highlight=False, soft_wrap=True)

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


class RolloutDisplay:
    """One live view of a run on stderr; where that is no terminal, a line now and then.

    Args:
        name: what is being done.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.console = Console(stderr=True)
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._drawn_at = 0.0
        self._said = ""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """For ``on_progress``; draws no more often than can be read."""
        terminal, now = self.console.is_terminal, time.monotonic()
        finished = progress.done >= progress.total
        if now < self._drawn_at + (0.25 if terminal else PLAIN_EVERY) and not finished:
            return
        self._drawn_at = now
        if terminal:
            self._live.update(self._view(progress))
        else:
            line = "; ".join([self._line(progress), *_waits(progress), *self._news(progress)])
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _view(self, progress: Progress) -> Group:
        bar = ProgressBar(total=max(1, progress.total), completed=progress.done, width=40)
        rows: list[Any] = [bar, Text(self._line(progress))]
        rows += [Text(line, style="yellow") for line in _waits(progress)]
        if progress.problem:
            rows.append(Text(f"last error: {progress.problem[:200]}", style="red"))
        return Group(*rows)

    def _news(self, progress: Progress) -> list[str]:
        """The last error, when it was not said before."""
        problem = " ".join(progress.problem.split())[:200]
        known, self._said = self._said, problem
        return [f"last error: {problem}"] if problem and problem != known else []

    def _line(self, progress: Progress) -> str:
        rate = progress.new / progress.seconds if progress.seconds else 0.0
        spent = progress.spent
        parts = [
            f"{self.name} {progress.done}/{progress.total}",
            f"{progress.correct} correct so far",
            f"{progress.in_flight} in flight",
            f"{60 * rate:.0f} a minute",
            f"{spent.tokens} tokens",
            f"${spent.cost:.2f}" if spent.cost else f"{spent.seconds:.0f} model-s",
        ]
        if progress.errors:
            parts.append(f"{progress.errors} errors")
        if rate and progress.done < progress.total:
            parts.append(f"{_duration((progress.total - progress.done) / rate)} left")
        return ", ".join(parts)


def _waits(progress: Progress) -> list[str]:
    return [f"{text} ({_duration(left)} left)" for text, left in progress.waits]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
