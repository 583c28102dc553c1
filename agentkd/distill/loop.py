"""The training loop. Everything a step does is a pure function of (state, settings, step)."""

from __future__ import annotations

import io
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from agentkd.distill.batches import batch_indices, total_steps
from agentkd.distill.blame import no_number
from agentkd.distill.choose import check_teacher, make_objective, make_preference, top_read
from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example
from agentkd.distill.held_out import Best, held_out_loss
from agentkd.distill.learner import Learner
from agentkd.distill.ranks import mine, of_the_first, rank, sum_over_ranks, world
from agentkd.distill.recorded import RecordedTeacher
from agentkd.distill.shard import check_values, gathered, plain_value, read_state, take_over_state
from agentkd.distill.teacher import LocalTeacher, Teacher
from agentkd.distill.tracking import tracker
from agentkd.distill.workers import Contrast, Goal, Workers, score_references, side_by_side
from agentkd.engine.weights import load_tokenizer, resolve_model
from agentkd.errors import ConfigError, TrainingError, boundary
from agentkd.record import AppendLog, iter_jsonl, read_json, write_json, write_jsonl

__all__ = ["CHECKPOINTS", "StepLog", "learning_rate", "run_training"]

log = logging.getLogger(__name__)

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
"""The last, and the one before it, which is taken when the last cannot be read."""
_STATE = {"identity", "step", "parameters", "optimizer"}
"""What a checkpoint holds."""


