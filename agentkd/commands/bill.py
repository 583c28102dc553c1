"""What a run has cost, as the commands say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentkd.spend import Spent

__all__ = ["bill_figures", "bill_lines"]


def bill_figures(spent: Spent, unpriced: Sequence[str], faults: Mapping[str, int]) -> dict[str, Any]:
    """For ``--json``; the cost is None where a model has no price."""
    return {
        "calls": spent.calls,
        "usage": spent.usage.model_dump(),
        "model_seconds": round(spent.seconds, 1),
        "cost": None if unpriced else round(spent.cost, 6),
        "faults": dict(faults),
    }


def bill_lines(spent: Spent, unpriced: Sequence[str], faults: Mapping[str, int], where: str) -> Iterator[str]:
    """For people.

    Args:
        spent: by all starts of a run.
        unpriced: models without a price.
        faults: failed calls, by what they were.
        where: the files that have them.
    """
    usage, failed = spent.usage, sum(faults.values())
    money = f"{spent.seconds:.0f} s of {', '.join(unpriced)}" if unpriced else f"${spent.cost:.4f}"
    yield (
        f"{spent.calls} calls, {usage.input_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.output_tokens} sampled, {money}"
    )
    if usage.uncounted_calls:
        yield f"{usage.uncounted_calls} calls came without token counts."
    if failed:
        kinds = ", ".join(f"{count} x {what}" for what, count in faults.items())
        yield f"{failed} faults of endpoints ({kinds}), see {where}"
