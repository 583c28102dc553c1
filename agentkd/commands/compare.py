"""``agentkd compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agentkd.commands.console import Json, print_json

__all__ = ["register"]

_SHOWN = 60


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare", epilog="Example:\n\n`agentkd compare eval-base eval-student`")(compare)


def compare(
    first: Annotated[Path, typer.Argument(help="A run folder, such as the base model's.")],
    second: Annotated[Path, typer.Argument(help="Another on the same tasks.")],
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """What changed between two runs, and whether the difference is real (paired bootstrap, 95%)."""
    from agentkd.evaluate.compare import compare_runs

    found = compare_runs(first, second, seed=seed)
    if as_json:
        real = {name: getattr(found, name).real for name in ("accuracy", "tokens", "steps", "seconds")}
        print_json({**found.model_dump(mode="json"), "real": real, "verdict": found.verdict})
        return
    print(found.verdict)
    print(f"Only the second is better on {found.wins} tasks, only the first on {found.losses}.")
    print(f"{'':10} {'first':>10} {'second':>10} {'difference':>11}   95% interval")
    for name in ("accuracy", "tokens", "steps", "seconds"):
        row = getattr(found, name)
        mark = "real" if row.real else ""
        print(
            f"{name:10} {row.first:10.3f} {row.second:10.3f} {row.mean:+11.3f}   "
            f"[{row.low:+.3f}, {row.high:+.3f}] {mark}"
        )
    same = found.agreement
    print(
        f"Same answer {same.answers:.0%}, first action {same.first_actions:.0%}, tools {same.tools:.0%}, "
        f"steps {same.steps:.0%} (n = {same.n})"
    )
    if found.only_first or found.only_second:
        print(f"Not compared: {found.only_first} tasks of the first run, {found.only_second} of the second.")
    print("Settings that differ:" if found.changed else "No setting differs.")
    for name, (one, other) in found.changed.items():
        print(f"  {name}: {_short(one)} -> {_short(other)}")


def _short(value: Any) -> str:
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "\N{HORIZONTAL ELLIPSIS}"
