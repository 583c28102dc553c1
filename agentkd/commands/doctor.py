"""``agentkd doctor``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = ["register"]

EPILOG = (
    "Examples:\n\n`agentkd doctor`\n\n`agentkd doctor --only sandbox --json`\n\n`agentkd doctor --api-base http://127.0.0.1:8000/v1`\n\n"
    "Exit code 0: the default sandbox works. 5: it does not. 4: the endpoint does not."
)
_MARKS = {"ok": "[green]✓[/green]", "missing": "[yellow]–[/yellow]", "broken": "[red]✗[/red]"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(doctor)


def doctor(
    api_base: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint to try, ending in /v1.")
    ] = None,
    only: Annotated[str, typer.Option(help='Parts to look at, as in "sandbox,extra"; all by default.')] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say what this machine can do, what is missing, and the one command that mends it.

    The sandbox is tried for real: a session is started, runs an action, and attempts what it must
    not be able to do.
    """
    from rich.console import Console

    from agentkd.doctor import examine

    with Console(stderr=True, quiet=as_json).status("") as status:
        diagnosis = examine(
            api_base,
            tuple(filter(None, only.split(","))),
            on_check=lambda name: status.update(f"Looking at {name}"),
        )
    if as_json:
        checks = [check._asdict() for check in diagnosis.checks]
        print(json.dumps({"ok": diagnosis.exit_code == 0, "checks": checks}, ensure_ascii=False))
    else:
        _show(diagnosis)
    raise typer.Exit(diagnosis.exit_code)


def _show(diagnosis: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="bold")
    for title in ("", "Part", "Name", "Finding"):
        table.add_column(title, overflow="fold")
    for check in diagnosis.checks:
        table.add_row(_MARKS[check.state], check.part, escape(check.name), escape(check.says))
    console = Console()
    console.print(table)
    mends = [check for check in diagnosis.checks if check.mend]
    if mends:
        console.print("\n[bold]To mend[/bold] (only what you need)")
    for check in mends:
        mark = _MARKS[check.state]
        console.print(f"{mark} {check.part} {escape(check.name)}:", highlight=False)
        console.print(f"    {escape(check.mend)}", highlight=False, soft_wrap=True)
