"""One forward pass of a transformers model over the slab: prompts one by one, decoding together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agentkd.engine.kv import Prefix, Slab
from agentkd.errors import ConfigError

__all__ = ["Decoder", "cpu_dtype", "prepare_model"]

_ATTENTION = "agentkd"
_CPU_INFO = Path("/proc/cpuinfo")
_PREFILL_CHUNK = 1024
"""Prompt tokens in one pass; bounds the memory of a long prompt's mask."""


def prepare_model(model: Any) -> None:
    """Switch a model to the attention below, where it uses torch's own.

    Raises:
        ConfigError: its layers keep other state than keys and values.
    """
    kinds = set(getattr(_text_config(model), "layer_types", None) or ["full_attention"])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            f"The embedded engine does not support layers of type {', '.join(sorted(unknown))}.",
            "Serve this model with vLLM and use its endpoint.",
        )
    model.eval()
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        model.config._attn_implementation = _ATTENTION


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token a row by plain products: three times as fast as torch's on CPUs.

    The query heads that share a key head are treated as its queries, so keys are not repeated.
    """
    rows, heads, length, size = query.shape
    plain = all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
    if length > 1 or attention_mask is None or not plain or query.device.type != "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    kv_heads = key.shape[1]
    grouped = query.view(rows, kv_heads, heads // kv_heads, size) * (scaling or size**-0.5)
    scores = torch.matmul(grouped, key.transpose(2, 3)) + attention_mask
    weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights, value).view(rows, 1, heads, -1), None


class Decoder:
    """A model with its slab; used by one thread.

    Args:
        model: a causal language model after :func:`prepare_model`; may be shared.
        rows: sequences decoded together.
    """

    def __init__(self, model: Any, rows: int) -> None:
        config = _text_config(model)
        self.model, self.rows = model, rows
        self.device, self.dtype = model.device, model.dtype
        self.window: int | None = getattr(config, "sliding_window", None)
        self.kinds = sorted(set(getattr(config, "layer_types", None) or []))
        self.slab = Slab(config.num_hidden_layers, rows)
        names = inspect.signature(model.forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in names else "cache"
        self._n_layers = config.num_hidden_layers

    def reset(self) -> None:
        """Forget all rows and free their memory."""
        self.slab = Slab(self._n_layers, self.rows)

    def prefill(self, row: int, ids: Sequence[int], known: Prefix | None, known_length: int) -> torch.Tensor:
        """Compute a prompt into a row.

        Args:
            row: where.
            ids: the whole prompt.
            known: a sequence that begins like it.
            known_length: so many tokens of it are taken from ``known``; less than ``len(ids)``.

        Returns:
            Logits [1, vocabulary] after the last token.
        """
        if known is not None and known_length:
            self.slab.load(row, known, known_length)
        logits = None
        for start in range(known_length, len(ids), _PREFILL_CHUNK):
            end = min(len(ids), start + _PREFILL_CHUNK)
            self.slab.prefill(row, start, end)
            positions = torch.arange(start, end, device=self.device)[None]
            logits = self._forward(torch.tensor([ids[start:end]], device=self.device), positions, end)
        assert logits is not None
        return logits

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Feed one token to each of the first rows.

        Args:
            tokens: the last token of each row.
            lengths: how many tokens precede it.

        Returns:
            Logits [rows, vocabulary].
        """
        positions = torch.tensor(lengths, device=self.device)
        self.slab.decode(positions, max(lengths) + 1)
        fed = torch.tensor(tokens, device=self.device)[:, None]
        return self._forward(fed, positions[:, None], self.slab.capacity)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._masks(positions, length),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self.slab.cache},
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _masks(self, positions: torch.Tensor, length: int) -> Any:
        """Additive masks [rows, 1, new tokens, length]; the index of a key is its position."""
        keys = torch.arange(length, device=self.device)
        query = positions[:, None, :, None]
        full = keys <= query
        near = full & (keys > query - self.window) if self.window else full
        if len(self.kinds) > 1:  # models that tell layers apart take a mask for each kind
            return {"full_attention": self._additive(full), "sliding_attention": self._additive(near)}
        return self._additive(full if self.kinds == ["full_attention"] else near)

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)


@functools.cache
def cpu_dtype() -> torch.dtype:
    """bf16 where the processor multiplies in it, else fp32.

    Judged by what the processor says it can, not by a clock: two engines on one machine must agree, whatever
    runs beside them, or they would sample other tokens from the same seed.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return torch.float32
    able = _CPU_INFO.is_file() and "avx512_bf16" in _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    return torch.bfloat16 if able else torch.float32
