"""From ``kept.jsonl`` to a student folder, in one resumable call.

The manifest is written last. Until then the folder holds ``checkpoint.pt`` and ``loss.jsonl``,
from which the same call goes on with the very numbers it would have had without the stop.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentkd.distill.adapters import check_adapter, check_shard
from agentkd.distill.batches import hold_out
from agentkd.distill.card import write_card
from agentkd.distill.choose import make_preference
from agentkd.distill.config import DistillConfig
from agentkd.distill.context import check_context
from agentkd.distill.examples import Example, ExampleSet, build_examples
from agentkd.distill.inherit import check_parent, data_hash
from agentkd.distill.memory import (
    MIB,
    MemoryNeed,
    estimate_memory,
    fits_as_a_whole,
    free_memory,
    refuse_too_little,
    told_what_to_lower,
)
from agentkd.distill.negatives import build_negatives, negatives_hash, read_rejected
from agentkd.distill.parity import find_faults, refuse_faults
from agentkd.distill.ranks import group, rank, world
from agentkd.distill.recorded import recorded_hash
from agentkd.distill.served import (
    Replay,
    ServedParity,
    check_served,
    engine,
    make_replays,
    require_parity,
    write_parity,
)
from agentkd.engine.student import Student, is_student, load_student
from agentkd.engine.weights import load_tokenizer, model_hash, resolve_model, stop_ids
from agentkd.errors import ConfigError, DataError, TrainingError, boundary
from agentkd.prompt import FENCE_CLOSE, FENCE_OPEN
from agentkd.record import read_json, read_trajectories, write_json, write_manifest
from agentkd.trajectory import Trajectory

__all__ = ["Progress", "distill"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss)."""


def distill(
    trajectories: Path | str,
    out: Path | str,
    config: DistillConfig | None = None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] = log.info,
) -> Student:
    """Train a student; a finished one is returned at once, a stopped training goes on.

    Args:
        trajectories: ``kept.jsonl``.
        out: the student folder.
        config: the settings.
        on_progress: called after each step.
        say: told, before the first step, what the training needs and which examples are compared.

    Raises:
        DataError: nothing to learn from.
        ConfigError: base model, teacher or parent will not do, ``out`` holds other work, or one process is to
            share the model out.
        TrainingError: the chat template will not do, the loss is no longer a number, or the student is
            not served as it was trained.
    """
    trajectories, out = Path(trajectories), Path(out)
    config = config or DistillConfig()
    check_shard(config, world())
    if not trajectories.is_file():
        raise DataError(f"There is no file {trajectories}.", "Check the path, or run: agentkd filter.")
    learnt_from = data_hash(trajectories, config.parent) + negatives_hash(config) + recorded_hash(config)
    fingerprint = config.fingerprint(learnt_from)
    with _only_one(out):
        if is_student(out):
            return _finished(out, fingerprint)
        base = resolve_model(config.base)
        identity = {"fingerprint": fingerprint, "base": model_hash(base)}
        parent = check_parent(config, identity["base"])
        tokenizer = load_tokenizer(base)
        items = {item.id: item for item in read_trajectories(trajectories)}
        examples = build_examples(list(items.values()), tokenizer, config)
        for reason, count in examples.dropped.items():
            log.warning("%d of the trajectories left out: %s.", count, reason)
        stops = stop_ids(base, tokenizer)
        prompt, failed = examples.system_prompt, config.failed_steps
        refuse_faults(find_faults(examples.examples, items, prompt, tokenizer, stops, failed_steps=failed))
        examples, negatives = _contrasted(examples, items, tokenizer, stops, config, say)
        learnt, held_out = _held_out(examples, items, config)
        identity["examples"] = examples.digest()
        with boundary(ConfigError, "importing torch", 'Install them: pip install "agentkd[train]"'):
            from agentkd.distill.loop import run_training
        check_adapter(config)
        wrong = [it for several in (negatives or {}).values() for it in several]
        check_context(base, config, [*examples.examples, *wrong])
        with boundary(TrainingError, f"training {out}"), told_what_to_lower(config), group(out) as place:
            need = _memory(base, examples, config, say)  # on the GPU that this process has in the group
            summary = run_training(base, learnt, config, place, identity, on_progress, held_out, negatives)
        if rank():
            raise SystemExit(0)  # the first process has all that is to be written
        summary["memory_estimate_mib"] = round(need.total / MIB)
        if parent is not None:
            summary["parent"] = parent
        replays = make_replays(examples.examples, items, examples.system_prompt, tokenizer, config.replays)
        _close(out, trajectories, tokenizer, config, examples, identity, summary, replays)
    return load_student(out)


