"""Settings of a training run."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from agentkd.distill.spans import SpanWeights
from agentkd.plugin import is_plugin

__all__ = ["OBJECTIVES", "DistillConfig"]

OBJECTIVES = (
    "sft",
    "masked",
    "aft",
    "dpo",
    "forward-kl",
    "reverse-kl",
    "jsd",
    "taid",
    "first",
    "plackett-luce",
)
"""Those that :mod:`agentkd.distill.choose` makes by their names."""

_NOT_IN_THE_RESULT = {
    "threads",
    "save_every",
    "micro_tokens",
    "replays",
    "parent",
    "teacher_logprobs",
    "gradient_checkpointing",
    "track",
    "shard",
}


class DistillConfig(BaseModel):
    """How a student is trained. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(default="smollm2-135m", min_length=1)
    """Base model: "smollm2-135m", a Hub id, or a local folder."""
    kind: Literal["agent", "cot"] = "agent"
    """Which trajectories are learnt: code agent, or plain chain of thought."""
    parent: str | None = None
    """Student folder whose adapter the training begins with, of the same base model and rank; None begins
    anew."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; None derives them from ``epochs``."""
    epochs: float = Field(default=2.0, gt=0)
    """Passes over the examples, when ``steps`` is None."""
    batch_size: int = Field(default=8, ge=1)
    """Trajectories of one optimiser step."""
    learning_rate: float = Field(default=1e-3, ge=0)
    """Peak of the cosine schedule."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Part of the steps in which the learning rate rises linearly."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    lora_r: int = Field(default=16, ge=1)
    """Rank of the adapters, on all linear layers."""
    lora_alpha: int = Field(default=32, ge=1)
    """Adapters are scaled by ``lora_alpha / lora_r``."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters; anything but 0 is slower on a CPU."""
    max_length: int = Field(default=1024, ge=8)
    """Longest example in tokens."""
    overlong: Literal["drop", "cut"] = "drop"
    """What becomes of longer ones: left out, or cut behind the last whole step that fits; counted."""
    rendering: Literal["whole", "step"] = "whole"
    """A trajectory is one example ("whole"), or every step is one with a prompt of its own ("step"), which
    chat templates need that rewrite earlier turns."""
    failed_steps: Literal["context", "target"] = "context"
    """Failed steps are only read, or learnt as well."""
    first_thought: Literal["target", "context"] = "target"
    """The beginning of a step that was given to the teacher is learnt as the student's own, or only read."""
    weights: SpanWeights = SpanWeights()
    """How much tokens of thoughts, actions and final answers count."""
    order: Literal["shuffle", "file"] = "shuffle"
    """Every pass in another order ("shuffle"), or each in that of the file, for a curriculum."""
    seed: int = 0
    """Of the adapters' initial weights, the order of examples, and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of frozen weights and activations; "auto" is bf16 where the hardware computes in it."""
    system_prompt: str | None = None
    """Another system prompt than the short one of students."""
    max_steps: int | None = Field(default=None, ge=1)
    """Step limit of the student as an agent; None takes that of the trajectories."""
    imports: tuple[str, ...] | None = None
    """Modules the student's code may import; None takes those of the trajectories."""
    save_every: int = Field(default=5, ge=1)
    """Steps between checkpoints."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; None leaves it to torch (one a core)."""
    micro_tokens: int = Field(default=2048, ge=1)
    """Tokens that are computed at once: less needs less memory."""

    objective: str = "sft"
    """What is minimised, see :mod:`agentkd.distill.objectives` and :mod:`agentkd.distill.preference`; one of
    :data:`OBJECTIVES`, or yours as ``module:Name``."""
    negatives: str | None = None
    """Objectives "aft" and "dpo": ``dropped.jsonl`` of the filter, whose wrong trajectories are held
    against the right ones of the same question."""
    negatives_per_example: int = Field(default=1, ge=1)
    """Wrong trajectories held against a right one in a step, drawn anew in each."""
    aft_bound: float = Field(default=0.5, gt=0)
    """Objective "aft": nats a token by which a wrong trajectory may fall below the right one."""
    dpo_beta: float = Field(default=0.1, gt=0)
    """Objective "dpo": how much a deviation from the student before the first step counts."""
    sft_weight: float | None = Field(default=None, ge=0)
    """Cross-entropy on the right trajectory beside "aft" and "dpo"; None is 1 with "aft", 0 with "dpo"."""
    teacher: str | None = None
    """Local model with the same vocabulary, for the objectives that need a teacher's logits."""
    teacher_logprobs: str | None = None
    """Instead of ``teacher``, for "first" and "plackett-luce": a file of its likeliest tokens at each target,
    see :mod:`agentkd.distill.recorded`. Its content decides the result, its path does not."""
    teacher_share: float = Field(default=1.0, gt=0, le=1)
    """Of the divergence from the teacher; the rest is cross-entropy."""
    mask_rate: float = Field(default=0.4, ge=0, lt=1)
    """Objective "masked": share of the student's own tokens that it does not get to read."""
    replays: int = Field(default=3, ge=0)
    """Trajectories that the finished student is asked again to check parity; 0 checks none."""
    adapter: Literal["lora", "dora", "qlora", "full"] = "lora"
    """What is trained, see :mod:`agentkd.distill.adapters`."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, slower."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the questions that is held out; the student is the one with the least loss on them."""
    eval_every: int = Field(default=10, ge=1)
    """Steps between two looks at the held-out loss; there is one more behind the last step."""
    patience: int | None = Field(default=None, ge=1)
    """Looks without a better held-out loss after which training ends; None goes on to the last step."""
    track: Literal["tensorboard", "trackio", "wandb"] | None = None
    """Where the figures of each step are sent as well; None sends them nowhere."""
    shard: bool = False
    """Share weights, gradients and optimiser out among the processes, see :mod:`agentkd.distill.shard`; for
    a model that does not fit one GPU."""

    @field_validator("objective")
    @classmethod
    def _named(cls, value: str) -> str:
        """A name that is known, or one that can be: what stands in a module is loaded when it is needed."""
        if value in OBJECTIVES or is_plugin(value):
            return value
        raise ValueError(
            f"there is no objective {value!r}; choose one of {', '.join(OBJECTIVES)}, or yours as module:Name"
        )

    def fingerprint(self, data: str) -> str:
        """Hash of all that decides the result; of an objective of yours its name, not its code.

        Args:
            data: hash of the trajectories, of the adapter that the training begins with, and of other files
                that are learnt from.
        """
        chosen = self.model_dump_json(exclude=_NOT_IN_THE_RESULT)
        return hashlib.sha256(f"{chosen}\n{data}".encode()).hexdigest()
