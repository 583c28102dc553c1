"""Which split a fact belongs to: a stable hash, the same for every seed and machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from agentkd.errors import ConfigError

__all__ = ["SPLITS", "all_in_split", "check_split", "split_of", "stable_hash"]

SPLITS = ("train", "test")


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the parts' texts that does not change between runs or machines."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def split_of(key: str, test_percent: int = 50) -> str:
    """The one split that may use ``key``, for ever and for every seed.

    Args:
        key: whatever gives an answer away (an operand pair, a date, a name).
        test_percent: share of all keys that belongs to "test".
    """
    return "test" if stable_hash("split", key) % 100 < test_percent else "train"


def all_in_split(keys: Iterable[str], split: str) -> bool:
    """True when ``split`` may use every one of the keys."""
    return all(split_of(key) == split for key in keys)


def check_split(split: str, allowed: tuple[str, ...] = SPLITS) -> None:
    """Raises ConfigError unless the split is one of ``allowed``."""
    if split not in allowed:
        raise ConfigError(f"There is no split {split!r} here.", f"Use one of: {', '.join(allowed)}.")
