"""``agentkd export`` and ``agentkd import``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from agentkd.commands.console import Json, print_json, progress_bar

__all__ = ["register"]

_FORMATS = "chat, smolagents, reference, react, atif, datasets, steps or inspect; see docs/exchange.md."
_EXPORT = (
    "Examples:\n\n`agentkd export runs/maths --format chat --out maths-chat.jsonl`\n\n"
    "`agentkd export runs/maths/kept/kept.jsonl --format datasets --out maths-dataset`"
)
_IMPORT = (
    "Examples:\n\n`agentkd import theirs.jsonl --format chat --out runs/theirs`\n\n"
    "`agentkd import react.txt --format react --tasks tasks.jsonl --scorer f1 --out runs/react`"
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("export", epilog=_EXPORT)(export_command)
    app.command("import", epilog=_IMPORT)(import_command)


def export_command(
    source: Annotated[Path, typer.Argument(help="A run folder, a trajectories.jsonl or a kept.jsonl.")],
    form: Annotated[str, typer.Option("--format", "-f", help=_FORMATS)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File (.jsonl, .json, .parquet, .txt) or folder to write.")
    ],
    plain: Annotated[
        bool, typer.Option("--plain", help="Leave out what the format has no field for.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write trajectories in a format that others use, and say what it has no field for."""
    from agentkd.exchange import export_run

    with _counter("export", as_json) as show:
        done = export_run(source, out, form, plain=plain, on_progress=show)
    if as_json:
        print_json(
            {"out": str(out), "exported": done.count, "beside": dict(done.beside), "lost": dict(done.lost)}
        )
        return
    print(f"{done.count} trajectories in {out}")
    _table("carried beside, in the field `agentkd` (values)", done.beside)
    _table("lost (values)", done.lost)


def import_command(
    source: Annotated[Path, typer.Argument(help="A file, or a folder of JSON files or of datasets.")],
    form: Annotated[str, typer.Option("--format", "-f", help=_FORMATS)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write; it must not hold a run.")],
    tasks: Annotated[
        Path | None, typer.Option(help="tasks.jsonl with gold answers, joined by id or question.")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Compares the answers; the tasks' own by default, else exact.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read trajectories that others left, score them, and write a run for `filter` and `distill`."""
    from agentkd.exchange import import_run

    with _counter("import", as_json) as show:
        done = import_run(source, out, form, tasks=tasks, scorer=scorer, on_progress=show)
    if as_json:
        print_json(
            {
                "out": str(out),
                "imported": done.count,
                "correct": done.correct,
                "unscored": done.unscored,
                "tasks": len(done.tasks),
                "lost": dict(done.lost),
            }
        )
        return
    print(f"{done.count} trajectories of {len(done.tasks)} tasks, {done.correct} correct, in {out}")
    if done.unscored:
        print(f"{done.unscored} have no gold answer to be scored by; give --tasks.")
    _table("not carried over, or worded otherwise (values)", done.lost)
    print(f"Next: agentkd filter {out} --out {out / 'kept'}")


def _table(title: str, counts: Counter[str]) -> None:
    if counts:
        print(f"{title}:")
        for name, count in counts.most_common():
            print(f"  {count:7d}  {name}")


@contextmanager
def _counter(what: str, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    if quiet:
        yield None
        return
    with progress_bar() as bar:
        task: Any = bar.add_task(what, total=None, note="")
        yield lambda done: bar.update(task, completed=done) if done % 50 == 0 else None
