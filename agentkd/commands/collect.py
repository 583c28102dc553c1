"""``agentkd collect``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkd.commands.bill import bill_figures, bill_lines
from agentkd.commands.console import (
    Corpus,
    Json,
    Out,
    Sandbox,
    Workers,
    announce,
    complain,
    leave,
    print_json,
)
from agentkd.errors import ConfigError

if TYPE_CHECKING:
    from agentkd.collect import CollectConfig, Collected, TeacherConfig
    from agentkd.rollouts import Progress

__all__ = ["register"]

EPILOG = (
    "Examples:\n\n"
    "`agentkd collect --teacher expert --tasks gym:products,lcm --n 40 --out runs/maths`\n\n"
    "`agentkd collect --api-base http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-32B-Instruct "
    "--tasks tasks.jsonl --corpus passages.jsonl --out runs/mine`\n\n"
    "`agentkd collect --teacher expert --tasks gym:lcm --first-thought --compare --out runs/thoughts`\n\n"
    "`agentkd collect ... --samples 4 --temperatures 0,0.7 --enough 1 --max-cost 20 --workers 128`\n\n"
    "`agentkd collect --replay runs/mine --out runs/again` (from its log, without an endpoint)"
)


def _above_nothing(value: Any) -> Any:
    """A limit of nothing would let nothing be done; whoever gives it may mean that there is none."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value:g} leaves nothing to spend; for no limit, leave the option out.")
    return value


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(collect)


