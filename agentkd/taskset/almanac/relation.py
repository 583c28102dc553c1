"""The relations of the almanac: what can be stated, asked, and read back out of a passage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from agentkd.taskset.almanac.words import GOODS, OCCUPATIONS

__all__ = ["HELDOUT_PAIRS", "LAYOUTS", "PLURALS", "RELATIONS", "Comparison", "Relation"]

_VALUE = {
    "number": r"(\d+)",
    "name": r"((?:The |SS )?[A-Z][a-z]+ [A-Z][a-z]+(?: Company)?)",
    "word": r"([a-z]+)",
}


@dataclass(frozen=True)
class Comparison:
    """How two entities are compared by a relation, and how its values are combined."""

    less: str
    """Says of an entity that its value is the smaller one: "that was founded earlier"."""
    more: str
    event: str = ""
    """For years: the noun of the event, "founding"."""
    unit: str = ""
    """For amounts: what is counted, "inhabitants"."""


@dataclass(frozen=True)
class Relation:
    """One relation from entities to values."""

    name: str
    domains: tuple[str, ...]
    """Kinds of entity that have it."""
    noun: str
    """The value, named: "the mayor of {x}". Used in thoughts, and in questions where the value
    is an entity."""
    asks: tuple[str, ...]
    """Phrasings of the question, for both splits."""
    heldout_ask: str
    """A phrasing that only the test split uses."""
    cue: str
    """Words around the value in a passage, with {y} for the value."""
    target: str = ""
    """Kind of entity of the value; empty for plain values."""
    words: tuple[str, ...] = ()
    """The values, where they are words."""
    span: tuple[int, int] = (0, 0)
    """Smallest and largest value, where they are numbers."""
    phrases: tuple[str, ...] = ()
    """Further ways to name the value inside a question, for both splits."""
    heldout_phrase: str = ""
    comparison: Comparison | None = None

    @property
    def numeric(self) -> bool:
        """True when the values are numbers."""
        return self.span != (0, 0)

    def read(self, text: str) -> str | None:
        """The value that a passage states, or None."""
        kind = "number" if self.numeric else "word" if self.words else "name"
        before, after = (re.escape(part) for part in self.cue.split("{y}"))
        found = re.search(before.replace("an\\?", "an?") + _VALUE[kind] + after, text)
        return found[1] if found else None


def _year(less: str, more: str, event: str) -> Comparison:
    return Comparison(less, more, event=event)


_TABLE = (
    Relation(
        "founded",
        ("town", "company"),
        "the founding year of {x}",
        ("In which year was {x} founded?", "When was {x} founded?"),
        "What is the founding year of {x}?",
        "founded in {y}",
        span=(1100, 1999),
        comparison=_year("that was founded earlier", "that was founded later", "founding"),
    ),
    Relation(
        "population",
        ("town",),
        "the population of {x}",
        ("How many people live in {x}?", "What is the population of {x}?"),
        "How many inhabitants does {x} have?",
        "has {y} inhabitants",
        span=(1000, 99999),
        comparison=Comparison("with fewer inhabitants", "with more inhabitants", unit="inhabitants"),
    ),
    Relation(
        "mayor",
        ("town",),
        "the mayor of {x}",
        ("Who is the mayor of {x}?", "What is the name of the mayor of {x}?"),
        "Which person governs {x} as mayor?",
        "mayor is {y}",
        target="person",
        heldout_phrase="the person who governs {x}",
    ),
    Relation(
        "specialty",
        ("town",),
        "the specialty of {x}",
        ("What is the specialty of {x}?", "What is {x} known for?"),
        "Which goods made {x} famous?",
        "known for {y}",
        words=GOODS,
    ),
    Relation(
        "born",
        ("person",),
        "the birth year of {x}",
        ("In which year was {x} born?", "When was {x} born?"),
        "What is the birth year of {x}?",
        "in the year {y}",
        span=(1100, 1999),
        comparison=_year("who was born earlier", "who was born later", "birth"),
    ),
    Relation(
        "birthplace",
        ("person",),
        "the birthplace of {x}",
        ("Where was {x} born?", "In which town was {x} born?"),
        "What is the birthplace of {x}?",
        "in the town of {y}",
        target="town",
        phrases=("the town where {x} was born",),
        heldout_phrase="the town in which {x} came into the world",
    ),
    Relation(
        "occupation",
        ("person",),
        "the occupation of {x}",
        ("What was the occupation of {x}?", "What did {x} work as?"),
        "How did {x} earn a living?",
        "worked as an? {y}",
        words=OCCUPATIONS,
    ),
    Relation(
        "teacher",
        ("person",),
        "the teacher of {x}",
        ("Who was the teacher of {x}?", "Who taught {x}?"),
        "From whom did {x} learn?",
        "learned from {y}",
        target="person",
        heldout_phrase="the person who taught {x}",
    ),
    Relation(
        "founder",
        ("company",),
        "the founder of {x}",
        ("Who founded {x}?", "Who was the founder of {x}?"),
        "Which person started {x}?",
        "by {y}",
        target="person",
        phrases=("the person who founded {x}",),
        heldout_phrase="the person who started {x}",
    ),
    Relation(
        "seat",
        ("company",),
        "the seat of {x}",
        ("Where is {x} based?", "In which town is {x} based?"),
        "What is the seat of {x}?",
        "based in {y}",
        target="town",
        phrases=("the town where {x} is based",),
        heldout_phrase="the town that {x} calls home",
    ),
    Relation(
        "product",
        ("company",),
        "the product of {x}",
        ("What does {x} make?", "What is the product of {x}?"),
        "Which goods come from {x}?",
        "makes {y}",
        words=GOODS,
    ),
    Relation(
        "workers",
        ("company",),
        "the number of workers of {x}",
        ("How many workers does {x} have?", "How many people work for {x}?"),
        "What is the number of workers of {x}?",
        "has {y} workers",
        span=(100, 9999),
        comparison=Comparison("with fewer workers", "with more workers", unit="workers"),
    ),
    Relation(
        "author",
        ("book",),
        "the author of {x}",
        ("Who wrote {x}?", "Who is the author of {x}?"),
        "By whom was {x} written?",
        "written by {y}",
        target="person",
        phrases=("the person who wrote {x}",),
        heldout_phrase="the writer of {x}",
    ),
    Relation(
        "published",
        ("book",),
        "the publication year of {x}",
        ("In which year was {x} published?", "When was {x} published?"),
        "What is the publication year of {x}?",
        "published in {y}",
        span=(1100, 1999),
        comparison=_year("that was published earlier", "that was published later", "publication"),
    ),
    Relation(
        "pages",
        ("book",),
        "the number of pages of {x}",
        ("How many pages does {x} have?", "What is the number of pages of {x}?"),
        "How long is {x} in pages?",
        "has {y} pages",
        span=(100, 1999),
        comparison=Comparison("with fewer pages", "with more pages", unit="pages"),
    ),
    Relation(
        "captain",
        ("ship",),
        "the captain of {x}",
        ("Who is the captain of {x}?", "Who commands {x}?"),
        "Which person steers {x} as captain?",
        "captain is {y}",
        target="person",
        phrases=("the person who commands {x}",),
        heldout_phrase="the person who steers {x}",
    ),
    Relation(
        "built",
        ("ship",),
        "the construction year of {x}",
        ("In which year was {x} built?", "When was {x} built?"),
        "What is the construction year of {x}?",
        "built in {y}",
        span=(1100, 1999),
        comparison=_year("that was built earlier", "that was built later", "construction"),
    ),
    Relation(
        "port",
        ("ship",),
        "the home port of {x}",
        ("What is the home port of {x}?", "Which town is the home port of {x}?"),
        "To which port does {x} belong?",
        "home port is {y}",
        target="town",
        heldout_phrase="the port to which {x} belongs",
    ),
    Relation(
        "cargo",
        ("ship",),
        "the cargo of {x} in tons",
        ("How many tons of cargo does {x} carry?", "How many tons can {x} carry?"),
        "What is the cargo of {x}, in tons?",
        "carries {y} tons",
        span=(100, 9999),
        comparison=Comparison("with less cargo", "with more cargo", unit="tons of cargo"),
    ),
)

RELATIONS: Mapping[str, Relation] = {relation.name: relation for relation in _TABLE}
"""All relations by name."""

HELDOUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("mayor", "born"),
        ("author", "birthplace"),
        ("captain", "occupation"),
        ("founder", "teacher"),
        ("seat", "mayor"),
        ("port", "population"),
        ("birthplace", "specialty"),
        ("teacher", "occupation"),
        # In comparisons: (compared by, asked for).
        ("population", "founded"),
        ("born", "teacher"),
        ("pages", "author"),
        ("workers", "seat"),
    }
)
"""Pairs of relations that only the test split combines; each of them occurs in other pairs too."""

PLURALS = {"town": "towns", "person": "people", "company": "companies", "book": "books", "ship": "ships"}

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "town": (
        "{name} is a town founded in {founded}. {name} has {population} inhabitants and is known for "
        "{specialty}. The mayor is {mayor}.",
        "{name} is a town known for {specialty}. The mayor is {mayor}. {name} was founded in {founded} and "
        "has {population} inhabitants.",
    ),
    "person": (
        "{name} was born in the town of {birthplace} in the year {born}. {name} learned from {teacher} and "
        "worked as {a_occupation}.",
        "{name} worked as {a_occupation} and learned from {teacher}. {name} was born in the year {born} in "
        "the town of {birthplace}.",
    ),
    "company": (
        "{name} was founded in {founded} by {founder}. It is based in {seat}, makes {product} and has "
        "{workers} workers.",
        "{name} is based in {seat} and makes {product}. It was founded in {founded} by {founder} and has "
        "{workers} workers.",
    ),
    "book": (
        "{name} is a book written by {author}. It was published in {published} and has {pages} pages.",
        "{name} is a book that was published in {published}. It has {pages} pages and was written by "
        "{author}.",
    ),
    "ship": (
        "{name} is a ship built in {built}. It carries {cargo} tons. The captain is {captain} and the home "
        "port is {port}.",
        "{name} is a ship that carries {cargo} tons. It was built in {built}. The home port is {port} and "
        "the captain is {captain}.",
    ),
}
"""The ways to write the passage of each kind of entity; all under 40 words."""
