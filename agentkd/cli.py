"""The command line. Each command reads its options, calls one function and prints what came out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentkd.commands import adapt as adapt_command
from agentkd.commands import collect as collect_command
from agentkd.commands import compare as compare_command
from agentkd.commands import distill as distill_command
from agentkd.commands import doctor
from agentkd.commands import evaluate as evaluate_command
from agentkd.commands import exchange as exchange_commands
from agentkd.commands import merge as merge_command
from agentkd.commands import release as release_command
from agentkd.commands import report as report_command
from agentkd.commands import retrieval as retrieval_commands
from agentkd.commands import score as score_command
from agentkd.commands import serve as serve_command
from agentkd.commands import study as study_command
from agentkd.commands import transform as transform_command
from agentkd.commands import view as view_command
from agentkd.commands.console import (
    Json,
    Out,
    Sandbox,
    announce,
    complain,
    leave,
    print_json,
)
from agentkd.errors import AgentkdError, first_problem

if TYPE_CHECKING:
    pass

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Distil a tool-using LLM agent into a small model, and serve it.\n\n"
    "Start with `agentkd quickstart --out demo`: no GPU and no key are needed.",
)
for _commands in (retrieval_commands, collect_command):
    _commands.register(app)


def main() -> None:
    """Entry point: errors become one line and an exit code, see :mod:`agentkd.errors`."""
    import warnings

    # Deprecations inside transformers and peft are nothing a user of this command can act on.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        code = app(standalone_mode=False)  # typer returns 130 for Ctrl-C, and the code of an Exit
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        complain("Stopped. What is finished is kept; run the same command again to go on.")
        leave(130)
    except AgentkdError as exc:
        complain(f"Error: {exc.message}", exc.hint)
        leave(exc.exit_code)
    except OSError as exc:
        where = f" ({exc.filename})" if exc.filename else ""
        complain(f"Error: {exc.strerror or exc}{where}", "Is the disk full, or the folder not writable?")
        leave(7)
    except Exception as exc:
        if hasattr(exc, "format_message"):  # click's own usage errors
            if exc.format_message():  # empty when no argument was given, and help has been printed
                complain(f"Error: {exc.format_message()}", "See --help.")
            leave(2)
        if type(exc).__name__ == "ValidationError":
            complain(f"Error: {first_problem(exc)}", "See --help.")
            leave(2)
        raise


@app.command("filter", epilog="Example:\n\n`agentkd filter runs/maths --out runs/maths/kept`")
def filter_command(
    source: Annotated[Path, typer.Argument(help="A run folder or a trajectories.jsonl.")],
    out: Out,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Lowest score that is kept.")] = 1.0,
    allow_parse_errors: Annotated[bool, typer.Option(help="Keep steps without a valid code block.")] = False,
    per_task: Annotated[int, typer.Option(min=1, help="Trajectories kept of one task.")] = 1,
    max_similarity: Annotated[float, typer.Option(min=0, max=1, help="Near duplicates are dropped.")] = 0.9,
    per_difficulty: Annotated[int | None, typer.Option(min=1, help="Kept of each difficulty.")] = None,
    as_json: Json = False,
) -> None:
    """Keep what is worth learning from: `kept.jsonl`, and `dropped.jsonl` with every reason."""
    from agentkd.filter import FilterConfig, filter_run

    config = FilterConfig(
        min_score=min_score,
        allow_parse_errors=allow_parse_errors,
        per_task=per_task,
        max_similarity=max_similarity,
        per_difficulty=per_difficulty,
    )
    result = filter_run(source, out, config)
    figures = {"kept": len(result.kept), "dropped": len(result.dropped), "reasons": dict(result.reasons)}
    if as_json:
        print_json(figures)
        return
    print(f"{len(result.kept)} kept, {len(result.dropped)} dropped")
    for reason, count in result.reasons.most_common():
        print(f"  {count:5d}  {reason}")
    print(f"Next: agentkd distill {out / 'kept.jsonl'} --out student")


for _commands in (
    transform_command,
    adapt_command,
    distill_command,
    evaluate_command,
    report_command,
    compare_command,
    score_command,
    study_command,
    serve_command,
    view_command,
):
    _commands.register(app)


@app.command(
    epilog="Examples:\n\n`agentkd quickstart --out demo`\n\n`agentkd quickstart --full --out demo-full`"
)
def quickstart(
    out: Out = Path("demo"),
    full: Annotated[
        bool, typer.Option("--full", help="n >= 400 and a longer CoT baseline; an hour or more.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A minute at toy size: shows the loop, not the result.")
    ] = False,
    sandbox: Sandbox = "fork",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the folder first.")] = False,
    as_json: Json = False,
) -> None:
    """The whole loop on this machine: collect, filter, distil, evaluate, report, serve.

    No GPU and no key; an unfinished run in the folder goes on where it stopped.
    """
    from agentkd.pipeline import quickstart as run

    size: Literal["tiny", "demo", "full"] = "full" if full else "tiny" if tiny else "demo"
    announce(sandbox)
    summary = run(out, size=size, sandbox=sandbox, fresh=fresh, quiet=as_json)
    if as_json:
        print_json(summary)


@app.command("run", epilog="Example:\n\n`agentkd run examples/recipe.toml --out runs/mine`")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, see examples/recipe.toml.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Run all stages of a recipe in order; finished stages are not run again."""
    from agentkd.pipeline import load_recipe, run_recipe

    summary = run_recipe(load_recipe(recipe), out, quiet=as_json)
    if as_json:
        print_json(summary)


def _version(value: bool) -> None:
    if value:
        from agentkd import __version__

        print(f"agentkd {__version__}")
        raise typer.Exit


for _commands in (merge_command, exchange_commands, release_command, doctor):
    _commands.register(app)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
