"""The command line. Each command reads its options, calls one function and prints what came out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentkd.commands import exchange as exchange_commands
from agentkd.commands import merge as merge_commands
from agentkd.errors import AgentkdError, ConfigError

if TYPE_CHECKING:
    from agentkd.rollout import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Distil a tool-using LLM agent into a small model, and serve it.\n\n"
    "Start with `agentkd quickstart --out demo`: no GPU and no key are needed.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; an unfinished run in it goes on.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Workers = Annotated[int, typer.Option(min=1, help="Rollouts in flight.")]
Sandbox = Annotated[
    str, typer.Option(help='Where model-written code runs: "fork", "e2b", "docker" or "local" (no boundary).')
]


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
        _complain("Stopped. What is finished is kept; run the same command again to go on.")
        _leave(130)
    except AgentkdError as exc:
        _complain(f"Error: {exc.message}", exc.hint)
        _leave(exc.exit_code)
    except OSError as exc:
        where = f" ({exc.filename})" if exc.filename else ""
        _complain(f"Error: {exc.strerror or exc}{where}", "Is the disk full, or the folder not writable?")
        _leave(7)
    except Exception as exc:
        if hasattr(exc, "format_message"):  # click's own usage errors
            if exc.format_message():  # empty when no argument was given, and help has been printed
                _complain(f"Error: {exc.format_message()}", "See --help.")
            _leave(2)
        if type(exc).__name__ == "ValidationError":
            _complain(f"Error: {_first_problem(exc)}", "See --help.")
            _leave(2)
        raise


def _first_problem(exc: Any) -> str:
    problem = exc.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}"


def _complain(*lines: str) -> None:
    for line in lines:
        if line:  # an endpoint's error may have line ends and control characters in it
            plain = "".join(char if char.isprintable() else " " for char in line)
            print(" ".join(plain.split()), file=sys.stderr)


def _leave(code: int) -> None:
    """Exit at once: worker threads may still wait for an endpoint, and nothing is left to write."""
    import atexit

    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _progress_bar() -> Any:
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


@contextmanager
def _rollout_progress(what: str, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A live line: done, correct, errors, time left."""
    if quiet:
        yield None
        return
    with _progress_bar() as bar:
        task = bar.add_task(what, total=None, note="")

        def show(progress: Any) -> None:
            note = f"{progress.correct} correct" + (f", {progress.errors} errors" if progress.errors else "")
            bar.update(task, completed=progress.done, total=progress.total, note=note)

        yield show


