"""``agentkd export-student``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentkd.commands.console import Json, print_json, progress_bar
from agentkd.errors import ConfigError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "export-student",
        epilog="Examples:\n\n`agentkd export-student student --merged merged`\n\n"
        "`agentkd export-student student --gguf student.gguf --push owner/name`\n\n"
        "`agentkd export-student student --card eval` (the model card, with the results of an evaluation)",
    )(export_student)


def export_student(
    student: Annotated[Path, typer.Argument(help="Student folder.")],
    merged: Annotated[
        Path | None, typer.Option(help="Write one model in transformers' format into this folder.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="Write this file with llama.cpp's converter ($LLAMA_CPP or PATH).")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload what serving needs to this repository; no conversations.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Write the model card again with the results of this evaluation.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help='With --merged: "bfloat16", "float16" or "float32"; else the base\'s.')
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a student away: merged weights, a GGUF file, or a push to the Hugging Face Hub."""
    if not any((merged, gguf, push, card)):
        raise ConfigError(
            "Export to what?", "Add --merged FOLDER, --gguf FILE, --push OWNER/NAME or --card EVALUATION."
        )
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ConfigError(f"There is no dtype {dtype!r} here.", "Use bfloat16, float16 or float32.")
    from agentkd.distill.release import merge_student, push_student, write_gguf

    done: dict[str, str] = {}
    if card is not None:
        from agentkd.distill.card import read_results, write_card
        from agentkd.engine.student import load_student

        done["card"] = str(write_card(load_student(student), read_results(card)))
    with progress_bar() as bar:
        task = bar.add_task("export", total=None, note="")
        if merged is not None:
            bar.update(task, note=str(merged))
            done["merged"] = str(merge_student(student, merged, dtype))
        if gguf is not None:
            bar.update(task, note=str(gguf))
            done["gguf"] = str(write_gguf(student, gguf))
        if push is not None:
            bar.update(task, note=push)
            done["pushed"] = push_student(student, push, private=not public)
    if as_json:
        print_json(done)
        return
    for kind, place in done.items():
        print(f"{kind}: {place}")