def _contrasted(
    examples: ExampleSet,
    items: dict[str, Trajectory],
    tokenizer: Any,
    stops: frozenset[int],
    config: DistillConfig,
    say: Callable[[str], None],
) -> tuple[ExampleSet, dict[str, tuple[Example, ...]] | None]:
    """The wrong examples beside the right ones, for the objectives that need them.

    Without cross-entropy a right example that has no wrong one teaches nothing, and is left out.
    """
    preference = make_preference(config) if config.negatives is not None else None
    if preference is None or config.negatives is None:
        return examples, None
    if config.rendering == "step":
        raise ConfigError(
            f"The objective {config.objective} compares whole trajectories.", 'Use rendering "whole".'
        )
    if world() > 1:
        raise ConfigError(f"The objective {config.objective} is trained by one process.", "Leave --gpus out.")
    tasks = {it.id: items[it.id].task.id for it in examples.examples}
    found = build_negatives(read_rejected(Path(config.negatives)), examples, tasks, tokenizer, stops, config)
    for reason, count in found.left_out.items():
        say(f"{count} of the rejected trajectories are no negatives: {reason}.")
    alone = sum(it.id not in found.by_right for it in examples.examples)
    say(f"{len(found.by_right)} of {len(tasks)} trajectories have a wrong one beside them.")
    if not preference.sft_weight and alone:
        log.warning("%d of the trajectories left out: no wrong one of their question.", alone)
        chosen = tuple(it for it in examples.examples if it.id in found.by_right)
        examples = replace(examples, examples=chosen, dropped={**examples.dropped, "no wrong one": alone})
    return examples, found.by_right


def _memory(
    base: Path, examples: ExampleSet, config: DistillConfig, say: Callable[[str], None]
) -> MemoryNeed:
    need, free = estimate_memory(base, config, examples.examples), free_memory()
    say(f"The training needs about {need}; {free / MIB:,.0f} MiB are free.")
    if warning := refuse_too_little(need, free, config):
        log.warning(warning)
    return need


def _held_out(
    examples: ExampleSet, items: dict[str, Trajectory], config: DistillConfig
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    tasks = {
        it.id: items[it.id if it.id in items else it.id.rpartition("/")[0]].task.id
        for it in examples.examples
    }
    return hold_out(examples.examples, tasks, config.eval_fraction, config.seed)


def _finished(out: Path, fingerprint: str) -> Student:
    student = load_student(out)
    if student.training.get("fingerprint") != fingerprint:
        raise ConfigError(
            f"{out} already holds a student with other settings or other trajectories.",
            "Choose another --out, or remove the folder.",
        )
    _tidy(out)
    return student


def _tidy(out: Path) -> None:
    """Remove what only an unfinished training needs."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "best.pt"):
        (out / name).unlink(missing_ok=True)


def _close(
    out: Path,
    trajectories: Path,
    tokenizer: Any,
    config: DistillConfig,
    examples: ExampleSet,
    identity: dict[str, str],
    summary: dict[str, Any],
    replays: list[Replay],
) -> None:
    counts = {"n_examples": len(examples.examples), "dropped": examples.dropped}
    student = Student(
        kind=config.kind,
        base=config.base,
        base_hash=identity["base"],
        system_prompt=examples.system_prompt,
        tools=examples.tools,
        fences=(FENCE_OPEN, FENCE_CLOSE),
        max_steps=examples.max_steps,
        imports=examples.imports,
        passages=examples.passages,
        passage_tokens=examples.passage_tokens,
        weights="model" if config.adapter == "full" else "adapter",
        training={
            "config": config.model_dump(mode="json"),
            "fingerprint": identity["fingerprint"],
            **counts,
            **summary,
        },
    )
    with boundary(TrainingError, f"writing {out}"):
        tokenizer.save_pretrained(str(out))
    write_json(out / "student.json", student.model_dump(mode="json"))
    served = None
    if replays and not fits_as_a_whole(resolve_model(config.base), config, examples.examples):
        log.warning(
            "The student is larger than a GPU, and was not asked again: agentkd distill --check %s", out
        )
    elif replays:
        served = _served_parity(out, replays, config)
    before = {"examples": len(examples.examples), "digest": identity["examples"]}
    write_parity(out, replays, before, served)
    if served is not None:
        require_parity(
            served,
            f"{out} is not finished, and {out / 'parity.json'} has all that was found. Mend the base model's "
            "tokenizer or chat template and run the same command again, or finish the student unchecked with "
            "--set replays=0.",
        )
    write_manifest(
        out,
        stage="distill",
        config=config.model_dump(mode="json"),
        counts={**counts, **summary},
        inputs=[trajectories, *(Path(it) for it in (config.negatives, config.teacher_logprobs) if it)],
        outputs=[
            out / "student.json",
            out / "loss.jsonl",
            out / "parity.json",
            *sorted((out / student.weights).glob("*.safetensors")),
        ],
    )
    write_card(load_student(out))
    _tidy(out)


def _served_parity(out: Path, replays: list[Replay], config: DistillConfig) -> ServedParity:
    """Ask the finished student, loaded from its folder as a server would."""
    from agentkd.engine.torch_engine import TorchEngine

    tokenizer = load_tokenizer(out)
    system = read_json(out / "student.json")["system_prompt"]
    weights = out / ("model" if config.adapter == "full" else "adapter")
    with TorchEngine.load(resolve_model(config.base), weights, threads=config.threads) as model:
        return check_served(replays, system, tokenizer, engine(model, tokenizer), "embedded engine")


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    import fcntl

    if rank():  # it helps the process that holds the folder, and writes nothing there
        yield
        return

    with boundary(ConfigError, f"opening {out}", "Choose another --out."):
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process is training {out}.", "Wait for it, stop it, or choose another --out."
            ) from None
        yield
    finally:
        os.close(handle)
