"""``agentkd serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "serve",
        epilog="Examples:\n\n`agentkd serve student --port 8000`\n\n`agentkd serve expert` (the offline teacher)",
    )(serve)


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
