"""What the paper published, for a report on its own recipe: means of its eight test sets.

From "Distilling LLM Agent into Small Models with Retrieval and Code Tools" (arXiv 2505.17612): students are
Qwen2.5-Instruct models, facts are graded there by a model and mathematics by an equivalence grader.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from agentkd.errors import ConfigError

__all__ = ["PAPER_SETS", "SIZES", "Published", "beside_published", "size_of"]

PAPER_SETS = ("hotpotqa", "musique", "2wiki", "bamboogle", "math_500", "gsm_hard", "aime", "olymmath")
"""Families of the eight sets."""

_METHODS = (
    "CoT prompt",
    "CoT distilled",
    "CoT distilled, retrieval",
    "agent prompt",
    "agent distilled",
    "agent distilled, first thought",
    "agent distilled, action sampling",
    "agent distilled, both",
)
_MEANS: dict[str, tuple[float | None, ...]] = {
    "32B": (39.54, None, None, 46.00, None, None, None, None),
    "7B": (33.19, 33.54, 32.16, 36.54, 39.85, 42.26, 41.86, 42.68),
    "3B": (29.27, 27.72, 28.53, 21.20, 33.60, 34.49, 33.50, 36.60),
    "1.5B": (20.33, 21.28, 24.64, 7.94, 28.06, 29.11, 30.29, 30.55),
    "0.5B": (11.06, 13.64, 15.90, 1.80, 19.24, 19.99, 20.01, 21.90),
}
SIZES = tuple(_MEANS)
"""Of the models in the paper's table; 32B is the teacher."""


class Published(NamedTuple):
    """One method of the paper's table, and what was measured here."""

    method: str
    published: float
    """Mean accuracy over the eight sets, percent."""
    label: str | None
    """The system here that is this method; None where none is."""
    measured: float | None
    """The same mean of that system; None unless it ran all eight sets."""


def size_of(base: str) -> str | None:
    """The row of the table that a base model is, as in "Qwen/Qwen2.5-0.5B-Instruct"."""
    found = re.search(r"Qwen2\.5-([\d.]+B)-Instruct\b", base)
    return found[1] if found and found[1] in _MEANS else None


def beside_published(results: Sequence[Any], size: str) -> list[Published]:
    """The published means of a size, each beside the system whose label names the method.

    Args:
        results: see :class:`agentkd.report.ResultLike`.
        size: one of :data:`SIZES`.

    Raises:
        ConfigError: the paper has no such size.
    """
    if size not in _MEANS:
        raise ConfigError(f"The paper has no students of size {size!r}.", f"It has: {', '.join(SIZES)}.")
    ours = {method: result for result in results if (method := _method(result.label)) is not None}
    rows = []
    for method, mean in zip(_METHODS, _MEANS[size], strict=True):
        result = ours.get(method)
        if mean is not None:
            rows.append(
                Published(method, mean, result.label if result else None, _mean(result) if result else None)
            )
    return rows


def _method(label: str) -> str | None:
    """What a label says of its method: "agent-distilled", "CoT-distilled+retrieval", "base"."""
    words = label.casefold()
    if "agent" not in words:
        if "distil" in words:
            return _METHODS[2 if re.search(r"rag|retriev|search", words) else 1]
        return _METHODS[0] if words == "base" or "cot" in words else None
    if "distil" not in words:
        return _METHODS[3]
    thought, sampling = re.search(r"ftp|thought", words), re.search(r"sag|sampl|consist", words)
    return _METHODS[4 + bool(thought) + 2 * bool(sampling)]


def _mean(result: Any) -> float | None:
    shares = [result.families[name].accuracy for name in PAPER_SETS if name in result.families]
    known = [share for share in shares if share is not None]
    return 100 * sum(known) / len(known) if len(known) == len(PAPER_SETS) else None
