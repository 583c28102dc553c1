"""Questions about the almanac: their meaning, their text, and the way back from text to meaning.

A question's text is put together from the phrasings of :mod:`.relation`, and :func:`parse_question`
reads it by the same phrasings, so the offline expert understands what it is asked from the text
alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from agentkd.taskset.almanac.relation import HELDOUT_PAIRS, PLURALS, RELATIONS, Relation

__all__ = [
    "Arithmetic",
    "Chain",
    "Compare",
    "Lookup",
    "Question",
    "heldout_pair",
    "parse_question",
    "phrase_question",
    "solve",
]

Lookup = Callable[[str, str], str | None]
"""From (entity, relation) to the value, or None where it is not known."""


@dataclass(frozen=True)
class Chain:
    """Relations one after the other: ``("mayor", "born")`` of a town is its mayor's birth year."""

    entity: str
    relations: tuple[str, ...]

    def goal(self) -> str:
        """What is looked for, named: "the birth year of the mayor of Silver Harbor"."""
        named = self.entity
        for name in self.relations:
            named = RELATIONS[name].noun.format(x=named)
        return named

    def follow(self, lookup: Lookup) -> list[str]:
        """The values along the chain, as far as they are known."""
        values: list[str] = []
        current = self.entity
        for name in self.relations:
            value = lookup(current, name)
            if value is None:
                break
            values.append(value)
            current = value
        return values


@dataclass(frozen=True)
class Compare:
    """A fact about that one of two entities which is ahead in another fact."""

    kind: str
    first: str
    second: str
    by: str
    more: bool
    """True: the entity with the larger value is meant."""
    want: str

    def description(self) -> str:
        """Which of the two is meant: "the one that was founded earlier"."""
        comparison = RELATIONS[self.by].comparison
        assert comparison is not None
        return f"the one {comparison.more if self.more else comparison.less}"


@dataclass(frozen=True)
class Arithmetic:
    """The years between two events, or the sum of two amounts."""

    operation: str
    """"difference" or "sum"."""
    left: Chain
    right: Chain


Question = Chain | Compare | Arithmetic


def heldout_pair(question: Question) -> bool:
    """True when the question combines relations that only the test split combines."""
    if isinstance(question, Compare):
        return (question.by, question.want) in HELDOUT_PAIRS
    chains = (question,) if isinstance(question, Chain) else (question.left, question.right)
    return any(
        pair in HELDOUT_PAIRS
        for chain in chains
        for pair in zip(chain.relations, chain.relations[1:], strict=False)
    )


def solve(question: Question, lookup: Lookup) -> str | None:
    """The answer, or None when a fact is not known."""
    if isinstance(question, Chain):
        values = question.follow(lookup)
        return values[-1] if len(values) == len(question.relations) else None
    if isinstance(question, Compare):
        first, second = lookup(question.first, question.by), lookup(question.second, question.by)
        if first is None or second is None:
            return None
        ahead = question.first if (int(first) > int(second)) == question.more else question.second
        return lookup(ahead, question.want)
    left, right = solve(question.left, lookup), solve(question.right, lookup)
    if left is None or right is None:
        return None
    return str(int(left) + int(right) if question.operation == "sum" else abs(int(left) - int(right)))


# --- meaning to text ---------------------------------------------------------------------------

_DIFFERENCE = (
    "How many years lie between the {e1} of {x} and the {e2} of {y}?",
    "How many years passed between the {e1} of {x} and the {e2} of {y}?",
)
_HELDOUT_DIFFERENCE = "What is the difference in years between the {e1} of {x} and the {e2} of {y}?"
_SUM = (
    "How many {unit} do {x} and {y} have together?",
    "How many {unit} do {x} and {y} have in all?",
)
_HELDOUT_SUM = "What is the total number of {unit} of {x} and {y}?"
_CONSIDER = "Consider the {plural} {x} and {y}."
_HELDOUT_CONSIDER = "Here are two {plural}: {x} and {y}."


def phrase_question(question: Question, rng: random.Random, heldout: bool = False) -> tuple[str, str]:
    """Put a question into words.

    Args:
        question: what to ask.
        rng: chooses among the phrasings.
        heldout: use a phrasing that only the test split has.

    Returns:
        The text, and the name of the phrasing of its outermost part.
    """
    if isinstance(question, Chain):
        named = _name_chain(question.entity, question.relations[:-1], rng, heldout)
        return _ask(RELATIONS[question.relations[-1]], named, rng, heldout)
    if isinstance(question, Compare):
        opening = (_HELDOUT_CONSIDER if heldout else _CONSIDER).format(
            plural=PLURALS[question.kind], x=question.first, y=question.second
        )
        text, template = _ask(RELATIONS[question.want], question.description(), rng, heldout)
        return f"{opening} {text}", template
    return _phrase_arithmetic(question, rng, heldout)


def _ask(relation: Relation, named: str, rng: random.Random, heldout: bool) -> tuple[str, str]:
    choice = rng.randrange(len(relation.asks))
    template = relation.heldout_ask if heldout else relation.asks[choice]
    return template.format(x=named), f"{relation.name}/{'heldout' if heldout else choice}"


