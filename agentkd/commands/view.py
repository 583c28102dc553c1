"""``agentkd view``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkd.commands.console import Json, print_json, progress_bar, working

if TYPE_CHECKING:
    from agentkd.view import Mask, Run

__all__ = ["register"]

_BIG = 100 * 2**20
"""Bytes of an exported page beyond which a browser is slow to open it."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "view",
        epilog="Examples:\n\n`agentkd view runs/maths`\n\n"
        "`agentkd view demo/evaluate/agent-distilled demo/evaluate/CoT-distilled` (side by side by question)\n\n"
        "`agentkd view runs/maths/kept --mask student` (which tokens a student learns)\n\n"
        "`agentkd view runs/maths --export maths.html` (one file, no network)",
    )(view)


def view(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run, filter or evaluation folders, a recipe's folder, or .jsonl files."),
    ],
    mask: Annotated[
        str | None,
        typer.Option(help="Colour what this student (or one of a base model) has in its loss."),
    ] = None,
    export: Annotated[Path | None, typer.Option(help="Write one page with everything in it instead.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in the browser.")] = True,
    as_json: Json = False,
) -> None:
    """Look at trajectories: search, filter, step by step, two runs side by side. Ctrl-C ends it."""
    from agentkd.view import Viewer, export_page, open_runs

    with working("Reading", as_json):
        opened = open_runs(runs)
        chosen = _mask(mask)
    said = {run.name: len(run.rows) for run in opened}
    if export is not None:
        with _counted(sum(said.values()), as_json) as show:
            count = export_page(opened, export, mask=chosen, on_progress=show)
        size = export.stat().st_size
        if as_json:
            print_json({"out": str(export), "trajectories": count, "bytes": size, "runs": said})
            return
        print(f"{count} trajectories in {export} ({size / 2**20:.1f} MB)")
        if size > _BIG:
            print(
                "A browser takes long to open a page of this size; `agentkd view` without --export does not."
            )
        return
    with Viewer(opened, mask=chosen, port=port) as viewer:
        _serve(viewer, opened, two=len(runs) == 2 == len(opened), browser=browser, as_json=as_json)


def _serve(viewer: Any, runs: list[Run], *, two: bool, browser: bool, as_json: bool) -> None:
    url = viewer.url + ("?two" if two else "")
    if as_json:
        print_json({"url": url, "runs": {run.name: len(run.rows) for run in runs}})
    else:
        for run in runs:
            left_out = f", {len(run.problems)} lines left out" if run.problems else ""
            print(f"{len(run.rows):7d} trajectories  {run.name}{left_out}")
        print(f"{url}\nCtrl-C ends it.", flush=True)
    if browser:
        import webbrowser

        webbrowser.open(url)
    try:
        viewer.wait()
    except KeyboardInterrupt:  # that is how it ends
        return


def _mask(name: str | None) -> Mask | None:
    if name is None:
        return None
    from agentkd.learnt import learnt_tokens

    return learnt_tokens(name)


@contextmanager
def _counted(total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    if quiet:
        yield None
        return
    with progress_bar() as bar:
        task = bar.add_task("export", total=total, note="")
        yield lambda done: bar.update(task, completed=done)