@contextmanager
def _teacher(
    api_base: str | None, model: str | None, teacher: str | None, error_rate: float, seed: int
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The endpoint to collect from: the given one, or the offline expert behind one of our own."""
    if teacher is None:
        if api_base is None or model is None:
            raise ConfigError(
                "No teacher was given.",
                "Pass --api-base http://HOST:PORT/v1 --model NAME, or --teacher expert for the offline one.",
            )
        yield api_base, model, {}
        return
    if teacher != "expert":
        raise ConfigError(f"Unknown teacher {teacher!r}.", 'The only built-in one is "expert".')
    from agentkd.pipeline import expert_endpoint

    with expert_endpoint(seed=seed, error_rate=error_rate) as url:
        from agentkd.expert import EXPERT_LABEL

        yield url, "offline-expert", {"teacher": EXPERT_LABEL}


@app.command(
    epilog="Examples:\n\n"
    "`agentkd collect --teacher expert --tasks gym:products,lcm --n 40 --out runs/maths`\n\n"
    "`agentkd collect --api-base http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-32B-Instruct "
    "--tasks tasks.jsonl --corpus passages.jsonl --out runs/mine`"
)
def collect(
    tasks: Annotated[
        str, typer.Option(help='Taskset: "gym:products+almanac:hops=2", a JSONL file, "hf:NAME".')
    ],
    out: Out,
    n: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks; all of a finite set by default.")
    ] = None,
    split: Annotated[str, typer.Option(help='"train" or "test".')] = "train",
    api_base: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint, ending in /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id, as the endpoint lists it.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Bearer token; never written to files.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help='"expert": the built-in offline teacher.')] = None,
    error_rate: Annotated[
        float, typer.Option(min=0, max=1, help="How often the offline teacher errs.")
    ] = 0.1,
    kind: Annotated[
        str, typer.Option(help='"agent" (code and tools) or "cot" (chain of thought).')
    ] = "agent",
    sandbox: Sandbox = "fork",
    corpus: Annotated[Path | None, typer.Option(help="Passages (JSONL) for the search tool.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rollouts of each task.")] = 1,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Sampled tokens of one step.")] = 1024,
    max_steps: Annotated[int, typer.Option(min=1)] = 5,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one call of the endpoint.")] = 600.0,
    workers: Workers = 16,
    shard: Annotated[
        str | None, typer.Option(help='Only part i of n of the tasks, as in "2/8"; see `agentkd merge`.')
    ] = None,
    engine: Annotated[
        str, typer.Option(help='"local", or "ray": the shards of a run on a cluster.')
    ] = "local",
    shards: Annotated[int, typer.Option(min=1, help="ray only: parts of the run.")] = 16,
    store: Annotated[
        str | None, typer.Option(help="ray only: place that all nodes reach, as in s3://bucket/run.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help='ray only: the cluster, as in "auto".')] = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Let a teacher solve tasks; its trajectories are appended to `OUT/trajectories.jsonl`."""
    from agentkd.agent_config import AgentConfig
    from agentkd.collect import CollectConfig
    from agentkd.collect import collect as run

    _announce(sandbox if kind == "agent" else None)
    with _teacher(api_base, model, teacher, error_rate, seed) as (url, model_id, labels):
        config = CollectConfig(
            tasks=tasks,
            split=split,
            n=n,
            seed=seed,
            agent=AgentConfig(
                model=model_id,
                api_base=url,
                api_key=api_key,
                kind=kind,  # type: ignore[arg-type]
                temperature=temperature,
                max_tokens=max_tokens,
                max_steps=max_steps,
                sandbox=sandbox,
                timeout=timeout,
            ),
            corpus=corpus,
            samples=samples,
            workers=workers,
            shard=shard,
            labels=labels,
        )
        if engine == "ray":
            from agentkd.commands.cluster import run_on_ray

            run_on_ray(config, out, store, shards, ray_address, as_json)
            return
        if engine != "local":
            raise ConfigError(f"Unknown engine {engine!r}.", 'Known engines: "local", "ray".')
        with _rollout_progress("collect", as_json) as show:
            done = run(config, out, show)
    correct = sum(item.correct for item in done.trajectories)
    figures = {
        "out": str(out),
        "finished": len(done.trajectories),
        "correct": correct,
        "missing": done.missing,
    }
    if as_json:
        _print_json(figures)
    else:
        print(f"{len(done.trajectories)} trajectories, {correct} correct, in {out / 'trajectories.jsonl'}")
        if done.missing:
            print(
                f"{done.missing} rollouts ended by errors (see {out / 'errors.jsonl'}); run again to retry."
            )
        print(f"Next: agentkd filter {out} --out {out / 'kept'}")


def _announce(sandbox: str | None) -> None:
    if sandbox == "local":
        from agentkd.sandbox import LOCAL_WARNING

        print(f"Note: {LOCAL_WARNING}", file=sys.stderr)


@app.command("filter", epilog="Example:\n\n`agentkd filter runs/maths --out runs/maths/kept`")
def filter_command(
    source: Annotated[Path, typer.Argument(help="A run folder or a trajectories.jsonl.")],
    out: Out,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Lowest score that is kept.")] = 1.0,
    allow_parse_errors: Annotated[bool, typer.Option(help="Keep steps without a valid code block.")] = False,
    per_task: Annotated[int, typer.Option(min=1, help="Trajectories kept of one task.")] = 1,
    as_json: Json = False,
) -> None:
    """Keep what is worth learning from: `kept.jsonl`, and `dropped.jsonl` with every reason."""
    from agentkd.filter import FilterConfig, filter_run

    config = FilterConfig(min_score=min_score, allow_parse_errors=allow_parse_errors, per_task=per_task)
    result = filter_run(source, out, config)
    figures = {"kept": len(result.kept), "dropped": len(result.dropped), "reasons": dict(result.reasons)}
    if as_json:
        _print_json(figures)
        return
    print(f"{len(result.kept)} kept, {len(result.dropped)} dropped")
    for reason, count in result.reasons.most_common():
        print(f"  {count:5d}  {reason}")
    print(f"Next: agentkd distill {out / 'kept.jsonl'} --out student")


@app.command(
    epilog="Examples:\n\n`agentkd distill runs/maths/kept/kept.jsonl --out student`\n\n"
    "`agentkd distill kept.jsonl --base Qwen/Qwen2.5-0.5B-Instruct --epochs 2 --lr 2e-4 --rank 64 --out student`"
)
def distill(
    trajectories: Annotated[Path, typer.Argument(help="kept.jsonl")],
    out: Out,
    base: Annotated[str, typer.Option(help='"smollm2-135m", a Hub id, or a local folder.')] = "smollm2-135m",
    kind: Annotated[str, typer.Option(help='"agent" or "cot".')] = "agent",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; overrides --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01)] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 16,
    max_length: Annotated[int, typer.Option(min=8, help="Longest example in tokens.")] = 1024,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train a LoRA student on kept trajectories; a stopped training goes on from its checkpoint."""
    from agentkd.distill import DistillConfig
    from agentkd.distill import distill as run

    config = DistillConfig(
        base=base,
        kind=kind,  # type: ignore[arg-type]
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        lora_r=rank,
        lora_alpha=2 * rank,
        max_length=max_length,
        seed=seed,
    )
    with _bar("distill", as_json) as show:
        student = run(trajectories, out, config, show)
    if as_json:
        _print_json({"out": str(out), "training": student.training})
        return
    print(f"Student in {out}")
    print(f"Next: agentkd serve {out}")


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int, float], None] | None]:
    """A bar for training steps: (step, steps, loss)."""
    if quiet:
        yield None
        return
    with _progress_bar() as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda step, total, loss: bar.update(task, completed=step, total=total, note=f"loss {loss:.3f}")


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
    corpus: Annotated[Path | None, typer.Option(help="Passages (JSONL) for the search tool.")] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    workers: Workers = 32,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Run a student, a base model or an endpoint on held-out tasks; accuracy with 95% intervals."""
    from agentkd.pipeline import evaluate_command

    _announce(sandbox)
    with _rollout_progress("evaluate", as_json) as show:
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
            on_progress=show,
        )
    if as_json:
        _print_json(result.model_dump(mode="json"))
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
    _announce(sandbox)
    summary = run(out, size=size, sandbox=sandbox, fresh=fresh, quiet=as_json)
    if as_json:
        _print_json(summary)


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
        _print_json(summary)


def _version(value: bool) -> None:
    if value:
        from agentkd import __version__

        print(f"agentkd {__version__}")
        raise typer.Exit


for _commands in (exchange_commands, merge_commands):
    _commands.register(app)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
