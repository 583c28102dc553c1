"""``agentkd adapt``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkd.commands.console import Json, Out, Sandbox, Workers, announce, print_json, rollout_progress
from agentkd.errors import ConfigError

if TYPE_CHECKING:
    from agentkd.adapt import AdaptConfig, Adapted, Respondent, Rewriter
    from agentkd.agent_config import AgentConfig

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "adapt",
        epilog="Examples:\n\n`agentkd adapt runs/facts/kept/kept.jsonl --out adapt-1` (what can be known)\n\n"
        "`agentkd distill adapt-1/knowledge.jsonl --from student --out informed`\n\n"
        "`agentkd adapt runs/all/kept/kept.jsonl --student informed --out adapt-2` (easy and hard)\n\n"
        "`agentkd distill adapt-2/mix.jsonl --from informed --out adapted`",
    )(adapt)


def adapt(
    source: Annotated[Path, typer.Argument(help="A kept.jsonl, or a run folder: trajectories with tools.")],
    out: Out,
    *,
    student: Annotated[
        str | None,
        typer.Option(
            help="Student folder that is asked what it knows; without one, only the knowledge is written."
        ),
    ] = None,
    tools: Annotated[str, typer.Option(help='What counts as a tool: "search", "code" or "both".')] = "both",
    samples: Annotated[int, typer.Option(min=1, help="Direct answers to each question.")] = 1,
    tau: Annotated[float, typer.Option(help="Share of right ones that makes a question easy.")] = 0.8,
    temperature: Annotated[float, typer.Option(min=0, help="Of the direct answers.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Sampled tokens of a direct answer.")] = 256,
    keep_direct: Annotated[
        str, typer.Option(help='Solutions without tools that the mix repeats: "all", "easy" or "none".')
    ] = "all",
    required: Annotated[
        bool, typer.Option("--required", help="Also teach the prompt that requires tools.")
    ] = False,
    thought: Annotated[
        str,
        typer.Option(
            help="Thought of a literal answer; {goal} is the first clause of the trajectory's thought, {answer} the answer."
        ),
    ] = "I know this.",
    longest_answer: Annotated[int, typer.Option(min=1, help="Characters of a literal answer.")] = 80,
    api_base: Annotated[
        str | None, typer.Option(help="A teacher writes the solutions: its endpoint.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model id at that endpoint.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    sandbox: Sandbox = "fork",
    workers: Workers = 32,
    as_json: Json = False,
) -> None:
    """Make the data from which a student learns to use tools only where it needs them.

    Without --student: solutions without tools, made of trajectories with tools (`knowledge.jsonl`). With
    the student that has learnt them: which questions it answers directly (`partition.jsonl`, with all
    evidence), and the balanced mix for the second training (`mix.jsonl`).
    """
    from agentkd.adapt import AdaptConfig
    from agentkd.adapt import adapt as run

    announce(sandbox)
    settings: dict[str, Any] = {
        "tools": tools,
        "samples": samples,
        "tau": tau,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "keep_direct": keep_direct,
        "required": required,
        "thought": thought,
        "longest_answer": longest_answer,
    }
    config = AdaptConfig(**settings)
    teacher = _teacher(api_base, model, api_key)
    with rollout_progress(as_json, "rewrite", "ask directly") as [rewriting, asking]:
        done = run(
            source,
            out,
            config,
            student=_respondent(student, sandbox) if student else None,
            rewriter=_rewriter(teacher, out, config, workers, rewriting) if teacher else None,
            workers=workers,
            on_progress=asking,
        )
    _show(done, student, as_json)


def _teacher(api_base: str | None, model: str | None, api_key: str | None) -> AgentConfig | None:
    if api_base is None and model is None:
        return None
    if api_base is None or model is None:
        raise ConfigError("A teacher needs both.", "Pass --api-base and --model, or neither.")
    from agentkd.agent_config import AgentConfig
    from agentkd.model import check_endpoint

    check_endpoint(api_base, model, api_key)
    return AgentConfig(model=model, api_base=api_base, api_key=api_key)


def _rewriter(
    teacher: AgentConfig,
    out: Path,
    config: AdaptConfig,
    workers: int,
    on_progress: Callable[[Any], None] | None,
) -> tuple[dict[str, str], Rewriter]:
    from agentkd.adapt import model_rewriter

    rewrite = model_rewriter(teacher, out / "rewrite", config, workers=workers, on_progress=on_progress)
    return {"rewriter": teacher.model}, rewrite


def _respondent(student: str, sandbox: str) -> Respondent:
    from agentkd.adapt import Respondent
    from agentkd.engine.student import load_student
    from agentkd.engine.weights import model_hash
    from agentkd.record import file_hash

    folder = load_student(student)
    if folder.kind != "agent":
        raise ConfigError(f"{student} was distilled as {folder.kind!r}.", "Only an agent can be adapted.")

    @contextmanager
    def source(config: AdaptConfig) -> Iterator[tuple[AgentConfig, Any]]:
        from agentkd.system import open_system

        with open_system(
            student, sandbox=sandbox, temperature=config.temperature, max_tokens=config.max_tokens
        ) as system:
            yield system

    whole = folder.weights == "model"
    adapter = model_hash(folder.adapter) if whole else file_hash(folder.adapter / "adapter_model.safetensors")
    return Respondent({"student": folder.path.name, "adapter": adapter}, source)


def _show(done: Adapted, student: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(done.folder), **done.counts})
        return
    counts = done.counts
    print(f"{counts['questions']} questions")
    if "easy" in counts:
        print(f"{counts['easy']} easy and {counts['hard']} hard for {student}")
    for data in ("knowledge", "mix"):
        for rows, count in counts.get(data, {}).items():
            prompt, target = rows.split()
            print(f"  {data}: {count:5d} under the prompt {prompt!r}, target: {target}")
    for reason, count in counts["dropped"].items():
        print(f"  left out: {count:5d}  {reason}")
    if student is None:
        print(f"Next: agentkd distill {done.folder / 'knowledge.jsonl'} --from STUDENT --out informed")
    else:
        print(f"Next: agentkd distill {done.folder / 'mix.jsonl'} --from {student} --out adapted")
