"""``agentkd score``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from agentkd.commands.console import Json, Workers, print_json, progress_bar

__all__ = ["register"]

_EXAMPLES = (
    "Examples:\n\n`agentkd score eval --scorer math --against exact`\n\n"
    "`agentkd score eval --scorer judge --api-base URL --model NAME --against labels.jsonl`"
)
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("score", epilog=_EXAMPLES)(score_command)


def score_command(
    run: Annotated[Path, typer.Argument(help="A run folder or a trajectories.jsonl.")],
    scorer: Annotated[
        str | None,
        typer.Option(help="exact, numeric, f1, math, choice, code or judge; the tasks' own by default."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help='Another scorer, "recorded" (the scores in the run) or labels.jsonl ({"id", "correct"}).'
        ),
    ] = "recorded",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the run with the new scores into this folder.")
    ] = None,
    api_base: Annotated[str | None, typer.Option(help="Endpoint of the judge.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id of the judge.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Verdicts of the judge; RUN/judge.jsonl by default.")
    ] = None,
    workers: Workers = 8,
    as_json: Json = False,
) -> None:
    """Score a run again, and say where two scorers disagree."""
    from agentkd.evaluate.rescore import rescore

    with ExitStack() as stack:
        judge: Any = None
        if api_base is not None and model is not None and "judge" in (scorer, against):
            from agentkd.model import openai_model
            from agentkd.scorer.judge import Judge

            kept = cache or (run if run.is_dir() else run.parent) / "judge.jsonl"
            asked = openai_model(model, api_base, api_key, max_tokens=16, temperature=0.0)
            judge = stack.enter_context(Judge(asked, kept))
        show = None
        if not as_json:
            bar = stack.enter_context(progress_bar())
            task = bar.add_task("score", total=None, note="")

            def show(done: int) -> None:
                bar.update(task, completed=done)

        found, scored = rescore(run, scorer, against, out=out, judge=judge, workers=workers, on_progress=show)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    right = sum(item.correct for item in scored)
    print(f"{right} of {len(scored)} correct by {found.first}")
    if found.agreement is not None:
        kappa = "" if found.kappa is None else f", kappa {found.kappa:.2f}"
        print(
            f"{found.first} and {found.second} agree on {found.agreement:.1%} "
            f"[{found.low:.1%}, {found.high:.1%}] of {found.n}{kappa}: both {found.both}, neither {found.neither}, "
            f"only {found.first} {found.only_first}, only {found.second} {found.only_second}"
        )
    if found.unscored_first or found.unscored_second:
        print(
            f"Not scored: {found.unscored_first} by {found.first}, {found.unscored_second} by {found.second}"
        )
    for item in found.disagreements[:_SHOWN]:
        mark = "+" if item.first.correct else "-"
        print(
            f"  {mark} {item.id}: gold {_short(item.gold)}, answer {_short(item.answer)}  {item.first.reason[:60]}"
        )
    if len(found.disagreements) > _SHOWN:
        print(f"  ... and {len(found.disagreements) - _SHOWN} more; --json lists all")


def _short(text: str | None) -> str:
    shown = repr(text)
    return shown if len(shown) <= 50 else shown[:49] + "\N{HORIZONTAL ELLIPSIS}"
