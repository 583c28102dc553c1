"""Which trajectories it was: what is no number names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentkd.distill.examples import Example
from agentkd.errors import TrainingError

__all__ = ["no_number"]

_SHOWN = 8


def no_number(what: str, examples: Sequence[Example], finite: Callable[[Example], bool]) -> TrainingError:
    """The error for something that was computed of several examples and is not a number.

    Each example is computed again by itself, which costs nothing as long as all is well.

    Args:
        what: as in "The gradient of step 3".
        examples: what it was computed of.
        finite: computes it of one of them; False where that is not a number, either.
    """
    bad = [it.id for it in examples if not finite(it)]
    names = list(dict.fromkeys(bad or [it.id for it in examples]))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    whose = "that of" if bad else "each by itself is one, together they are not:"
    return TrainingError(
        f"{what} is not a number: {whose} {', '.join(names[:_SHOWN])}{more}.",
        "Lower the learning rate, or leave these trajectories out.",
    )
