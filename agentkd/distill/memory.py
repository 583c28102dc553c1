"""How much memory a training needs, before it starts, and what to lower when it was too little."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example
from agentkd.distill.ranks import world
from agentkd.engine.weights import resolve_model
from agentkd.errors import TrainingError

__all__ = [
    "MemoryNeed",
    "estimate_memory",
    "fits_as_a_whole",
    "free_memory",
    "refuse_too_little",
    "told_what_to_lower",
]

MIB = 1 << 20
FOUR_BITS = 0.53
"""Bytes a weight in 4 bits with its doubly quantised scales."""
KEPT = (14, 4)
"""Numbers a token that a layer keeps for the backward pass: so many times its width, and its inner width."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes, by what they are for."""

    weights: float
    """The base model, and on a CPU its copy with the adapter merged; of one that is shared out a part, and
    what of it is whole at one time."""
    trained: float
    """What is trained, its gradients, and Adam's two moments; all float32. Of what is shared out a part."""
    activations: float
    """What the backward pass needs of the tokens computed at once."""
    logits: float
    """Of the targets computed at once."""
    teacher: float = 0.0
    """The weights of a local teacher."""

    @property
    def fixed(self) -> float:
        """What is needed whatever the batch."""
        return self.weights + self.trained + self.teacher

    @property
    def total(self) -> float:
        """All of it."""
        return self.fixed + self.activations + self.logits

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            *((("teacher", self.teacher),) if self.teacher else ()),
            ("trained with gradients and optimiser", self.trained),
            ("activations", self.activations),
            ("logits", self.logits),
        )
        return (
            f"{self.total / MIB:,.0f} MiB ("
            + ", ".join(f"{name} {size / MIB:,.0f}" for name, size in parts)
            + ")"
        )


def estimate_memory(base: Path, config: DistillConfig, examples: Sequence[Example]) -> MemoryNeed:
    """What a process of a training will need at its peak, from the model's shape alone: no weight is loaded.

    Args:
        base: folder of the model.
        config: the settings.
        examples: what is learnt; the longest decides how many tokens are computed at once.
    """
    import torch
    from torch import nn

    from agentkd.distill.learner import compute_dtype

    model = _empty(base)
    text = model.config.get_text_config()
    inner = [
        it for it in model.modules() if isinstance(it, nn.Linear) and it is not model.get_output_embeddings()
    ]
    size = 2 if compute_dtype(config.precision) == torch.bfloat16 else 4
    whole = _size(model)
    linear = sum(it.weight.numel() for it in inner)
    merged = config.adapter == "lora" and not config.shard and not torch.cuda.is_available()
    extra = linear * size if merged else 0
    if config.adapter == "full":
        weights, trained = 0.0, float(whole)
    else:
        each = FOUR_BITS if config.adapter == "qlora" else size
        weights = whole * size - linear * (size - each) + extra
        trained = sum(config.lora_r * (it.in_features + it.out_features) for it in inner)
        trained += sum(it.out_features for it in inner) if config.adapter == "dora" else 0
    layers = text.num_hidden_layers
    if config.shard:
        at_once = _at_once(whole - linear, linear / layers, size, config)
        weights, trained = weights / world() + at_once, trained / world()
    tokens = max(config.micro_tokens, max(len(example.ids) for example in examples))
    wide = text.hidden_size
    kept = KEPT[0] * wide + KEPT[1] * getattr(text, "intermediate_size", 4 * wide)
    per_token = layers * wide + kept if config.gradient_checkpointing else layers * kept
    rows = 128 if config.objective == "sft" and config.adapter != "full" else tokens // 2
    return MemoryNeed(
        weights=float(weights),
        trained=16.0 * trained,
        activations=float(tokens * per_token * size),
        logits=3.0 * 4 * rows * text.vocab_size,
        teacher=0.0 if config.teacher is None else float(size * _size(_empty(resolve_model(config.teacher)))),
    )


def _empty(folder: Path) -> Any:
    """The model of a folder, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def _size(model: Any) -> int:
    return sum(value.numel() for value in model.parameters())


def _at_once(outside: float, layer: float, size: int, config: DistillConfig) -> float:
    """Bytes of what is whole at one time of a model that is shared out.

    That is all that lies outside the layers, a layer, and the next one, which is gathered ahead.

    Args:
        outside, layer: how many weights.
        size: bytes of one in computing.
        config: the settings; trained weights outside the layers are float32, and have gradients.
    """
    if config.adapter == "full":
        return 2.0 * (4 * outside + 2 * layer * size)
    return size * (outside + 2 * layer)


def fits_as_a_whole(base: Path, config: DistillConfig, examples: Sequence[Example]) -> bool:
    """Whether a finished student can be loaded on the device it was trained on.

    Args:
        base: folder of the base model.
        config: the settings; only what is shared out can be larger than its GPU.
        examples: what was learnt.
    """
    import torch

    if not config.shard or not torch.cuda.is_available():
        return True
    gc.collect()  # FSDP's objects hold each other
    torch.cuda.empty_cache()
    alone = config.model_copy(update={"shard": False, "adapter": "lora"})
    return estimate_memory(base, alone, examples).weights < free_memory()


def free_memory() -> float:
    """Bytes that are free where it will be computed; infinity where that cannot be known."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    limits = [float("inf")]
    for path, key in ((Path("/proc/meminfo"), "MemAvailable:"), (Path("/sys/fs/cgroup/memory.max"), "")):
        try:
            words = path.read_text(encoding="utf-8").split()
        except OSError:
            continue
        if key in words:
            limits.append(float(words[words.index(key) + 1]) * (1024 if key else 1))
        elif not key and words[0].isdigit():
            used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8")
            limits.append(float(words[0]) - float(used))
    return min(limits)


def refuse_too_little(need: MemoryNeed, free: float, config: DistillConfig) -> str | None:
    """A warning when it may not fit; None when it will.

    Raises:
        TrainingError: it cannot fit, whatever the batch.
    """
    if need.fixed > free:
        raise TrainingError(
            f"The training needs {need}, and {free / MIB:,.0f} MiB are free.",
            (
                "Use --adapter lora"
                if config.adapter == "full"
                else f"Use --adapter qlora or a smaller base model{' or teacher' if need.teacher else ''}"
            )
            + (", or more GPUs." if config.shard else ", or share it out among GPUs: --gpus N --shard."),
        )
    if need.total > free:
        return f"The training may need {need}, and {free / MIB:,.0f} MiB are free. {what_to_lower(config)}"
    return None


def what_to_lower(config: DistillConfig) -> str:
    """Advice, in the order of what it costs."""
    less = max(1, config.micro_tokens // 2)
    advice = [
        f"Lower micro_tokens (now {config.micro_tokens}): --set micro_tokens={less}",
        f"or --max-length (now {config.max_length})",
    ]
    if not config.gradient_checkpointing:
        advice.append("or add --gradient-checkpointing")
    if config.adapter == "full":
        advice.append("or use --adapter lora")
    return ", ".join(advice) + "."


@contextmanager
def told_what_to_lower(config: DistillConfig) -> Iterator[None]:
    """Out of memory, however torch says it, becomes an error that says what to lower.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not _ran_out(exc):
            raise
        raise TrainingError(
            f"Memory ran out in training: {str(exc).splitlines()[0]}", what_to_lower(config)
        ) from exc


def _ran_out(exc: Any) -> bool:
    import torch

    said = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(exc, (MemoryError, torch.OutOfMemoryError)) or any(it in str(exc) for it in said)
