"""Outcomes as they come out of a sandbox, where anything may have been written."""

from __future__ import annotations

from typing import Any

from agentkd.sandbox import Outcome
from agentkd.sandbox.inside.wire import OUTPUT_LIMIT
from agentkd.sandbox.toolhost import Caller, valid_value
from agentkd.trajectory import valid_text

__all__ = ["KEPT", "LOST", "checked"]

MARK = 1000
"""Characters beyond the limit of outputs, for the mark that says so."""
LOST = "All variables are lost."
KEPT = "Variables are as they were before it."


def checked(message: dict[str, Any], caller: Caller, seconds: float) -> Outcome:
    """An outcome from a message of the sandbox.

    Raises:
        ValueError: it is none.
    """
    error, printed, final = message.get("error"), message.get("printed", ""), message.get("final", False)
    well = (error is None or isinstance(error, str)) and isinstance(printed, str) and isinstance(final, bool)
    if not well or "broken" in message:
        raise ValueError(str(message.get("broken", "malformed outcome"))[:300])
    return Outcome(
        printed=valid_text(printed[: OUTPUT_LIMIT + MARK]),
        value=valid_value(message.get("value")),
        is_final=final,
        error=None if error is None else valid_text(error[: OUTPUT_LIMIT + MARK]),
        tool_uses=tuple(caller.uses),
        seconds=seconds,
    )
