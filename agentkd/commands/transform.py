"""``agentkd transform``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkd.commands.console import Corpus, Json, Out, print_json, progress_bar, setting_pairs
from agentkd.errors import ConfigError

if TYPE_CHECKING:
    pass

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "transform",
        epilog="Examples:\n\n`agentkd transform shorten kept/kept.jsonl --api-base http://127.0.0.1:8001/v1 "
        "--model NAME --out shortened`\n\n"
        "`agentkd transform student-friendly kept/kept.jsonl --student smollm2-135m --out friendly`\n\n"
        "`agentkd transform success-gap kept/kept.jsonl --teacher-runs runs/maths --student-runs eval --out mix`"
        "\n\n`agentkd transform passages kept-cot/kept.jsonl --corpus passages.jsonl --set k=3 --out with`",
    )(transform)


def transform(
    name: Annotated[
        str,
        typer.Argument(
            help="shorten, plan-first, retro-search, skip-chunks, student-friendly, success-gap, temperature, "
            "passages; or yours, as module:name."
        ),
    ],
    source: Annotated[Path, typer.Argument(help="kept.jsonl, or another file of trajectories.")],
    out: Out,
    api_base: Annotated[str | None, typer.Option(help="Endpoint of the model that is asked.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id at that endpoint.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    student: Annotated[
        str | None, typer.Option(help="Student folder or base model that scores texts.")
    ] = None,
    corpus: Corpus = None,
    teacher_runs: Annotated[
        Path | None, typer.Option(help="success-gap: trajectories of the teacher (file or run folder).")
    ] = None,
    student_runs: Annotated[
        Path | None, typer.Option(help="success-gap: trajectories of the student (file or run folder).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the transform, as name=value.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trajectories in work at a time.")] = 8,
    as_json: Json = False,
) -> None:
    """Make other trajectories of trajectories: rewrite, choose, mix or order them, between filter and distill.

    Writes `kept.jsonl` and `answers.jsonl`, which holds what models answered: a stopped run goes on.
    """
    from agentkd.transform import Means, make_transform, transform_run

    made = make_transform(name, _settings(settings or []))
    fields = {
        **_endpoint(api_base, model, api_key),
        **_scorer(student),
        **_data(corpus, teacher_runs, student_runs),
        "workers": workers,
    }

    def run(show: Callable[[int, int], None]) -> Any:
        return transform_run(source, out, made, lambda answers: Means(answers, on_progress=show, **fields))

    if as_json:
        result = run(lambda done, total: None)
    else:
        with progress_bar() as bar:
            task = bar.add_task(name, total=None, note="")
            result = run(lambda done, total: bar.update(task, completed=done, total=total))
    figures = {"before": result.before, "after": len(result.trajectories), "changed": result.changed}
    if as_json:
        print_json({"out": str(out), **figures})
        return
    print(
        f"{result.before} trajectories in, {figures['after']} out, {result.changed} of them changed or chosen"
    )
    print(f"Next: agentkd distill {out / 'kept.jsonl'} --out student")


def _settings(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; a value that is JSON is taken as such."""
    import json

    found: dict[str, Any] = {}
    for name, value in setting_pairs(pairs):
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _endpoint(api_base: str | None, model: str | None, api_key: str | None) -> dict[str, Any]:
    if api_base is None:
        return {}
    if model is None:
        raise ConfigError("No model was named.", "Pass --model as the endpoint lists it.")
    from agentkd.model import openai_model

    return {"model": openai_model(model, api_base, api_key)}


def _scorer(student: str | None) -> dict[str, Any]:
    if student is None:
        return {}
    from agentkd.errors import boundary

    with boundary(ConfigError, "importing torch", 'Install it: pip install "agentkd[train]"'):
        from agentkd.engine.likelihood import Likelihood

    return {"student": Likelihood.load(student), "student_name": student}


def _data(corpus: str | None, teacher_runs: Path | None, student_runs: Path | None) -> dict[str, Any]:
    from agentkd.record import read_trajectories
    from agentkd.retrieval.source import open_corpus

    found: dict[str, Any] = {"retriever": open_corpus(corpus).retriever} if corpus else {}
    for name, path in (("teacher_runs", teacher_runs), ("student_runs", student_runs)):
        if path is not None:
            found[name] = read_trajectories(path / "trajectories.jsonl" if path.is_dir() else path)
    return found
