"""``agentkd report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentkd.commands.console import Json, print_json, working
from agentkd.errors import ConfigError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "report",
        epilog="Examples:\n\n`agentkd report runs/base runs/student --out report`\n\n"
        '`agentkd report demo --group "arithmetic=products,lcm" --out report`\n\n'
        "`agentkd report runs/* --main student --paper 0.5B --out report`",
    )(report)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Evaluation folders, baselines first, or a recipe's folder (all in it)."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report; an older one is replaced.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Evaluation",
    main: Annotated[
        str | None, typer.Option(help="The system that the others are compared with; the last by default.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help='Families to pool, as "NAME=FAMILY,FAMILY". May be repeated.')
    ] = None,
    paper: Annotated[
        str | None, typer.Option(help="Put the paper's means for students of this size beside: 0.5B to 7B.")
    ] = None,
    as_json: Json = False,
) -> None:
    """One page of figures, plots and examples: `index.html`, `report.md`, `report.json`, `trajectories.html`."""
    from agentkd.record import read_json
    from agentkd.run_report import report_runs

    groups = _groups(group or [])
    with working("Writing the report", as_json):
        page = report_runs(runs, out, title=title, main=main, groups=groups, paper=paper)
    if as_json:
        print_json({"report": str(page), **read_json(page.with_name("report.json"))})
        return
    print(f"Report: {page}")


def _groups(given: list[str]) -> dict[str, list[str]]:
    groups = {}
    for text in given:
        name, mark, families = text.partition("=")
        if not (name and mark and families):
            raise ConfigError(f"--group {text!r} cannot be read.", 'Write it as "NAME=FAMILY,FAMILY".')
        groups[name] = [family.strip() for family in families.split(",")]
    return groups
