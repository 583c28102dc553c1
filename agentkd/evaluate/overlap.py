"""Contamination: test questions that stand, word for word or nearly, among the training questions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from agentkd.task import Task

__all__ = ["Overlap", "overlaps"]

NGRAM = 5
"""Words of an n-gram."""
NEAR = 0.5
"""Share of the n-grams of the shorter question that must be shared."""
COMMON = 50
"""An n-gram that stands in more training questions than this is a template and says nothing."""


class Overlap(NamedTuple):
    """One test question and what it shares with a training question."""

    test: str
    """Task id."""
    train: str
    """Task id."""
    kind: str
    """"exact": the same text; "numbers": the same but for its numbers; "near": shared n-grams."""
    share: float
    """Of the n-grams of the shorter question that are shared, 0 to 1."""


def overlaps(train: Iterable[Task], test: Iterable[Task]) -> list[Overlap]:
    """For each test question the training question most like it, where that is too much like it.

    Texts are compared after Unicode normalisation (NFKC), case folding and the collapsing of white
    space. Word n-grams, as in the contamination checks of GPT-3 (arXiv 2005.14165, appendix C), find
    what was reworded; questions shorter than an n-gram are only compared as a whole.
    """
    whole: dict[str, str] = {}
    masked: dict[str, str] = {}
    grams: dict[tuple[str, ...], list[str]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for task in train:
        text = _normalised(task.question)
        whole.setdefault(text, task.id)
        masked.setdefault(_masked(text), task.id)
        found = _grams(text)
        sizes[task.id] = len(found)
        for gram in found:
            grams[gram].append(task.id)
    result = []
    for task in test:
        text = _normalised(task.question)
        if text in whole:
            result.append(Overlap(task.id, whole[text], "exact", 1.0))
        elif _masked(text) in masked:
            result.append(Overlap(task.id, masked[_masked(text)], "numbers", 1.0))
        else:
            mine = _grams(text)
            shared = Counter(
                name for gram in mine if len(grams.get(gram, ())) <= COMMON for name in grams.get(gram, ())
            )
            best = max(
                shared, key=lambda name: (shared[name] / min(len(mine), sizes[name]), name), default=None
            )
            if best is not None and (share := shared[best] / min(len(mine), sizes[best])) >= NEAR:
                result.append(Overlap(task.id, best, "near", share))
    return result


def _normalised(question: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split())


def _masked(text: str) -> str:
    """Without its numbers; a question that is little else ("3 + 4") stays what it is."""
    bare = re.sub(r"\d+(?:[.,]\d+)*", "0", text)
    return bare if len(re.findall(r"[^\W\d_]{2,}", bare)) >= 2 * NGRAM else text


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return set(zip(*(words[place:] for place in range(NGRAM)), strict=False))
