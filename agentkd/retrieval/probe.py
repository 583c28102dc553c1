"""Telling encoders apart: an index keeps the vectors of a few texts, made by its own encoder.

A name does not tell: a hub model is updated, a folder is replaced, a prefix is changed. Vectors do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agentkd.errors import ConfigError, RetrievalError, boundary
from agentkd.retrieval.encoder import Encoder, check_vectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["check_probe", "write_probe"]

_PASSAGES = ("Silver Harbor\nSilver Harbor is a town on the northern coast, founded in 1802.", "Zinc melts.")
_QUERIES = ("Who was the mother of the founder of Silver Harbor?",)
_FILE = "probe.npy"
_LEAST_COSINE = 0.99
"""Half precision, or another machine, stays above; another model or prefix does not."""


def write_probe(folder: Path, encoder: Encoder) -> None:
    """Keep what the encoder makes of the probe texts."""
    import numpy as np

    with boundary(RetrievalError, f"writing {folder / _FILE}"):
        np.save(folder / _FILE, _vectors(encoder))


def check_probe(folder: Path, encoder: Encoder, name: str) -> None:
    """Refuse an encoder that is not the one that :func:`write_probe` saw.

    Args:
        folder: where the probe is kept.
        encoder: to be used now.
        name: what the index was built with, for the message.

    Raises:
        ConfigError: it makes other vectors.
    """
    import numpy as np

    with boundary(RetrievalError, f"reading {folder / _FILE}", "Build the index anew."):
        stored = np.load(folder / _FILE)
    hint = f"Use {name!r} as it was then, or build the index anew."
    if stored.shape[1] != encoder.dimension:
        raise ConfigError(
            f"The index was built with another encoder: {name!r} makes vectors of {stored.shape[1]} "
            f"numbers, {encoder.name!r} of {encoder.dimension}.",
            hint,
        )
    least = float((stored * _vectors(encoder)).sum(axis=1).min())
    if least < _LEAST_COSINE:
        raise ConfigError(
            f"The index was built with another encoder: {name!r} then and {encoder.name!r} now make "
            f"different vectors of the same text (cosine {least:.2f}).",
            hint,
        )


def _vectors(encoder: Encoder) -> NDArray[np.float32]:
    import numpy as np

    parts = [encoder.encode(_PASSAGES, "passage"), encoder.encode(_QUERIES, "query")]
    vectors = np.concatenate(parts)
    check_vectors(vectors, len(_PASSAGES) + len(_QUERIES), encoder.dimension, encoder.name)
    return vectors
