"""``agentkd distill``: train a student, look at what it learns, check what is served."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkd.commands.console import Json, print_json, progress_bar, setting_pairs
from agentkd.errors import ConfigError, first_problem

if TYPE_CHECKING:
    from agentkd.distill import DistillConfig
    from agentkd.distill.served import Ask, ServedParity

__all__ = ["check_student", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "distill",
        epilog="Examples:\n\n`agentkd distill runs/maths/kept/kept.jsonl --out student`\n\n"
        "`agentkd distill kept.jsonl --base Qwen/Qwen2.5-0.5B-Instruct --epochs 2 --lr 2e-4 --rank 64 "
        "--out student`\n\n"
        "`agentkd distill adapt/mix.jsonl --from student --out adapted`\n\n"
        "`agentkd distill kept.jsonl --base ORG/LARGE --gpus 8 --shard --out student`\n\n"
        "`agentkd distill kept.jsonl --objective aft --negatives dropped.jsonl --out student`\n\n"
        "`agentkd distill kept.jsonl --teacher-model FOLDER --record-teacher teacher.jsonl`, then\n\n"
        "`agentkd distill kept.jsonl --objective first --teacher-logprobs teacher.jsonl --out student`\n\n"
        "`agentkd distill kept.jsonl --show-mask 2` (which tokens would be learnt; trains nothing)\n\n"
        "`agentkd distill --check student` (is what is served what was trained?)",
    )(distill)


def distill(
    trajectories: Annotated[Path | None, typer.Argument(help="kept.jsonl")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; an unfinished run in it goes on.")
    ] = None,
    parent: Annotated[
        Path | None,
        typer.Option("--from", help="Go on from this student's adapter, with its base, kind and rank."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help='"smollm2-135m" (the default), a Hub id, or a local folder.')
    ] = None,
    kind: Annotated[str | None, typer.Option(help='"agent" (the default) or "cot".')] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; overrides --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01)] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 1e-3,
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA rank; 16 by default.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Longest example in tokens.")] = 1024,
    overlong: Annotated[
        str, typer.Option(help='Longer examples: "drop", or "cut" behind a whole step.')
    ] = "drop",
    rendering: Annotated[
        str, typer.Option(help='"whole" trajectories, or "step" by step for templates that rewrite.')
    ] = "whole",
    failed_steps: Annotated[str, typer.Option(help='"context" (read only) or "target".')] = "context",
    first_thought: Annotated[
        str, typer.Option(help='A given beginning is a "target", or only "context".')
    ] = "target",
    weights: Annotated[
        str, typer.Option(help='What tokens count, as "thought=0.5,action=1,final_answer=2".')
    ] = "",
    objective: Annotated[
        str,
        typer.Option(
            help="What is minimised: sft, masked, aft, dpo, forward-kl, reverse-kl, jsd, taid, first, "
            "plackett-luce; or yours, as module:Name."
        ),
    ] = "sft",
    negatives: Annotated[
        Path | None, typer.Option(help="For aft and dpo: the dropped.jsonl of `agentkd filter`.")
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="For the last six: a local model with the same vocabulary.")
    ] = None,
    teacher_logprobs: Annotated[
        Path | None,
        typer.Option(help="For first and plackett-luce, instead of the model: what --record-teacher wrote."),
    ] = None,
    record_teacher: Annotated[
        Path | None,
        typer.Option(help="Write the likeliest tokens of --teacher-model there, and train nothing."),
    ] = None,
    teacher_top: Annotated[
        int, typer.Option(min=1, help="With --record-teacher: likeliest tokens of each target.")
    ] = 20,
    order: Annotated[
        str, typer.Option(help='Each pass in another order ("shuffle"), or in that of the "file".')
    ] = "shuffle",
    adapter: Annotated[
        str | None, typer.Option(help='What is trained: "lora" (the default), "dora", "qlora" or "full".')
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the questions held out, to keep the best student.")
    ] = 0.0,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between looks at the held-out loss.")] = 10,
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many looks without a better held-out loss.")
    ] = None,
    precision: Annotated[str, typer.Option(help='"auto", "bf16" or "fp32".')] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    track: Annotated[
        str | None, typer.Option(help='Send the figures to "tensorboard", "trackio" or "wandb" as well.')
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1, help="Processes that train together, a GPU each; without GPUs they share the cores."
        ),
    ] = 1,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="With --gpus N: shard weights, gradients and optimiser over them (FSDP), for a model that does "
            "not fit one GPU.",
        ),
    ] = False,
    seed: int = 0,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting without an option of its own, as name=value: micro_tokens, lora_dropout, ...",
        ),
    ] = None,
    show_mask: Annotated[
        int, typer.Option(min=0, help="Print so many examples, coloured by what is learnt, and stop.")
    ] = 0,
    check: Annotated[
        Path | None, typer.Option(help="Check this student's parity as it is served, and train nothing.")
    ] = None,
    api_base: Annotated[str | None, typer.Option(help="With --check: the server to ask.")] = None,
    model: Annotated[str | None, typer.Option(help="With --check: the student's name there.")] = None,
    as_json: Json = False,
) -> None:
    """Train a student on kept trajectories; a stopped training goes on from its checkpoint.

    Before training, every example is held against what the student will be asked and must emit; after
    it, the student is asked again what it was trained on. Token ids must agree.
    """
    if check is not None:
        _check(check, api_base, model, as_json)
        return
    if trajectories is None:
        raise ConfigError(
            "No trajectories were given.", "Name a kept.jsonl, or check a student with --check."
        )
    from agentkd.distill import DistillConfig

    settings: dict[str, Any] = {
        **_student(parent, base, kind, adapter, rank),
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": lr,
        "max_length": max_length,
        "overlong": overlong,
        "rendering": rendering,
        "failed_steps": failed_steps,
        "first_thought": first_thought,
        "weights": _weights(weights),
        "objective": objective,
        "negatives": str(negatives) if negatives else None,
        "teacher": teacher_model,
        "teacher_logprobs": str(teacher_logprobs) if teacher_logprobs else None,
        "order": order,
        "precision": precision,
        "eval_fraction": eval_fraction,
        "eval_every": eval_every,
        "patience": patience,
        "gradient_checkpointing": gradient_checkpointing,
        "track": track,
        "shard": shard,
        "seed": seed,
    }
    config = DistillConfig(**settings, **_more(more or [], {*settings, *_SAID}))
    if show_mask:
        from agentkd.distill.show import show_examples

        show_examples(trajectories, config, show_mask)
        return
    if record_teacher is not None:
        _record(trajectories, record_teacher, config, teacher_top, as_json)
        return
    if out is None:
        raise ConfigError("No folder to write was given.", "Add --out student.")
    from agentkd.distill.adapters import check_shard
    from agentkd.distill.ranks import start_ranks, world

    check_shard(config, max(gpus, world()))
    if gpus > 1 and world() == 1:
        if code := start_ranks(gpus, sys.argv[1:]):
            raise typer.Exit(code)
        return
    _train(trajectories, out, config, as_json)


def _train(trajectories: Path, out: Path, config: DistillConfig, as_json: bool) -> None:
    from agentkd.display import Display
    from agentkd.distill import distill as run
    from agentkd.distill.ranks import rank

    with Display(as_json or rank() > 0) as shown:
        shown.stage("distill")
        student = run(trajectories, out, config, shown.training, shown.say)
        shown.done(f"{student.training['steps']} steps, loss {student.training['last_loss']:.3f}")
    if as_json:
        print_json({"out": str(out), "training": student.training})
        return
    print(f"Student in {out}")
    print(f"Next: agentkd serve {out}")


def _record(trajectories: Path, out: Path, config: DistillConfig, top: int, as_json: bool) -> None:
    from agentkd.distill.recorded import record_teacher

    if as_json:
        count = record_teacher(trajectories, out, config, top)
        print_json({"out": str(out), "examples": count})
        return
    with progress_bar() as bar:
        task = bar.add_task("teacher", total=None, note="")
        count = record_teacher(
            trajectories, out, config, top, lambda done, total: bar.update(task, completed=done, total=total)
        )
    print(f"{count} examples in {out}")
    print(f"Next: agentkd distill {trajectories} --objective first --teacher-logprobs {out} --out student")


def _student(
    parent: Path | None, base: str | None, kind: str | None, adapter: str | None, rank: int | None
) -> dict[str, Any]:
    """What is trained; a parent says what was not said."""
    alpha = None if rank is None else 2 * rank
    given = {"base": base, "kind": kind, "adapter": adapter, "lora_r": rank, "lora_alpha": alpha}
    said = {name: value for name, value in given.items() if value is not None}
    if parent is None:
        return said
    from agentkd.distill.inherit import adapter_settings

    return {**adapter_settings(parent), **said, "parent": str(parent)}


_SAID = ("parent", "base", "kind", "adapter", "lora_r")
"""Settings that have an option, and are in the settings only where they were said."""
_OPTIONS = {
    "learning_rate": "--lr",
    "lora_r": "--rank",
    "parent": "--from",
    "teacher": "--teacher-model",
}
"""Options that are not called as their settings are."""
_JSON = "Write a list as JSON, as in --set 'imports=[\"math\"]'."


def _more(pairs: list[str], own: set[str]) -> dict[str, Any]:
    """Further settings of ``DistillConfig``, each read by its type.

    Args:
        pairs: ``name=value`` each.
        own: settings that have an option.

    Raises:
        ConfigError: no such setting, one that has an option, or a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    from agentkd.distill import DistillConfig

    fields = {name: field for name, field in DistillConfig.model_fields.items() if name not in own}
    found: dict[str, Any] = {}
    for name, text in setting_pairs(pairs):
        if name in own:
            option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
            raise ConfigError(f"{name} has an option of its own.", f"Use {option} instead of --set {name}.")
        if name not in fields:
            raise ConfigError(f"There is no setting {name!r}.", f"Known: {', '.join(fields)}.")
        read: TypeAdapter[Any] = TypeAdapter(fields[name].rebuild_annotation())
        try:
            found[name] = read.validate_python(text)
        except ValidationError as exc:  # no plain word or number: a list, say
            try:
                found[name] = read.validate_json(text)
            except ValidationError:
                raise ConfigError(
                    f"--set {name}={text} cannot be read: {first_problem(exc)}.", _JSON
                ) from exc
    return found