class StepLog(BaseModel):
    """One line of ``loss.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    """1 for the first."""
    loss: float
    """Mean cross-entropy (nats) of the step's target tokens, weighted by what they count."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of the step's examples."""
    targets: int
    """Tokens that were learnt."""
    seconds: float
    """Wall-clock."""
    held_out: float | None = None
    """Mean loss of the held-out examples behind this step, where there was a look at them: cross-entropy
    (nats), or with "aft" and "dpo" the objective."""


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warmup, then a cosine to zero.

    Args:
        step: 0 for the first.
        steps: in all.
        peak: the highest rate.
        warmup: part of the steps that rise.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def run_training(
    base: Path,
    examples: Sequence[Example],
    config: DistillConfig,
    out: Path,
    identity: dict[str, str],
    on_progress: Any = None,
    held_out: Sequence[Example] = (),
    negatives: Mapping[str, Sequence[Example]] | None = None,
) -> dict[str, Any]:
    """Train to the end, from the last checkpoint in ``out`` if there is one.

    Args:
        base: folder of the base model.
        examples: what to learn.
        config: the settings.
        out: where checkpoint, ``loss.jsonl`` and ``adapter/`` are written.
        identity: hashes of settings and data; a checkpoint with other ones is refused.
        on_progress: called after each step with (step, steps, loss).
        held_out: what is not learnt; the parameters with the least loss on it are the student's.
        negatives: wrong examples by the id of the right one, for the objectives that need them.

    Returns:
        A summary: steps, losses, tokens, seconds.

    Raises:
        ConfigError: the checkpoint belongs to other settings or data.
        TrainingError: the loss or its gradient is not a number; names the trajectory.
    """
    steps = total_steps(len(examples), config.batch_size, config.steps, config.epochs)
    learner = Learner(base, config)
    parameters = learner.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
    goal = _goal(base, learner, examples, config)
    if negatives is not None:  # before the checkpoint is taken over: the reference is the student as it was
        everything = [*examples, *held_out]
        goal = replace(goal, contrast=_contrast(out, identity, learner, everything, negatives, config))
    begun = _restore(out, identity, parameters, optimizer)
    _begin_together(begun, learner.device)
    rows = _rewind(out / "loss.jsonl", begun)
    best = Best(out / "best.pt", [row.held_out for row in rows if row.held_out is not None])
    with (
        AppendLog(out / "loss.jsonl") as losses,
        tracker(config, out) as track,
        side_by_side(learner, config, goal) as workers,
    ):
        for step in range(begun, steps):
            if config.patience is not None and best.since >= config.patience:
                break
            chosen = batch_indices(
                len(examples), config.batch_size, config.seed, step, shuffled=config.order == "shuffle"
            )
            batch = [examples[place] for place in chosen]
            rate = learning_rate(step, steps, config.learning_rate, config.warmup)
            row = _step(learner, parameters, optimizer, batch, config, (step, steps), rate, workers)
            if held_out and ((step + 1) % config.eval_every == 0 or step + 1 == steps):
                unseen = of_the_first(held_out_loss(learner, held_out, goal.contrast), learner.device)
                best.add(unseen, parameters)
                row = row.model_copy(update={"held_out": unseen})
            losses.append(row)
            rows.append(row)
            track(row.model_dump(exclude={"step"}, exclude_none=True), row.step)
            if on_progress is not None:
                on_progress(step + 1, steps, row.loss)
            if (step + 1) % config.save_every == 0 and step + 1 < steps:
                _save(out, identity, step + 1, parameters, optimizer)
    last = None if best.losses else gathered([value.detach() for value in parameters])
    if not rank():
        _save_adapter(
            learner,
            out / ("model" if learner.whole else "adapter"),
            best.values(parameters) if last is None else last,
        )
    return {**_summary(rows, learner), **_held_out(rows)}


def _held_out(rows: Sequence[StepLog]) -> dict[str, Any]:
    """Of the summary: the least held-out loss, and at which step it was."""
    seen = [row for row in rows if row.held_out is not None]
    if not seen:
        return {}
    least = min(seen, key=lambda row: (row.held_out, row.step))
    return {"held_out_loss": least.held_out, "best_step": least.step}


def _goal(base: Path, learner: Learner, examples: Sequence[Example], config: DistillConfig) -> Goal:
    check_teacher(config)
    tokenizer = load_tokenizer(base)
    mask_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    objective = make_objective(config, mask_id)
    teacher: Teacher | None = None
    if config.teacher_logprobs is not None:
        path, top = Path(config.teacher_logprobs), top_read(objective) or 1
        teacher = RecordedTeacher(path, examples, len(tokenizer), top, learner.device)
    elif config.teacher is not None:
        teacher = LocalTeacher(resolve_model(config.teacher), tokenizer, learner.device, learner.dtype)
    return Goal(objective, teacher, config.seed)


def _contrast(
    out: Path,
    identity: dict[str, str],
    learner: Learner,
    examples: Sequence[Example],
    negatives: Mapping[str, Sequence[Example]],
    config: DistillConfig,
) -> Contrast:
    """What is held against what; the reference's log-probabilities are computed once and kept."""
    preference = make_preference(config)
    assert preference is not None
    references: dict[str, float] = {}
    if preference.needs_reference:
        path = out / "reference.json"
        kept = read_json(path) if path.is_file() else {}
        if kept.get("identity") != identity:
            wrong = {it.id: it for each in negatives.values() for it in each}
            right = [it for it in examples if it.id in negatives]
            kept = {"identity": identity, "scores": score_references(learner, [*right, *wrong.values()])}
            write_json(path, kept)
        references = kept["scores"]
    return Contrast(preference, negatives, config.negatives_per_example, references)


