"""How passages are shown to a model or a person: one titled line each, within a token budget."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from agentkd.retrieval import Hit

__all__ = ["estimate_tokens", "passage_lines", "visible"]

_PIECE = re.compile(r"[^\W\d_]+|\d|\S", re.UNICODE)
_CUT = " [...]"


def passage_lines(
    hits: Sequence[Hit], max_tokens: int | None = None, count: Callable[[str], int] | None = None
) -> str:
    """``[Title] text`` lines, best first, of at most ``max_tokens`` tokens together.

    The passage that passes the budget is cut at a word and marked ``[...]``; those behind it are
    left out. Control characters of a title or text are shown as escapes, so that a passage can
    neither begin a line of its own nor steer a terminal; whatever else it says is shown as it is.

    Args:
        hits: what was found.
        max_tokens: budget; None for all.
        count: tokens of a text; :func:`estimate_tokens` where none is given.
    """
    count = count or estimate_tokens
    lines: list[str] = []
    left = max_tokens
    for hit in hits:
        line = f"[{visible(hit.passage.title)}] {visible(' '.join(hit.passage.text.split()))}"
        if left is not None:
            needed = count(line) + 1
            if needed > left:
                if shortened := _shorten(line, left - 1, count):
                    lines.append(shortened)
                break
            left -= needed
        lines.append(line)
    return "\n".join(lines)


def _shorten(line: str, budget: int, count: Callable[[str], int]) -> str:
    """The longest beginning, in whole words, that fits with its mark; empty if not one word of text does."""
    words = line.split(" ")
    title = line[: line.index("] ") + 1].count(" ") + 1
    low, high = title, len(words) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if count(" ".join(words[:middle]) + _CUT) <= budget:
            low = middle
        else:
            high = middle - 1
    if low <= title and count(" ".join(words[: title + 1]) + _CUT) > budget:
        return ""
    return " ".join(words[:low]) + _CUT


def visible(text: str) -> str:
    """Text with control characters, line ends and direction marks written as escapes.

    The zero-width joiners that some scripts are written with stay.
    """
    if text.isprintable():
        return text
    return "".join(char if _plain(char) else ascii(char)[1:-1] for char in text)


def _plain(char: str) -> bool:
    return char.isprintable() or char in "\u200c\u200d" or unicodedata.category(char) == "Zs"


def estimate_tokens(text: str) -> int:
    """Tokens of a text, rather too many than too few, for when the model's tokenizer is not at hand.

    A word counts one token per four letters, begun ones too; digits and marks count one each, and a
    character outside ASCII one less than its bytes in UTF-8.
    """
    total = 0
    for piece in _PIECE.findall(text):
        plain = sum(char.isascii() for char in piece)
        total += -(-plain // 4) + len(piece.encode("utf-8", "replace")) - plain - (len(piece) - plain)
    return total
