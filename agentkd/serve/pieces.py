"""From tokens to pieces of text, as they come, at the same cost for each however long the answer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Pieces"]

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet)."""
_LONGEST = 64
"""Tokens that are decoded together at most: a character has four bytes, so more come from noise only."""


class Pieces:
    """The text of one answer, token by token.

    Only the last tokens are decoded: those since a place before which the text is settled, with some
    before them, because many decoders write a word otherwise where nothing stands before it. Text
    that may still change (half a character) or turn out to belong to a stop string is held back.

    Args:
        tokenizer: decodes.
        stops: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        """Those that are decoded together."""
        self._old = 0
        """How many of them belong to text that was taken already."""
        self._before = ""
        """The text of those."""
        self._held = ""
        """Settled text that may be the beginning of a stop string."""
        self._over = False

    def add(self, token: int) -> str:
        """Take a token; returns the text that is certain now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_UNFINISHED) and len(self._ids) < _LONGEST:
            return ""
        self._held += text[len(self._before) :]
        fresh = self._decode(self._ids[self._old :])
        if fresh or len(self._ids) >= _LONGEST:  # else nothing would stand before what comes
            self._ids, text = self._ids[self._old :], fresh
        self._old, self._before = len(self._ids), text
        return self._release()

    def _release(self) -> str:
        if self._over:
            return ""
        keep = 0
        for stop in self.stops:
            if (at := self._held.find(stop)) >= 0:
                keep, self._over = max(keep, len(self._held) - at), True
            else:
                begun = (size for size in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:size]))
                keep = max(keep, next(begun, 0))
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
