"""What the commands share: options that many of them have, and how they speak."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from agentkd.errors import ConfigError

if TYPE_CHECKING:
    from agentkd.rollouts import Progress

__all__ = [
    "Corpus",
    "Json",
    "Out",
    "Sandbox",
    "Workers",
    "announce",
    "complain",
    "leave",
    "print_json",
    "progress_bar",
    "rollout_progress",
    "setting_pairs",
    "working",
]

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; an unfinished run in it goes on.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Corpus = Annotated[
    str | None, typer.Option(help="What is searched: passages (.jsonl), an index, or a retriever's URL.")
]
Workers = Annotated[int, typer.Option(min=1, help="Rollouts in flight.")]
Sandbox = Annotated[
    str, typer.Option(help='Where model-written code runs: "fork", "e2b", "docker" or "local" (no boundary).')
]


def complain(*lines: str) -> None:
    """One line each on stderr, whatever stands in them."""
    for line in lines:
        if line:  # an endpoint's error may have line ends and control characters in it
            plain = "".join(char if char.isprintable() else " " for char in line)
            print(" ".join(plain.split()), file=sys.stderr)


def leave(code: int) -> NoReturn:
    """Exit at once: worker threads may still wait for an endpoint, and nothing is left to write."""
    import atexit

    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def setting_pairs(pairs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of ``--set name=value``.

    Raises:
        ConfigError: one has no sign between them.
    """
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set {pair!r} cannot be read.", "Write it as --set name=value.")
        yield name.strip(), value


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def progress_bar() -> Any:
    """A bar on stderr: what, how far, a note, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def announce(sandbox: str | None) -> None:
    """Say what the chosen sandbox is not."""
    if sandbox == "local":
        from agentkd.sandbox import LOCAL_WARNING

        print(f"Note: {LOCAL_WARNING}", file=sys.stderr)


@contextmanager
def working(what: str, quiet: bool) -> Iterator[None]:
    """A spinner on stderr while something takes its time."""
    if quiet:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def rollout_progress(quiet: bool, *stages: str) -> Iterator[list[Callable[[Progress], None] | None]]:
    """A live line for each stage, from when it begins: done, correct, errors, time left."""
    if quiet:
        yield [None] * len(stages)
        return
    with progress_bar() as bar:

        def shown(stage: str) -> Callable[[Progress], None]:
            task = bar.add_task(stage, total=None, note="", visible=False)

            def show(progress: Any) -> None:
                errors = f", {progress.errors} errors" if progress.errors else ""
                note = f"{progress.correct} correct{errors}"
                bar.update(task, completed=progress.done, total=progress.total, note=note, visible=True)

            return show

        yield [shown(stage) for stage in stages]
