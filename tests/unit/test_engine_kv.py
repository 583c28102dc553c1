"""The cache of past sequences: what it finds, replaces and forgets."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("transformers")

from agentkd.engine.kv import Prefix, PrefixCache  # noqa: E402


def sequence(*ids: int) -> Prefix:
    tensor = torch.zeros(1, len(ids), 2)  # 8 bytes a token, and as many for the values
    return Prefix(np.asarray(ids), [(tensor, tensor.clone())])


def test_it_finds_the_longest_common_beginning() -> None:
    cache = PrefixCache(1 << 20)
    long, other = sequence(1, 2, 3, 4, 5), sequence(1, 2, 9)
    cache.add(long)
    cache.add(other)
    assert cache.find([1, 2, 3, 7]) == (long, 3)
    assert cache.find([1, 2, 9, 9]) == (other, 3)
    assert cache.find([8]) == (None, 0)
    assert cache.find([]) == (None, 0)


def test_a_longer_sequence_replaces_its_beginning() -> None:
    cache = PrefixCache(1 << 20)
    cache.add(sequence(1, 2))
    cache.add(sequence(3))
    cache.add(sequence(1, 2, 3))
    cache.add(sequence(1, 2, 3))
    assert len(cache) == 2


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(max_bytes=16 * 6)
    cache.add(sequence(1, 1, 1))
    cache.add(sequence(2, 2, 2))
    cache.find([1])
    cache.add(sequence(3, 3, 3))
    assert [cache.find([token])[1] for token in (1, 2, 3)] == [1, 0, 1]
    cache.add(sequence(*range(10, 17)))
    assert len(cache) == 2, "what is larger than the whole cache is not kept"
    few = PrefixCache(1 << 20, max_entries=2)
    for token in range(5):
        few.add(sequence(token))
    assert [few.find([token])[1] for token in range(5)] == [0, 0, 0, 1, 1]