def _step(
    learner: Learner,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    config: DistillConfig,
    place: tuple[int, int],
    rate: float,
    workers: Workers,
) -> StepLog:
    step, steps = place
    began = time.perf_counter()
    # Dropout must not depend on what happened before, or a resumed run would differ.
    torch.manual_seed(config.seed * 1_000_003 + step)
    targets = sum(example.targets for example in batch)
    learner.refresh()
    loss = 0.0
    weight = sum(example.weight for example in batch)
    for part, grads in workers.map(mine(workers.lay_out(batch, step)), weight, step, steps):
        loss += part
        _accumulate(parameters, grads)
    loss = sum_over_ranks(() if learner.sharded else parameters, loss, learner.device)
    norm = plain_value(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    if not math.isfinite(norm):

        def finite(example: Example) -> bool:
            optimizer.zero_grad(set_to_none=True)
            units = workers.lay_out([example], step)
            # Of a model that is shared out, nobody computes alone.
            for _, grads in workers.map(mine(units) if learner.sharded else units, weight, step, steps):
                _accumulate(parameters, grads)
            return math.isfinite(plain_value(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))

        raise no_number(f"The gradient of step {step + 1}", batch, finite)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepLog(
        step=step + 1,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=sum(len(example.ids) for example in batch),
        targets=targets,
        seconds=round(time.perf_counter() - began, 3),
    )


def _accumulate(parameters: Sequence[torch.nn.Parameter], grads: Sequence[torch.Tensor | None]) -> None:
    for value, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            value.grad = grad if value.grad is None else value.grad.add_(grad)


def _save(
    out: Path,
    identity: dict[str, str],
    step: int,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {
        "identity": identity,
        "step": step,
        "parameters": gathered([value.detach() for value in parameters]),
        "optimizer": gathered(optimizer.state_dict()),
    }
    if rank():
        return
    # Through memory: torch would report a full disk as something else.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    partial = out / "checkpoint.pt.partial"
    with boundary(TrainingError, f"writing {partial}"), partial.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    latest = out / "checkpoint.pt"
    if latest.is_file():
        latest.replace(out / "checkpoint.previous.pt")
    partial.replace(latest)


def _restore(
    out: Path,
    identity: dict[str, str],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Take over the last checkpoint that can be read; returns the number of steps that are done."""
    again = "Choose another --out, or remove the folder to start again."
    present = [path for name in CHECKPOINTS if (path := out / name).is_file()]
    if not present:
        return 0
    for path in present:
        try:
            with boundary(TrainingError, f"reading {path}", again):
                state = read_state(path, parameters[0])
                if not isinstance(state, dict) or (lacking := sorted(_STATE - state.keys())):
                    what = f"it has no {lacking[0]}" if isinstance(state, dict) else "it is something else"
                    raise ValueError(f"no checkpoint of a training: {what}")
        except TrainingError as exc:
            if path == present[-1]:
                raise
            log.warning("%s Going on from the one before.", exc.message)
        else:
            break
    if state["identity"] != identity:
        raise ConfigError(f"{out} holds a training with other settings, data or base model.", again)
    with boundary(TrainingError, f"taking over {path}", again):
        check_values(state["parameters"], parameters)
        take_over_state(state, parameters, optimizer)
        return int(state["step"])


def _begin_together(begun: int, device: torch.device) -> None:
    """Wait until all processes have read the checkpoint: the first of them soon replaces it."""
    if sum_over_ranks((), begun, device) != begun * world():
        raise TrainingError(
            "The processes do not go on from the same checkpoint.", "Choose an --out that all of them see."
        )


def _rewind(path: Path, steps: int) -> list[StepLog]:
    """Cut the log back to the checkpoint; the steps behind it are done again."""
    rows: list[StepLog] = []
    if path.is_file():
        rows = [row for row in iter_jsonl(path, StepLog, skip_torn=True) if row.step <= steps]
        write_jsonl(path, rows)
    return rows


def _save_adapter(learner: Learner, folder: Path, values: Sequence[torch.Tensor]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    with boundary(TrainingError, f"writing {folder}"):
        shutil.rmtree(partial, ignore_errors=True)
        learner.save(partial, values)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)


def _summary(rows: Sequence[StepLog], learner: Learner) -> dict[str, Any]:
    last = rows[-max(1, len(rows) // 10) :]
    seconds = sum(row.seconds for row in rows)
    tokens = sum(row.tokens for row in rows)
    return {
        "steps": len(rows),
        "first_loss": rows[0].loss,
        "last_loss": sum(row.loss for row in last) / len(last),
        "tokens": tokens,
        "targets": sum(row.targets for row in rows),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "trained_parameters": sum(value.numel() for value in learner.parameters()),
        "device": learner.device.type,
        "precision": str(learner.dtype).removeprefix("torch."),
        "packed": learner.packed,
    }
