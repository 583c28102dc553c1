"""The model under training: base weights frozen, adapters beside, and one method, the loss.

On a CPU, and for the architectures named in ``_PACKABLE``, examples are packed and the
operations of :mod:`agentkd.distill.kernels` are used. Any other model runs its own unchanged
forward pass, one example at a time: slower, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agentkd.distill.adapters import load_trainable
from agentkd.distill.batches import Pack, pack_batch, single_packs
from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example
from agentkd.distill.inherit import take_over
from agentkd.distill.kernels import merged_linear, packed_attention, rms_norm, swiglu, target_loss
from agentkd.distill.shard import Compute, shard
from agentkd.engine.decoder import cpu_dtype

__all__ = ["Learner", "compute_dtype"]

_PACKABLE = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
_ATTENTION = "agentkd_packed"
_SILU = {"SiLU", "SiLUActivation"}


def compute_dtype(precision: str) -> torch.dtype:
    """bf16 where the hardware multiplies in it, float32 elsewhere, unless asked for."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return cpu_dtype()


class Learner:
    """A base model, and what of it or beside it is trained.

    Args:
        base: folder of the base model.
        config: the settings.

    Raises:
        ConfigError: the parent's adapter is another one than the settings describe.
        TrainingError: adapters cannot be added to this model.
    """

    def __init__(self, base: Path, config: DistillConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(config.precision)
        # What is shared out never stands on a GPU as a whole.
        place = torch.device("cpu") if config.shard else self.device
        model, self.peft = load_trainable(base, config, place, self.dtype)
        model.config.use_cache = False
        self.packed = _can_pack(model.config)
        if config.parent is not None:
            take_over(self.peft, Path(config.parent) / "adapter")
        self.model: Any = model
        self.whole = config.adapter == "full"
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
            enable = getattr(
                model, "activation_checkpointing_enable", None
            )  # its name since transformers 5.24
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.peft.train()
        self._budget = config.micro_tokens
        self._merged: list[_Merged] = []
        # Only where the layer is weight + scale * b @ a: dora's is not, and qlora's weight is no matrix. A
        # merged copy of what is shared out would have to be whole.
        plain = config.lora_dropout == 0 and config.adapter == "lora" and not config.shard
        if self.device.type == "cpu" and plain:
            self._merged = list(_merge_linears(self.peft))
        if self.packed:
            _use_packed_attention(model)
            if self.device.type == "cpu" and not self.whole:
                _use_fused_operations(model)  # they give no gradient to a weight
        self.sharded = config.shard
        self._compute: Compute = _directly
        if config.shard:
            narrow = self.whole and self.dtype != torch.float32
            self._compute = shard(model, self.device, self.dtype if narrow else None)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order."""
        return [value for _, value in self._trained()]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.peft.named_parameters() if value.requires_grad]

    def refresh(self) -> None:
        """Call it before the first loss of a step: takes over the adapters' present values."""
        for linear in self._merged:
            linear.refresh()

    def packs(self, batch: Sequence[Example], groups: int) -> list[Pack]:
        """How a batch is laid out for this model; ``groups`` packs are computed at one time."""
        return pack_batch(batch, self._budget, groups) if self.packed else single_packs(batch)

    def together(self, examples: Sequence[Example]) -> list[Pack]:
        """Some examples in as few packs as this model can compute: one, or one an example."""
        if not self.packed:
            return single_packs(examples)
        return pack_batch(examples, sum(len(example.ids) for example in examples))

    def losses(self, pack: Pack) -> Tensor:
        """Cross-entropy (nats, float32) of each target of a pack, with gradient."""
        targets = torch.tensor(pack.targets, device=self.device)
        if not self.packed or self.whole:
            return nn.functional.cross_entropy(self.logits(pack), targets, reduction="none")
        with self._autocast():
            return self._compute(
                lambda: target_loss(self._hidden(pack, pack.ids), self.model.lm_head.weight, targets)
            )

    def logits(self, pack: Pack, ids: Sequence[int] | None = None) -> Tensor:
        """Logits (targets, vocabulary), float32, with gradient; for objectives that need them all.

        Args:
            pack: the batch.
            ids: read instead of ``pack.ids``, of the same length.
        """
        ids = pack.ids if ids is None else ids
        with self._autocast():
            if self.packed:
                logits = self._compute(
                    lambda: nn.functional.linear(self._hidden(pack, ids), self.model.lm_head.weight)
                )
            else:
                rows = torch.tensor(pack.rows, device=self.device)
                inputs = torch.tensor([list(ids)], device=self.device)
                logits = self._compute(
                    lambda: self.model(input_ids=inputs, use_cache=False, logits_to_keep=rows).logits
                )[0]
        return logits.float()

    def _hidden(self, pack: Pack, ids: Sequence[int]) -> Tensor:
        """The last hidden states at the places that predict a target: (targets, width)."""
        hidden: Tensor = self.model.model(
            input_ids=torch.tensor([list(ids)], device=self.device),
            position_ids=torch.tensor([pack.positions], device=self.device),
            use_cache=False,
            pack_prefix=pack.prefix,
            pack_lengths=pack.lengths,
        ).last_hidden_state[0]
        return hidden[torch.tensor(pack.rows, device=self.device)]

    def save(self, folder: Path, values: Sequence[Tensor] | None = None) -> None:
        """Write the adapters in peft's format, or the whole model in transformers'.

        Args:
            folder: to write.
            values: of :meth:`parameters`, in that order; None takes those they have.
        """
        trained = self._trained()
        values = [value.detach() for _, value in trained] if values is None else values
        state = {name: value for (name, _), value in zip(trained, values, strict=True)}
        if self.whole:
            self.model.config.use_cache = True
            buffers = {name for name, _ in self.model.named_buffers()}
            state |= {name: it for name, it in self.model.state_dict().items() if name in buffers}
            self.model.save_pretrained(str(folder), state_dict=state)
            return
        self.peft.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._merged or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def _directly(function: Callable[[], Tensor]) -> Tensor:
    return function()


class _Merged:
    """The forward pass of one LoRA layer, its adapter merged into a copy of the weight."""

    def __init__(self, layer: Any) -> None:
        self.base = layer.get_base_layer()
        self.a = layer.lora_A["default"].weight
        self.b = layer.lora_B["default"].weight
        self.scale = float(layer.scaling["default"])
        self.weight = torch.empty_like(self.base.weight)

    def refresh(self) -> None:
        with torch.no_grad():
            weight = self.base.weight
            torch.addmm(
                weight, self.b.to(weight.dtype), self.a.to(weight.dtype), alpha=self.scale, out=self.weight
            )

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return merged_linear(x, self.weight, self.base.bias, self.a, self.b, self.scale)


def _merge_linears(model: Any) -> Iterator[_Merged]:
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is nn.Linear:
            merged = _Merged(module)
            module.forward = merged
            yield merged


def _can_pack(config: Any) -> bool:
    """True when the model's attention is plain causal attention, and its head a plain product."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    return config.model_type in _PACKABLE and kinds == {"full_attention"} and not sliding


def _use_packed_attention(model: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
    model.set_attn_implementation(_ATTENTION)


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    *,
    scaling: float,
    pack_prefix: int,
    pack_lengths: tuple[int, ...],
    **ignored: Any,
) -> tuple[Tensor, None]:
    out = packed_attention(q, k, v, pack_prefix, pack_lengths, scaling)
    return out.transpose(1, 2).contiguous(), None


def _use_fused_operations(model: nn.Module) -> None:
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_norm, module)
        elif name.endswith("MLP") and hasattr(module, "gate_proj") and type(module.act_fn).__name__ in _SILU:
            module.forward = partial(_mlp, module)


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    result: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return result
