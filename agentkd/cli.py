"""The command line. Each command reads its options, calls one function and prints what came out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentkd.commands import collect as collect_command
from agentkd.commands import distill as distill_command
from agentkd.commands import doctor
from agentkd.commands import exchange as exchange_commands
from agentkd.commands import merge as merge_command
from agentkd.commands import retrieval as retrieval_commands
from agentkd.commands.console import (
    Corpus,
    Json,
    Out,
    Sandbox,
    Workers,
    announce,
    complain,
    leave,
    print_json,
    progress_bar,
)
from agentkd.errors import AgentkdError

if TYPE_CHECKING:
    from agentkd.rollouts import Progress

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
            complain(f"Error: {_first_problem(exc)}", "See --help.")
            leave(2)
        raise


def _first_problem(exc: Any) -> str:
    problem = exc.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}"


@contextmanager
def _rollout_progress(quiet: bool, *stages: str) -> Iterator[list[Callable[[Progress], None] | None]]:
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


distill_command.register(app)


@app.command(
    epilog="Examples:\n\n`agentkd evaluate student --tasks gym:products,lcm --n 100 --out eval`\n\n"
    "`agentkd evaluate smollm2-135m --kind cot --tasks gym:lcm --n 50 --out eval-base`"
)
def evaluate(
    student: Annotated[
        str | None, typer.Argument(help="Student folder, or a base model (name or folder) with --kind.")
    ] = None,
    *,
    tasks: Annotated[str, typer.Option(help="Taskset, see `agentkd collect --help`.")],
    out: Out,
    n: Annotated[int | None, typer.Option(min=1)] = None,
    split: Annotated[str, typer.Option(help='"test" or "train".')] = "test",
    api_base: Annotated[str | None, typer.Option(help="Evaluate what an endpoint serves instead.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id at that endpoint.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    kind: Annotated[str | None, typer.Option(help='"agent" or "cot"; the student\'s own by default.')] = None,
    sandbox: Sandbox = "fork",
    corpus: Corpus = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    actions: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Actions sampled at each step, at most; their majority acts. 1: no sampling."
        ),
    ] = 1,
    workers: Workers = 32,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Run a student, a base model or an endpoint on held-out tasks; accuracy with 95% intervals."""
    from agentkd.pipeline import evaluate_command

    announce(sandbox)
    with _rollout_progress(as_json, "evaluate") as [show]:
        result, table = evaluate_command(
            student=student,
            tasks=tasks,
            out=out,
            n=n,
            split=split,
            seed=seed,
            endpoint=(api_base, model, api_key),
            kind=kind,
            sandbox=sandbox,
            corpus=corpus,
            temperature=temperature,
            max_tokens=max_tokens,
            workers=workers,
            actions=actions,
            on_progress=show,
        )
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    from rich.console import Console

    Console().print(table)


@app.command(
    epilog="Examples:\n\n`agentkd serve student --port 8000`\n\n`agentkd serve expert` (the offline teacher)"
)
def serve(
    what: Annotated[str, typer.Argument(help='A student folder, or "expert".')],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    error_rate: Annotated[float, typer.Option(min=0, max=1, help="expert only: how often it errs.")] = 0.1,
    seed: int = 0,
) -> None:
    """Serve a student behind an OpenAI-compatible endpoint (`/v1/chat/completions`)."""
    if what == "expert":
        from agentkd.pipeline import serve_expert

        serve_expert(host, port, seed=seed, error_rate=error_rate)
        return
    from agentkd.serve import serve_student

    serve_student(Path(what), host=host, port=port)


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


for _commands in (merge_command, exchange_commands, doctor):
    _commands.register(app)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
