"""Studies of a student and its trajectories, beyond accuracy.

:mod:`.faithfulness`: does the model act on its thoughts? :mod:`.memorisation`: how much of its training
trajectories can be got out of it? :mod:`.mismatch`: does the answer follow from what was thought and seen?
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from agentkd.evaluate.figures import wilson

__all__ = ["Share"]


class Share(BaseModel):
    """A proportion with its 95% Wilson interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    n: int
    share: float | None
    """None when ``n`` is 0."""
    low: float
    high: float

    @classmethod
    def of(cls, count: int, n: int) -> Share:
        """``count`` of ``n``."""
        low, high = wilson(count, n)
        return cls(count=count, n=n, share=count / n if n else None, low=low, high=high)

    def __str__(self) -> str:
        if self.share is None:
            return "-"
        return f"{100 * self.share:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}] n = {self.n}"