def _name_chain(entity: str, relations: tuple[str, ...], rng: random.Random, heldout: bool) -> str:
    named = entity
    for name in relations:
        relation = RELATIONS[name]
        template = rng.choice((relation.noun, *relation.phrases))
        if heldout and relation.heldout_phrase:
            template = relation.heldout_phrase
        named = template.format(x=named)
    return named


def _phrase_arithmetic(question: Arithmetic, rng: random.Random, heldout: bool) -> tuple[str, str]:
    x = _name_chain(question.left.entity, question.left.relations[:-1], rng, heldout)
    y = _name_chain(question.right.entity, question.right.relations[:-1], rng, heldout)
    left = RELATIONS[question.left.relations[-1]].comparison
    right = RELATIONS[question.right.relations[-1]].comparison
    assert left is not None and right is not None
    plain, special = (
        (_SUM, _HELDOUT_SUM) if question.operation == "sum" else (_DIFFERENCE, _HELDOUT_DIFFERENCE)
    )
    choice = rng.randrange(len(plain))
    template = special if heldout else plain[choice]
    text = template.format(x=x, y=y, e1=left.event, e2=right.event, unit=left.unit)
    return text, f"{question.operation}/{'heldout' if heldout else choice}"


# --- text to meaning ---------------------------------------------------------------------------


def parse_question(text: str) -> Question | None:
    """What a question asks, from its text alone; None for a text that is no almanac question."""
    text = " ".join(text.split())
    return _parse_compare(text) or _parse_arithmetic(text) or _parse_chain(text)


def _pattern(template: str, **slots: str) -> re.Pattern[str]:
    """A regular expression for a template: its slots become named groups."""
    parts = re.split(r"\{(\w+)\}", template)
    built = "".join(
        f"(?P<{part}>{slots.get(part, '.+')})" if index % 2 else re.escape(part)
        for index, part in enumerate(parts)
    )
    return re.compile(built)


@cache
def _asks() -> tuple[tuple[Relation, re.Pattern[str]], ...]:
    return tuple(
        (relation, _pattern(template))
        for relation in RELATIONS.values()
        for template in (*relation.asks, relation.heldout_ask)
    )


@cache
def _phrases() -> tuple[tuple[Relation, re.Pattern[str]], ...]:
    return tuple(
        (relation, _pattern(template))
        for relation in RELATIONS.values()
        if relation.target
        for template in (relation.noun, *relation.phrases, relation.heldout_phrase)
        if template
    )


_NAME = re.compile(r"(?:The |SS )?[A-Z][a-z]+ [A-Z][a-z]+(?: Company)?")


def _match(text: str, patterns: tuple[tuple[Relation, re.Pattern[str]], ...]) -> Iterator[tuple[str, str]]:
    for relation, pattern in patterns:
        found = pattern.fullmatch(text)
        if found:
            yield relation.name, found["x"]


def _parse_chain(text: str) -> Chain | None:
    for name, rest in _match(text, _asks()):
        inner = _parse_named(rest)
        if inner is not None:
            return Chain(inner.entity, (*inner.relations, name))
    return None


def _parse_named(text: str) -> Chain | None:
    """The entity and the relations of "the mayor of the birthplace of ..."."""
    if _NAME.fullmatch(text):
        return Chain(text, ())
    for name, rest in _match(text, _phrases()):
        inner = _parse_named(rest)
        if inner is not None:
            return Chain(inner.entity, (*inner.relations, name))
    return None


def _parse_compare(text: str) -> Compare | None:
    for template in (_CONSIDER, _HELDOUT_CONSIDER):
        found = _pattern(template + " {ask}", plural=r"\w+", x=_NAME.pattern, y=_NAME.pattern).fullmatch(text)
        if not found:
            continue
        kind = {plural: kind for kind, plural in PLURALS.items()}.get(found["plural"], "")
        for want, which in _match(found["ask"], _asks()):
            for relation in RELATIONS.values():
                sides = relation.comparison
                if (
                    sides
                    and kind in relation.domains
                    and which in (f"the one {sides.less}", f"the one {sides.more}")
                ):
                    more = which == f"the one {sides.more}"
                    return Compare(kind, found["x"], found["y"], relation.name, more, want)
    return None


def _parse_arithmetic(text: str) -> Arithmetic | None:
    for template in (*_DIFFERENCE, _HELDOUT_DIFFERENCE, *_SUM, _HELDOUT_SUM):
        found = _pattern(template, e1=r"\w+", e2=r"\w+", x=".+?", unit=_units()).fullmatch(text)
        if not found:
            continue
        left, right = _parse_named(found["x"]), _parse_named(found["y"])
        groups = found.groupdict()
        names = [_counted(groups.get("e1") or groups["unit"]), _counted(groups.get("e2") or groups["unit"])]
        if left is None or right is None or None in names:
            continue
        return Arithmetic(
            "difference" if "e1" in groups else "sum",
            Chain(left.entity, (*left.relations, str(names[0]))),
            Chain(right.entity, (*right.relations, str(names[1]))),
        )
    return None


@cache
def _units() -> str:
    return "|".join(r.comparison.unit for r in RELATIONS.values() if r.comparison and r.comparison.unit)


def _counted(word: str) -> str | None:
    """The relation whose event or unit is called so."""
    for relation in RELATIONS.values():
        if relation.comparison and word in (relation.comparison.event, relation.comparison.unit):
            return relation.name
    return None
