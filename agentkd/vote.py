"""Votes on outcomes: when two actions did the same, who leads, and when that is settled."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Hashable, Sequence
from typing import Any

from agentkd.sandbox import Outcome

__all__ = ["Tally", "lead_probability", "outcome_text", "same_outcome"]

TOLERANCE = 1e-6
"""Relative difference below which two numbers are one."""
PARSE_LIMIT = 10_000
"""Characters of printed text that are looked at as values rather than as words."""

_NUMBER = re.compile(r"([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


def outcome_text(outcome: Outcome) -> str:
    """An outcome in words: what it printed, its value, and whether that is the final answer."""
    parts = [outcome.printed.strip()] if outcome.printed.strip() and not outcome.is_final else []
    if outcome.value is not None or outcome.is_final:
        parts.append(f"{'final answer' if outcome.is_final else 'value'}: {_words(str(outcome.value))}")
    return "\n".join(parts)


def same_outcome(one: Outcome, other: Outcome) -> bool:
    """Whether two actions came to the same.

    Final answers are compared by their value alone: how it was reached and what was printed on
    the way does not matter. Other actions must print the same and have the same value. Numbers
    agree within :data:`TOLERANCE`, sets regardless of order, text regardless of white space.
    """
    if one.is_final != other.is_final:
        return False
    if not _same(_value(one.value), _value(other.value)):
        return False
    return one.is_final or _same(_value(one.printed), _value(other.printed))


def _value(value: Any) -> Any:
    """Text that spells a Python value is that value; other text its words."""
    if not isinstance(value, str):
        return value
    text = _words(value)
    if len(text) <= PARSE_LIMIT:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
        else:
            return _words(found) if isinstance(found, str) else found
    return text


def _words(text: str) -> str:
    return " ".join(text.split())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return _close(one, other)
    if isinstance(one, str) and isinstance(other, str):
        return _same_text(one, other)
    if isinstance(one, (set, frozenset)) and isinstance(other, (set, frozenset)):
        return len(one) == len(other) and _same(sorted(one, key=repr), sorted(other, key=repr))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def _close(one: int | float, other: int | float) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one == other  # exact, and beyond what a float can hold
    try:
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-12) or (one != one and other != other)
    except OverflowError:
        return False


def _same_text(one: str, other: str) -> bool:
    if one == other:
        return True
    mine, theirs = _NUMBER.split(one), _NUMBER.split(other)
    if len(mine) != len(theirs) or len(mine) > PARSE_LIMIT:
        return False
    for place, (left, right) in enumerate(zip(mine, theirs, strict=True)):
        if left != right and (place % 2 == 0 or not _same_number(left, right)):
            return False
    return True


def _same_number(one: str, other: str) -> bool:
    """Whether two spellings are one number; what is none (``1_``) or beyond a float is text."""
    try:
        return _close(int(one), int(other))
    except ValueError:
        pass
    try:
        first, second = float(one), float(other)
    except ValueError:
        return False
    return math.isfinite(first) and math.isfinite(second) and _close(first, second)


def lead_probability(first: int, second: int) -> float:
    """Probability that the leading outcome is the likelier one, given the votes of the first two.

    The Beta stopping criterion of adaptive consistency (Aggarwal et al. 2023, arXiv 2305.11860,
    section 3): P(p > 1/2) for p ~ Beta(first + 1, second + 1).
    """
    total = first + second + 1
    return float(sum(math.comb(total, wins) for wins in range(first + 1)) / 2**total)


class Tally:
    """The groups of candidates that came to the same.

    Args:
        log_probabilities: mean log-probability of each candidate, to break ties; None unknown.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[Outcome | Hashable, list[int]]] = []
        self._log_probabilities: dict[int, float | None] = {}

    def add(self, candidate: int, outcome: Outcome | Hashable, log_probability: float | None) -> None:
        """A candidate's vote: for what it came to, or, where nothing was run, for an equal key."""
        self._log_probabilities[candidate] = log_probability
        for known, members in self.groups:
            if (
                same_outcome(known, outcome)
                if isinstance(known, Outcome) and isinstance(outcome, Outcome)
                else known == outcome
            ):
                members.append(candidate)
                return
        self.groups.append((outcome, [candidate]))

    def leaders(self) -> Sequence[int]:
        """The candidates of the winner's group."""
        winner = self.winner()
        return next((members for _, members in self.groups if winner in members), ())

    @property
    def votes(self) -> list[int]:
        """Size of each group, largest first."""
        return sorted((len(members) for _, members in self.groups), reverse=True)

    def winner(self) -> int | None:
        """The first candidate of the largest group; ties go to the higher mean log-probability."""
        if not self.groups:
            return None
        best = max(self.groups, key=lambda group: (len(group[1]), self._likelihood(group[1]), -group[1][0]))
        return best[1][0]

    def size(self, candidate: int) -> int:
        """Votes for what this candidate came to."""
        return next((len(members) for _, members in self.groups if candidate in members), 0)

    def _likelihood(self, members: Sequence[int]) -> float:
        known = [value for one in members if (value := self._log_probabilities[one]) is not None]
        return sum(known) / len(known) if known else -math.inf

    def settled(self, left: int, confidence: float | None) -> bool:
        """Whether more votes need not be cast: ``left`` ones cannot change it, or are unlikely to.

        Args:
            left: votes that may still come.
            confidence: :func:`lead_probability` that is enough; None for certainty only.
        """
        first, second = [*self.votes, 0, 0][:2]
        return _settled(first, second, left, confidence)

    def missing(self, left: int, confidence: float | None) -> int:
        """The fewest votes, of ``left``, that would settle it if all went to the leader."""
        first, second = [*self.votes, 0, 0][:2]
        return next(
            (k for k in range(1, left) if _settled(first + k, second, left - k, confidence)),
            left,
        )


def _settled(first: int, second: int, left: int, confidence: float | None) -> bool:
    if first - second > left:
        return True
    return confidence is not None and first > 0 and lead_probability(first, second) >= confidence
