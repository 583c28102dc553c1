"""Choosing the next token of every row of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from agentkd.engine import GREEDY_BELOW

__all__ = ["Choice", "choose"]

_SIZES = (64, 1024)
"""So many of the likeliest tokens are sorted for top-p before the whole vocabulary is."""

_BLOCK = 256


class Choice(NamedTuple):
    """The tokens chosen, one a row."""

    ids: list[int]
    logprobs: list[float]
    """Nats, under the model at temperature 1 over the whole vocabulary."""


def choose(
    logits: torch.Tensor,
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    draws: Sequence[float],
) -> Choice:
    """Pick a token for each row.

    Each row uses its own number in [0, 1), so a row's sample depends on nothing but its logits
    and its own random stream.

    Args:
        logits: [rows, vocabulary], any float type.
        temperatures: below :data:`agentkd.engine.GREEDY_BELOW`, greedy.
        top_ps: 1 samples from everything.
        draws: one uniform number for each row; unused where greedy.
    """
    scores = logits.float()
    chosen = scores.argmax(dim=-1)
    sampled = [row for row, temperature in enumerate(temperatures) if temperature >= GREEDY_BELOW]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        heat = torch.tensor([temperatures[row] for row in sampled], device=logits.device)
        mass = torch.tensor([top_ps[row] for row in sampled], device=logits.device)
        draw = torch.tensor([draws[row] for row in sampled], device=logits.device, dtype=torch.float64)
        own = scores if len(sampled) == len(scores) else scores[rows]
        probabilities = torch.softmax(own / heat[:, None], dim=-1)
        if any(top_ps[row] < 1 for row in sampled):
            probabilities = _nucleus(probabilities, mass)
        chosen[rows] = _invert(probabilities, draw)
    logprobs = torch.log_softmax(scores, dim=-1).gather(1, chosen[:, None])[:, 0]
    return Choice(chosen.tolist(), logprobs.tolist())


def _invert(probabilities: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """The token in whose share of the cumulated distribution the draw falls.

    First the block of tokens, then the token in it: a sum over blocks is ten times as fast as
    cumulating the whole vocabulary.
    """
    short = -probabilities.shape[1] % _BLOCK
    blocks = torch.nn.functional.pad(probabilities, (0, short)).view(len(draw), -1, _BLOCK)
    edges = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = (draw * edges[:, -1])[:, None]
    block = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    before = torch.where(block > 0, edges.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    # Rounding may put the target behind the block's end; the last possible token is meant then.
    shares = inside.double().cumsum(dim=-1)
    target = torch.minimum(target - before, shares[:, -1:] * (1 - 1e-12))
    place = torch.searchsorted(shares, target, right=True)
    return (block * _BLOCK + place)[:, 0]


def _nucleus(probabilities: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Zero every token outside the smallest set that holds ``mass``, row by row."""
    mass = mass.clamp(min=1e-9)  # the likeliest token always stays
    whole = probabilities.shape[1]
    for size in (*(size for size in _SIZES if size < whole), whole):
        values, indices = probabilities.topk(size, dim=-1)
        before = values.cumsum(dim=-1) - values
        enough = (before[:, -1] >= mass) | (mass >= 1)
        if bool(enough.all()):
            break
    kept = torch.zeros_like(probabilities).scatter_(1, indices, values * (before < mass[:, None]))
    return torch.where((mass >= 1)[:, None], probabilities, kept)
