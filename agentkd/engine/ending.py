"""When a sample is over, and the text that it then has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agentkd.engine import Completion
from agentkd.engine.request import Row

__all__ = ["Ending", "end_tokens"]


class Ending:
    """Recognises end tokens, stop strings and limits. Shared by all lanes.

    Args:
        tokenizer: decodes.
        end_tokens: ids that end a turn.
    """

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int]) -> None:
        self.tokenizer, self.end_tokens = tokenizer, end_tokens
        self._pieces: dict[int, str] = {}

    def completion(self, row: Row) -> Completion | None:
        """What became of a row, if its last token ended it."""
        ended = row.ids[-1] in self.end_tokens
        cut = None if ended else self._stop_at(row)
        reason: Literal["stop", "length"] = "stop"
        if not ended and cut is None:
            if len(row.ids) < row.request.settings.limit:
                return None
            reason = "length"
        text = self._decode(row.ids[:-1] if ended else row.ids)
        return Completion(tuple(row.ids), text[:cut], tuple(row.logprobs), reason)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _stop_at(self, row: Row) -> int | None:
        """Where in the row's text a stop string begins that its last token completed."""
        stops = row.request.settings.stop
        if not stops:
            return None
        token = row.ids[-1]
        if token not in self._pieces:
            self._pieces[token] = self._decode([token])
        piece = self._pieces[token]
        # A stop string can only be complete now if the new token brought its last character.
        # (A piece that is half a character, or that a decoder strips, shows too little to tell.)
        if "\ufffd" not in piece and not any(it[-1] in piece or it[-1].isspace() for it in stops):
            return None
        text = self._decode(row.ids)
        return min((at for it in stops if (at := text.find(it)) >= 0), default=None)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn: the tokenizer's, and those of the model's generation settings."""
    named = getattr(model.generation_config, "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)