def _check(student: Path, api_base: str | None, model: str | None, as_json: bool) -> None:
    from agentkd.distill.served import require_parity

    result = check_student(student, api_base=api_base, model=model)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print(
            f"{result.prompts_equal} of {result.prompts} prompts have the ids of the training, "
            f"{result.canonical} of {result.stopped} finished greedy answers are canonical, "
            f"{result.reproduced} are exactly what was taught, {result.unchanged} of {result.compared} are those "
            f"of the finished student ({result.served_by})"
        )
        if result.sampled_other:
            print(f"{len(result.sampled_other)} of {result.sampled} sampled answers are other tokens.")
    require_parity(result)


def check_student(
    path: Path, *, api_base: str | None = None, model: str | None = None, api_key: str | None = None
) -> ServedParity:
    """Ask a served student again what it was trained on; the result goes into its folder.

    Args:
        path: the student folder.
        api_base: of a server that serves it; by default this project's, started for the check.
        model: the student's name there.
        api_key: bearer token.

    Raises:
        ConfigError: not a student, nothing to replay, or base model or adapter are other ones.
    """
    from agentkd.distill.served import check_served, endpoint, read_known, read_replays, record_served
    from agentkd.engine.probe import check_files
    from agentkd.engine.student import load_student
    from agentkd.engine.weights import load_tokenizer
    from agentkd.serve import Server, create_app, student_backend

    student = load_student(path)
    replays, tokenizer = read_replays(path), load_tokenizer(path)

    def asked(ask: Ask, served_by: str) -> ServedParity:
        return check_served(replays, student.system_prompt, tokenizer, ask, served_by, read_known(path))

    if api_base is not None:
        if model is None:
            raise ConfigError("No model was named.", "Pass --model as the endpoint lists it.")
        result = asked(endpoint(api_base, model, api_key), f"{model} at {api_base}")
    else:
        check_files(student)
        backend = student_backend(path)
        try:
            with Server(create_app([backend])) as server:
                result = asked(endpoint(server.url, backend.model_id), "agentkd serve")
        finally:
            backend.close()
    record_served(path, result)
    return result


def _weights(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    try:
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise ConfigError(
            f"--weights {text!r} cannot be read.", 'Write it as "thought=0.5,action=1,final_answer=2".'
        ) from None
