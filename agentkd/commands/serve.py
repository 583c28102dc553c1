"""``agentkd serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from agentkd.commands.console import Corpus, Sandbox, announce, complain, leave

__all__ = ["register"]


_VLLM = "agentkd.vllm_args"


class _ServeCommand(TyperCommand):
    """Keeps what stands behind ``--`` apart: it is vLLM's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[_VLLM] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "serve",
        cls=_ServeCommand,
        epilog="Examples:\n\n`agentkd serve student --port 8000`\n\n"
        "`agentkd serve student other-student --corpus index/ --actions 8 --save-runs served`\n\n"
        "`agentkd serve student --engine vllm --vllm-python ~/vllm/bin/python -- --tensor-parallel-size 2`\n\n"
        "`agentkd serve student --host 0.0.0.0 --token-file tokens.txt --requests-per-minute 60 --access-log -`\n\n"
        "`agentkd serve expert` (the offline teacher)",
    )(serve)


def serve(
    context: typer.Context,
    what: Annotated[
        list[str],
        typer.Argument(help='Student folders, or "expert"; what stands behind `--` is passed to vLLM.'),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    engine: Annotated[str, typer.Option(help='"auto", "embedded" or "vllm".')] = "auto",
    vllm_python: Annotated[str, typer.Option(help="The interpreter that has vllm.")] = sys.executable,
    probe: Annotated[bool, typer.Option(help="Refuse a student that has drifted.")] = True,
    sandbox: Sandbox = "fork",
    corpus: Corpus = None,
    actions: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Actions an agent samples at each step; the student's own setting."),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(help="none, implicit, never, forced, threshold:0.5, agreement:0.8; the student's own."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Sampled tokens of one step of an agent.")] = 512,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer of an agent.")] = 120.0,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Bearer tokens, one a line (TOKEN or NAME TOKEN); AGENTKD_TOKENS adds others."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of each token.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Prompt and completion tokens of each bearer token.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests worked on at a time.")] = 256,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests in the queue; more get a 429.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 4 * 2**20,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="What requests under way get after SIGTERM or Ctrl-C.")
    ] = 30.0,
    access_log: Annotated[
        Path | None, typer.Option(help='File for one JSON line a request; "-" is stderr.')
    ] = None,
    log_contents: Annotated[bool, typer.Option(help="Log what is asked, too; secrets are redacted.")] = False,
    save_runs: Annotated[
        Path | None, typer.Option(help="Run folder that every served rollout is appended to.")
    ] = None,
    error_rate: Annotated[float, typer.Option(min=0, max=1, help="expert only: how often it errs.")] = 0.1,
    seed: Annotated[int, typer.Option(help="expert only.")] = 0,
) -> None:
    """Serve students, and their agents, behind an OpenAI-compatible endpoint (`/v1/chat/completions`).

    A student of kind "agent" is listed as NAME, and as NAME-agent: that one runs the whole rollout.
    """
    from agentkd.serve import GuardConfig, ServeConfig, read_tokens, serve_students

    tokens = read_tokens(token_file)
    guard = GuardConfig(
        max_body=max_body,
        max_running=max_running,
        max_waiting=max_waiting,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        drain_seconds=drain_seconds,
        access_log=access_log,
        log_contents=log_contents,
    )
    if what == ["expert"]:
        from agentkd.pipeline import serve_expert

        serve_expert(host, port, seed=seed, error_rate=error_rate, guard=guard, tokens=tokens)
        return
    announce(sandbox)
    chosen: Any = _known(engine)
    config = ServeConfig(
        engine=chosen,
        vllm_python=vllm_python,
        vllm_args=tuple(context.meta[_VLLM]),
        probe=probe,
        sandbox=sandbox,
        corpus=corpus,
        actions=actions,
        router=router,
        max_tokens=max_tokens,
        timeout=timeout,
        save_runs=save_runs,
    )
    serve_students(what, config, host=host, port=port, guard=guard, tokens=tokens, say=complain)
    leave(0)  # everything is closed; torch takes seconds to be torn down


def _known(engine: str) -> Literal["auto", "embedded", "vllm"]:
    if engine not in ("auto", "embedded", "vllm"):
        raise typer.BadParameter(f'{engine!r} is not "auto", "embedded" or "vllm".', param_hint="--engine")
    return engine  # type: ignore[return-value]