def collect(
    out: Out,
    tasks: Annotated[
        str | None, typer.Option(help='Taskset: "gym:products+almanac:hops=2", a JSONL file, "hf:NAME".')
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks; all of a finite set by default.")
    ] = None,
    split: Annotated[str, typer.Option(help='"train" or "test".')] = "train",
    api_base: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint, ending in /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id, as the endpoint lists it.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Bearer token; never written to files.")
    ] = None,
    endpoints: Annotated[
        Path | None, typer.Option(help="More teachers: TOML, see docs/collection.md.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help='"expert": the built-in offline teacher.')] = None,
    error_rate: Annotated[
        float, typer.Option(min=0, max=1, help="How often the offline teacher errs.")
    ] = 0.1,
    kind: Annotated[
        str, typer.Option(help='"agent" (code and tools) or "cot" (chain of thought).')
    ] = "agent",
    sandbox: Sandbox = "fork",
    corpus: Corpus = None,
    first_thought: Annotated[
        bool,
        typer.Option(
            "--first-thought",
            help="Let the teacher think in plain words first, and begin its first step with that thought.",
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="With --first-thought: collect without, too, and report both in first-thought.md.",
        ),
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Rollouts of each task, at most.")] = 1,
    enough: Annotated[
        int | None, typer.Option(min=1, help="Correct rollouts after which a task gets no more samples.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    temperatures: Annotated[
        str | None, typer.Option(help='Of the samples of a task, in turn, as in "0,0.7,1".')
    ] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="Sampled tokens of one step.")] = 1024,
    max_steps: Annotated[int, typer.Option(min=1)] = 5,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one call of the endpoint.")] = 600.0,
    workers: Workers = 16,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that divide the workers; by default as workers and cores suggest."
        ),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Repeats of a call that fails.")] = 5,
    rpm: Annotated[float | None, typer.Option(min=1, help="Requests a minute, at most.")] = None,
    tpm: Annotated[float | None, typer.Option(min=1, help="Tokens a minute, at most.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(callback=_above_nothing, help="Stop at so many US dollars.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(callback=_above_nothing, help="Stop at so many tokens, prompts included.")
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option(callback=_above_nothing, help="Stop after so many hours.")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="Prices (TOML) by model, over the published ones.")
    ] = None,
    fsync: Annotated[bool, typer.Option(help="Wait for the disk at each call.")] = True,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost, and stop.")] = False,
    replay: Annotated[
        Path | None, typer.Option(help="Rebuild this run from its log instead; asks no endpoint.")
    ] = None,
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
    """Let a teacher solve tasks; its trajectories are appended to `OUT/trajectories.jsonl`.

    A run that was stopped, in whatever way, goes on where it stopped by the same command.
    """
    if replay is not None:
        _replay(replay, out, as_json)
        return
    if tasks is None:
        raise ConfigError("No tasks were given.", "Pass --tasks, for instance --tasks gym:lcm.")
    from agentkd.agent_config import AgentConfig
    from agentkd.collect import CollectConfig, default_processes
    from agentkd.first_thought import FirstThoughtConfig
    from agentkd.gate import GateConfig
    from agentkd.spend import Budget, load_prices

    announce(sandbox if kind == "agent" else None)
    more = _teachers(endpoints)
    with _teacher(api_base, model, api_key, teacher, error_rate, seed, more) as (first, labels, others):
        config = CollectConfig(
            tasks=tasks,
            split=split,
            n=n,
            seed=seed,
            agent=AgentConfig(
                model=first.model,
                api_base=first.api_base,
                api_key=first.api_key,
                kind=kind,  # type: ignore[arg-type]
                temperature=temperature,
                max_tokens=step_tokens,
                max_steps=max_steps,
                sandbox=sandbox,
                timeout=timeout,
            ),
            first_thought=FirstThoughtConfig() if first_thought else None,
            corpus=corpus,
            samples=samples,
            enough=enough,
            temperatures=_numbers(temperatures),
            workers=first.workers or workers,
            processes=processes or default_processes(workers),
            gate=first.gate
            if first.gate != GateConfig()
            else GateConfig(retries=retries, requests_per_minute=rpm, tokens_per_minute=tpm),
            teachers=others,
            budget=Budget(max_cost=max_cost, max_tokens=max_tokens, max_hours=max_hours),
            prices=load_prices(prices) if prices else {},
            fsync=fsync,
            labels=labels,
            shard=shard,
        )
        if engine not in ("local", "ray"):
            raise ConfigError(f"Unknown engine {engine!r}.", 'Known engines: "local", "ray".')
        if engine == "ray" and compare:
            raise ConfigError("--compare and --engine ray exclude each other.", "Leave --compare out.")
        if engine == "ray" and not estimate:
            from agentkd.commands.cluster import run_on_ray

            run_on_ray(config, out, store, shards, ray_address, as_json)
            return
        _run(config, out, compare, estimate, as_json)


def _run(config: CollectConfig, out: Path, compare: bool, only_estimate: bool, as_json: bool) -> None:
    from agentkd.collect import collect as run
    from agentkd.collect import expect

    if compare:
        from agentkd.first_thought_report import compare_first_thoughts, expect_comparison

        expected = expect_comparison(config, out)
    else:
        expected = expect(config, out)
    if only_estimate:
        if as_json:
            print_json(expected._asdict())
        else:
            print(expected.text())
        return
    if not as_json and expected.rollouts:
        print(expected.text(), file=sys.stderr)
    try:
        with _terminable(), _display(as_json) as show:
            if compare:
                done = compare_first_thoughts(config, out, show, show, show)
            else:
                done = run(config, out, show, show)
    except _Terminated:
        complain("Stopped. What is finished is kept; run the same command again to go on.")
        leave(143)
    if as_json:
        print_json(_figures(done))
    else:
        _say(done)
        if compare:
            print(f"With and without first thoughts: {out / 'first-thought.md'}")


class _Terminated(BaseException):
    """SIGTERM: what Ctrl-C is at a terminal."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _display(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    if quiet:
        yield None
        return
    from agentkd.display import RolloutDisplay

    with RolloutDisplay("collect") as display:
        yield display.show


def _figures(done: Collected) -> dict[str, Any]:
    return {
        "out": str(done.folder),
        "finished": len(done.trajectories),
        "correct": sum(item.correct for item in done.trajectories),
        "missing": done.missing,
        "stopped": done.stopped,
        **bill_figures(done.spent, done.unpriced, done.faults),
        **({"first_thoughts": done.first_thoughts.counts()} if done.first_thoughts else {}),
    }


def _say(done: Collected) -> None:
    correct = sum(item.correct for item in done.trajectories)
    print(
        f"{len(done.trajectories)} trajectories, {correct} correct, in {done.folder / 'trajectories.jsonl'}"
    )
    if done.first_thoughts is not None:
        print(done.first_thoughts.summary())
    for line in bill_lines(done.spent, done.unpriced, done.faults, f"{done.folder}/faults-*.jsonl"):
        print(line)
    if done.stopped:
        print(f"Stopped at {done.stopped}; {done.missing} rollouts are left for the same command.")
    elif done.missing:
        errors = done.folder / "errors.jsonl"
        print(f"{done.missing} rollouts ended by errors, see {errors}; run again to retry.")
    print(f"Next: agentkd filter {done.folder} --out {done.folder / 'kept'}")


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"{text!r} are no numbers.", 'Write --temperatures like "0,0.7,1".') from None


def _teachers(path: Path | None) -> tuple[TeacherConfig, ...]:
    if path is None:
        return ()
    from agentkd.collect import load_teachers

    return load_teachers(path)


@contextmanager
def _teacher(
    api_base: str | None,
    model: str | None,
    api_key: str | None,
    teacher: str | None,
    error_rate: float,
    seed: int,
    more: tuple[TeacherConfig, ...],
) -> Iterator[tuple[TeacherConfig, dict[str, str], tuple[TeacherConfig, ...]]]:
    """Who to collect from: the first teacher, labels, and the others."""
    from agentkd.collect import TeacherConfig

    if teacher is None:
        if api_base is not None and model is not None:
            yield TeacherConfig(model=model, api_base=api_base, api_key=api_key), {}, more
        elif more:
            yield more[0], {}, more[1:]
        else:
            raise ConfigError(
                "No teacher was given.",
                "Pass --api-base http://HOST:PORT/v1 --model NAME, or --teacher expert for the offline one.",
            )
        return
    if teacher != "expert":
        raise ConfigError(f"Unknown teacher {teacher!r}.", 'The only built-in one is "expert".')
    from agentkd.pipeline import expert_endpoint, expert_labels

    with expert_endpoint(seed=seed, error_rate=error_rate) as url:
        first = TeacherConfig(model="offline-expert", api_base=url)
        yield first, expert_labels(seed=seed, error_rate=error_rate), more


def _replay(source: Path, out: Path, as_json: bool) -> None:
    from agentkd.collect import replay

    done = replay(source, out)
    correct = sum(item.correct for item in done.trajectories)
    if as_json:
        figures = {"out": str(out), "finished": len(done.trajectories), "correct": correct}
        print_json({**figures, "unfinished": done.unfinished})
        return
    print(f"{len(done.trajectories)} trajectories, {correct} correct, rebuilt from {source}")
    if done.unfinished:
        print(f"{done.unfinished} rollouts are in the log only in part.")
