"""An encoder without a model: each word is a direction, so texts with common words are near."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np


class HashEncoder:
    """Deterministic, and as quick as a test wants. ``seed`` makes it another encoder."""

    max_tokens = None

    def __init__(self, dimension: int = 64, seed: int = 0, name: str = "hash") -> None:
        self.name, self.dimension, self.seed = name, dimension, seed
        self.texts = 0

    def encode(self, texts: Sequence[str], role: str) -> Any:
        self.texts += len(texts)
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word in text.casefold().split():
                rng = np.random.default_rng([self.seed, zlib.crc32(word.strip("?.,").encode())])
                vectors[row] += rng.standard_normal(self.dimension, dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
