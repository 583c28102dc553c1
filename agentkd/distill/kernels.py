"""The few operations that make training on a CPU quick, each with its own backward.

All of them compute what the plain operations compute (tests compare them); they read and write
memory fewer times, and keep less of it for the backward pass.

- :func:`merged_linear`: LoRA with the adapter merged into the weight once a step: one large
  matrix product forward and one backward, instead of three and six.
- :func:`packed_attention`: causal attention of examples that stand behind one another in one
  row of tokens, without padding and without computing their shared prefix twice.
- :func:`target_loss`: cross-entropy in blocks of rows; the logits of a large vocabulary are
  never there all at once.
- :func:`rms_norm`, :func:`swiglu`: with frozen weights.

The first derivative only. Shapes: T tokens, H query heads, G key-value heads, D per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["merged_linear", "packed_attention", "rms_norm", "swiglu", "target_loss"]

QUERY_BLOCK = 128
"""Rows of the attention matrix computed at once: keys behind the block are skipped."""
LOSS_BLOCK = 128
"""Rows of logits computed at once."""


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.scale = scale
        return functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad_rows = grad.reshape(-1, grad.shape[-1])
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        grad_x = (grad_rows @ merged).view_as(x) if ctx.needs_input_grad[0] else None
        grad_a = ((grad_rows @ b_low).t() @ rows).to(a.dtype) * ctx.scale
        grad_b = (grad_rows.t() @ functional.linear(rows, a_low)).to(b.dtype) * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None


def merged_linear(
    x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """``linear(x, weight + scale * b @ a, bias)`` with gradients for ``x``, ``a`` and ``b``.

    Args:
        x: (..., in).
        merged: the merged weight, (out, in); gets no gradient.
        bias: (out) or None; gets no gradient.
        a, b: the adapter, (r, in) and (out, r).
        scale: factor of the adapter.
    """
    result: Tensor = _MergedLinear.apply(x, merged, bias, a, b, scale)
    return result


class _CausalAttention(torch.autograd.Function):
    """One example: q (G, H/G, T, D), k and v (G, T, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        groups, share, tokens, size = q.shape
        q = q * scale
        out = torch.empty_like(q)
        saved = []
        keys = k.transpose(1, 2)
        future = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu_(
            1
        )
        for begin in range(0, tokens, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, tokens)
            width = end - begin
            scores = q[:, :, begin:end].reshape(groups, share * width, size) @ keys[:, :, :end]
            scores = scores.view(groups, share, width, end)
            scores[..., begin:] += future[:width, :width]
            weights = torch.softmax(scores, -1).view(groups, share * width, end)
            saved.append(weights)
            out[:, :, begin:end] = (weights @ v[:, :end]).view(groups, share, width, size)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        groups, share, tokens, size = q.shape
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        grad_v = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        values = v.transpose(1, 2)
        inner = (grad * out).sum(-1, keepdim=True)
        for block, begin in enumerate(range(0, tokens, QUERY_BLOCK)):
            end = min(begin + QUERY_BLOCK, tokens)
            weights = saved[block]
            grad_out = grad[:, :, begin:end].reshape(groups, -1, size)
            grad_v[:, :end] += weights.transpose(1, 2) @ grad_out
            scores = grad_out @ values[:, :, :end]
            scores.sub_(inner[:, :, begin:end].reshape(groups, -1, 1)).mul_(weights)
            grad_q[:, :, begin:end] = (scores @ k[:, :end]).view(groups, share, end - begin, size)
            grad_k[:, :end] += scores.transpose(1, 2) @ q[:, :, begin:end].reshape(groups, -1, size)
        return grad_q * ctx.scale, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, lengths: Sequence[int], scale: float
) -> Tensor:
    """Causal attention within each example of a pack.

    Args:
        q: (1, H, T, D).
        k, v: (1, G, T, D), H a multiple of G.
        prefix: tokens at the begin that belong to every example.
        lengths: tokens of each example behind the prefix; ``T = prefix + sum(lengths)``.
        scale: factor of the scores.

    Returns:
        (1, H, T, D).
    """
    parts = []
    begin = prefix
    for number, length in enumerate(lengths):
        end = begin + length
        # The prefix's own rows are the same for every example: the first one keeps them.
        one_q, one_k, one_v = (_example(x[0], prefix, begin, end) for x in (q, k, v))
        out = _one(one_q, one_k, one_v, scale)
        parts.append(out if number == 0 else out[:, prefix:])
        begin = end
    return torch.cat(parts, dim=1).unsqueeze(0)


def _example(x: Tensor, prefix: int, begin: int, end: int) -> Tensor:
    if begin == prefix:
        return x[:, :end]
    return torch.cat((x[:, :prefix], x[:, begin:end]), dim=1) if prefix else x[:, begin:end]


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.device.type != "cpu":
        out = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0]
    if torch.is_autocast_enabled("cpu"):  # the backward pass runs without it, and needs one dtype
        low = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return _one(q.to(low), k.to(low), v.to(low), scale)
    heads, tokens, size = q.shape
    groups = k.shape[0]
    grouped = q.reshape(groups, heads // groups, tokens, size)
    result: Tensor = _CausalAttention.apply(grouped, k, v, scale)
    return result.reshape(heads, tokens, size)


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden)
        tiny = torch.finfo(torch.float32).tiny
        for begin in range(0, len(targets), LOSS_BLOCK):
            rows = slice(begin, begin + LOSS_BLOCK)
            chances = torch.softmax(functional.linear(hidden[rows], weight), -1, dtype=torch.float32)
            where = targets[rows, None]
            chance = chances.gather(1, where)
            losses[rows] = -chance.clamp_min(tiny).log().squeeze(1)
            chances.scatter_(1, where, chance - 1)
            grads[rows] = chances.to(hidden.dtype) @ weight
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return grads * grad[:, None].to(grads.dtype), None, None


def target_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (nats) of each row.

    Args:
        hidden: (rows, width), the last hidden states at the places that predict a target.
        weight: (vocabulary, width), frozen.
        targets: (rows), token ids.

    Returns:
        (rows), float32.
    """
    result: Tensor = _TargetLoss.apply(hidden, weight, targets)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        scaled = (grad * weight).float()
        mean = (scaled * normed).mean(-1, keepdim=True)
        return scaled.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation over the last axis; ``weight`` is frozen."""
    result: Tensor = _RmsNorm.apply(x, weight, eps)
    return result


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, functional.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    result: Tensor = _SwiGlu.apply(gate, up)
    return result
