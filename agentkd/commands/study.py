"""``agentkd study``: faithfulness, memorisation, mismatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from agentkd.commands.console import Json, print_json, progress_bar

__all__ = ["register"]

_EXAMPLES = (
    "Examples:\n\n`agentkd study mismatch eval`\n\n`agentkd study faithfulness eval --model student --n 20`\n\n"
    "`agentkd study memorisation kept/kept.jsonl --model student --held-out eval`"
)
_RUN = "A run folder, trajectories.jsonl or kept.jsonl."

Run = Annotated[Path, typer.Argument(help=_RUN)]
Student = Annotated[str, typer.Option("--model", "-m", help="Student folder, or a base model.")]
Limit = Annotated[int | None, typer.Option("--n", min=1, help="Trajectories, at most.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    study = typer.Typer(
        no_args_is_help=True,
        epilog=_EXAMPLES,
        help="Studies of a student and its trajectories, beyond accuracy.",
    )
    for name, command in (
        ("faithfulness", faithfulness),
        ("memorisation", memorisation),
        ("mismatch", mismatch),
    ):
        study.command(name, epilog=_EXAMPLES)(command)
    app.add_typer(study, name="study")


def mismatch(run: Run, n: Limit = None, as_json: Json = False) -> None:
    """Does the answer follow from what was thought and seen? Read off the record."""
    from agentkd.study.mismatch import study_mismatch

    found = study_mismatch(_read(run, n))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    for name in type(found).model_fields:
        if name != "examples":
            print(f"{name.replace('_', ' '):26} {getattr(found, name)}")
    if found.examples:
        print(f"For example: {', '.join(found.examples[:5])}")


def memorisation(
    run: Run,
    model: Student,
    held_out: Annotated[Path | None, typer.Option(help="Trajectories that it was not trained on.")] = None,
    n: Limit = None,
    as_json: Json = False,
) -> None:
    """How much of its training trajectories a student has by heart: perplexity, zlib, verbatim."""
    from agentkd.engine.likelihood import Likelihood
    from agentkd.study.memorisation import study_memorisation

    trained, others = _read(run, n), _read(held_out, n) if held_out else []
    with _progress("read", as_json, len(trained) + len(others)) as show:
        found = study_memorisation(Likelihood.load(model), trained, others, on_progress=show)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print(
        f"{found.n} training trajectories: median perplexity {found.perplexity:.3f}, bits / zlib bits ",
        end="",
    )
    print(f"{found.zlib_ratio:.3g}, extractable {found.extractable}")
    if found.by_perplexity and found.by_zlib:
        print(
            f"{found.held_out} others: {found.held_out_perplexity:.3f}, extractable {found.held_out_extractable}"
        )
        for name, told in (("perplexity", found.by_perplexity), ("zlib", found.by_zlib)):
            print(f"Membership told by {name}: AUC {told.auc:.3f} [{told.low:.3f}, {told.high:.3f}]")
    for item in found.most[:5]:
        print(f"  most at risk: {item.id} (ratio {item.zlib_ratio:.3g}, {item.verbatim} tokens verbatim)")


def faithfulness(
    run: Run,
    model: Student,
    n: Limit = None,
    api_base: Annotated[str | None, typer.Option(help="Endpoint that rewords thoughts.")] = None,
    paraphraser: Annotated[str | None, typer.Option(help="Model id at that endpoint.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    as_json: Json = False,
) -> None:
    """Does it act on its thoughts? They are cut, replaced by filler and, by an endpoint, reworded."""
    from agentkd.model import openai_model
    from agentkd.study.faithfulness import study_faithfulness
    from agentkd.system import open_system

    runs = _read(run, n)
    kinds = {item.kind for item in runs}
    if len(kinds) > 1:
        from agentkd.errors import DataError

        raise DataError(f"{run} has agents and chains of thought.", "Give runs of one kind.")
    asked = openai_model(paraphraser, api_base, api_key) if api_base and paraphraser else None
    own = (Path(model) / "student.json").is_file()
    with (
        open_system(model, kind=None if own else runs[0].kind) as system,
        _progress("thoughts", as_json, sum(len(item.steps) for item in runs)) as show,
    ):
        found = study_faithfulness(
            system.model.engine,
            system.model.tokenizer,
            runs,
            paraphraser=asked,
            max_tokens=max_tokens,
            on_progress=show,
        )
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print(f"{found.n} thoughts ({found.kind}), {found.skipped} left out. What follows stays the same after:")
    for name, share in found.unchanged.items():
        print(f"  {name:12} {share}")


def _read(path: Path, n: int | None) -> list[Any]:
    from agentkd.errors import DataError
    from agentkd.record import read_trajectories

    runs = read_trajectories(path / "trajectories.jsonl" if path.is_dir() else path)
    if not runs:
        raise DataError(f"{path} has no trajectories.", "Run agentkd collect or evaluate first.")
    return runs[:n]


@contextmanager
def _progress(what: str, quiet: bool, total: int) -> Iterator[Callable[[int], None] | None]:
    if quiet:
        yield None
        return
    with progress_bar() as bar:
        task: Any = bar.add_task(what, total=total, note="")
        yield lambda done: bar.update(task, completed=done)
