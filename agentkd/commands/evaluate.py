"""``agentkd evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentkd.commands.console import (
    Corpus,
    Json,
    Out,
    Sandbox,
    Workers,
    announce,
    print_json,
    rollout_progress,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "evaluate",
        epilog="Examples:\n\n`agentkd evaluate student --tasks gym:products,lcm --n 100 --out eval`\n\n"
        "`agentkd evaluate smollm2-135m --kind cot --tasks gym:lcm --n 50 --out eval-base`\n\n"
        "`agentkd evaluate student --tasks gym:lcm --router all --target-tokens 300 --out routing` "
        "(accuracy against cost, and the router that fits)",
    )(evaluate)


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
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Actions sampled at each step, at most; their majority acts. 1: no sampling. "
            "The student's own setting by default.",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="Whether to use tools: none, implicit, never, forced, threshold:0.5, agreement:0.8; "
            '"all" compares them. The student\'s own by default.'
        ),
    ] = None,
    tools: Annotated[
        str | None,
        typer.Option(
            help='What counts as a tool for the router: "search", "code" or "both". '
            'The student\'s own by default, else "both".'
        ),
    ] = None,
    target_tokens: Annotated[
        float | None, typer.Option(min=1, help="With --router all: mean tokens that a question may cost.")
    ] = None,
    save_test_time: Annotated[
        bool,
        typer.Option("--save-test-time", help="Keep --actions and --router in the student's folder."),
    ] = False,
    runs: Annotated[
        int, typer.Option(min=1, max=1024, help="Runs of each task, by the seeds --seed, --seed + 1, ...")
    ] = 1,
    prices: Annotated[Path | None, typer.Option(help="US dollars a million tokens by model, TOML.")] = None,
    trained_on: Annotated[
        Path | None,
        typer.Option(help="Training trajectories: test questions that stand among them go to overlap.json."),
    ] = None,
    workers: Workers = 32,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Run a student, a base model or an endpoint on held-out tasks; accuracy with 95% intervals."""
    from agentkd.assess import assess
    from agentkd.record import read_json

    announce(sandbox)
    with rollout_progress(as_json, "evaluate") as [show]:
        result, table = assess(
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
            router=router,
            tools=tools,
            target_tokens=target_tokens,
            save=save_test_time,
            runs=runs,
            prices=prices,
            trained_on=trained_on,
            on_progress=show,
        )
    twice = None if trained_on is None else read_json(out / "overlap.json")
    if as_json:
        found = result.model_dump(mode="json")
        print_json(found if twice is None else {**found, "overlap": twice})
        return
    from rich.console import Console

    Console().print(table)
    if twice is not None:
        print(f"{len(twice)} test questions overlap with the training questions; see {out / 'overlap.json'}.")
