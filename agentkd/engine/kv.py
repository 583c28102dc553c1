"""Keys and values of attention: a slab for the sequences being decoded, and a cache of past ones.

In the slab each sequence has a row, and the index along a row is the token's position. So rows of
different length need no padding, a new sequence joins by writing into a free row, and one that is
done leaves by having the last row moved into its place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["Prefix", "PrefixCache", "Slab"]

_STEP = 64
"""The capacity of a slab is a multiple of so many positions."""
_SLACK = 256
"""A slab shrinks when so many positions are not needed any more."""


class Prefix(NamedTuple):
    """Keys and values of one token sequence: per layer two tensors [kv heads, tokens, head size]."""

    ids: np.ndarray[Any, Any]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(key.nbytes + value.nbytes for key, value in self.layers)


@dataclass
class _Prefill:
    row: int
    start: int


@dataclass
class _Decode:
    positions: torch.Tensor
    """[rows]: where each row's new token goes."""
    length: int
    """Tokens of the longest row, the new one included."""


class _SlabLayer(DynamicLayer):
    """One layer of the slab, as transformers expects a layer of a cache."""

    def __init__(self, slab: Slab) -> None:
        super().__init__()
        self.slab = slab

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        assert value_states is not None
        rows, capacity = self.slab.rows, self.slab.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(rows, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.slab.plan
        if isinstance(plan, _Prefill):
            end = plan.start + key_states.shape[2]
            self.keys[plan.row, :, plan.start : end] = key_states[0]
            self.values[plan.row, :, plan.start : end] = value_states[0]
            return self.keys[plan.row, None, :, :end], self.values[plan.row, None, :, :end]
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            index = self.slab.flat_index(store.shape[1], plan.positions)
            store.view(-1, store.shape[3]).index_copy_(0, index, new.reshape(-1, store.shape[3]))
        # All positions, because a product of a part of them would first copy it.
        rows = len(plan.positions)
        return self.keys[:rows], self.values[:rows]

    def get_seq_length(self, *args: Any) -> int:
        plan = self.slab.plan
        return plan.start if isinstance(plan, _Prefill) else plan.length - 1

    def resize(self, capacity: int) -> None:
        """Make room for exactly ``capacity`` positions, keeping what fits."""
        for name in ("keys", "values") if self.is_initialized else ():
            old = getattr(self, name)
            kept = min(capacity, old.shape[2])
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)


class Slab:
    """Keys and values of up to ``rows`` sequences.

    Attributes:
        cache: what the model is given as its cache.
        plan: where the next forward pass writes; set by :meth:`prefill` and :meth:`decode`.
    """

    def __init__(self, n_layers: int, rows: int) -> None:
        self.rows, self.capacity = rows, _STEP
        self.plan: _Prefill | _Decode = _Prefill(0, 0)
        self.layers = [_SlabLayer(self) for _ in range(n_layers)]
        self.cache = Cache(layers=self.layers)
        self._index: dict[int, torch.Tensor] = {}

    def prefill(self, row: int, start: int, end: int) -> None:
        """The next pass writes positions ``start`` to ``end`` of one row."""
        self._reserve(end)
        self.plan = _Prefill(row, start)

    def decode(self, positions: torch.Tensor, length: int) -> None:
        """The next pass writes one token into each of the first ``len(positions)`` rows."""
        self._reserve(length, shrink=True)
        self.plan = _Decode(positions, length)
        self._index = {}

    def _reserve(self, length: int, shrink: bool = False) -> None:
        wanted = -(-length // _STEP) * _STEP
        if wanted > self.capacity or (shrink and wanted + _SLACK <= self.capacity):
            self.capacity = wanted
            for layer in self.layers:
                layer.resize(wanted)

    def flat_index(self, heads: int, positions: torch.Tensor) -> torch.Tensor:
        """Index of (row, head, position) in a store seen as [rows * heads * capacity]."""
        if heads not in self._index:
            lines = torch.arange(len(positions) * heads, device=positions.device).view(-1, heads)
            self._index[heads] = (lines * self.capacity + positions[:, None]).view(-1)
        return self._index[heads]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a row into another row."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def save(self, row: int, ids: Sequence[int]) -> Prefix:
        """A copy of the positions of ``ids`` in a row."""
        length = len(ids)
        pairs = [(it.keys[row, :, :length].clone(), it.values[row, :, :length].clone()) for it in self.layers]
        return Prefix(np.asarray(ids), pairs)

    def load(self, row: int, prefix: Prefix, length: int) -> None:
        """Write the first ``length`` positions of a saved sequence into a row."""
        self._reserve(length)
        for layer, (key, value) in zip(self.layers, prefix.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(key[None], value[None])
            layer.keys[row, :, :length] = key[:, :length]
            layer.values[row, :, :length] = value[:, :length]


class PrefixCache:
    """The most recent sequences, so that a prompt which continues one of them is not computed again.

    Thread-safe. An entry that a new one extends is replaced by it.

    Args:
        max_bytes: memory for keys and values; 0 keeps nothing.
        max_entries: sequences.

    Attributes:
        queried_tokens: of all that was looked up so far.
        hit_tokens: those of them that were found.
    """

    def __init__(self, max_bytes: int, max_entries: int = 64) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._entries: OrderedDict[int, Prefix] = OrderedDict()
        self._bytes = 0
        self._next = 0
        self._lock = threading.Lock()
        self.queried_tokens = self.hit_tokens = 0

    def find(self, ids: Sequence[int]) -> tuple[Prefix | None, int]:
        """The entry that shares the longest beginning with ``ids``, and how many tokens that is."""
        wanted = np.asarray(ids)
        best, best_key, best_length = None, -1, 0
        with self._lock:
            for key, entry in self._entries.items():
                length = _common(entry.ids, wanted)
                if length > best_length:
                    best, best_key, best_length = entry, key, length
            if best is not None:
                self._entries.move_to_end(best_key)
            self.queried_tokens += len(wanted)
            self.hit_tokens += best_length
        return best, best_length

    def add(self, prefix: Prefix) -> None:
        """Keep a sequence, dropping what it makes superfluous and the least recently used."""
        if prefix.nbytes > self.max_bytes:
            return
        with self._lock:
            covered = [key for key, it in self._entries.items() if _common(it.ids, prefix.ids) == len(it.ids)]
            for key in covered:
                self._drop(key)
            self._entries[self._next] = prefix
            self._next += 1
            self._bytes += prefix.nbytes
            while self._bytes > self.max_bytes or len(self._entries) > self.max_entries:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _drop(self, key: int) -> None:
        self._bytes -= self._entries.pop(key).nbytes

    def __len__(self) -> int:
        return len(self._entries)


def _common(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> int:
    shorter = min(len(left), len(right))
    differs = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differs[0]) if len(differs) else shorter
