"""Tasks of reasoning-gym by family, in splits that share nothing that gives an answer away.

Questions and gold answers are reasoning-gym's (long instructions are shortened). Each drawn item
has *keys*: its operands, its dates, its numbers. A key belongs to one split by a stable hash, and
an item is taken only when all its keys belong to the split asked for; so no seed of "train" ever
shares a key with any seed of "test".
"""

from __future__ import annotations

import difflib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentkd.errors import ConfigError
from agentkd.task import Task
from agentkd.taskset.split import all_in_split, stable_hash

__all__ = ["FAMILIES", "LEVELS", "gym_streams", "gym_tasks", "levels_of"]

LEVELS = ("easy", "hard")
_DRY_LIMIT = 20_000
"""Draws in a row that may be refused before the family counts as used up."""

_BLOCK = 4096
"""Items that are drawn from one reasoning-gym dataset before the next one is made."""

Item = Mapping[str, Any]


@dataclass(frozen=True)
class _Family:
    levels: Mapping[str, Mapping[str, Any]]
    keys: Callable[[Item], tuple[str, ...]]
    scorer: str = "numeric"
    shorten: Callable[[str], str] = field(default=str)
    years: Mapping[str, tuple[int, int]] | None = None
    """Calendar only: reasoning-gym fixes one year a dataset, we draw the year for each item."""


def _sorted_numbers(text: str) -> str:
    return ",".join(sorted(re.findall(r"\d+", text)))


def _signed_terms(expression: str) -> str:
    return ",".join(sorted(re.findall(r"[+-]\d+", "+" + expression.replace(" ", ""))))


def _calendar_keys(item: Item) -> tuple[str, ...]:
    # The start date counts too: its weekday stands in the question.
    meta = item["metadata"]
    return tuple(meta[name] for name in ("start_date", "target_date") if name in meta)


def _equation_key(item: Item) -> str:
    meta = item["metadata"]
    return re.sub(rf"\b{meta['variable']}\b", "x", meta["equation"])


def _gsm_keys(item: Item) -> tuple[str, ...]:
    # Names and objects vary freely, so the numbers of the story are what repeats.
    return (",".join(re.findall(r"\d+(?:\.\d+)?", item["question"])),)


def _shorten_conversion(question: str) -> str:
    found = re.search(r"convert the (\S+) number (\S+) to (\S+)", question)
    if found is None:
        return question
    return (
        f"Convert the {found[1]} number {found[2]} to {found[3]}. "
        "Use lowercase letters a-z for digits above 9. Give only the digits."
    )


_WEEKDAYS = ["weekday_of_date", "weekday_offset"]

_FAMILIES: dict[str, _Family] = {
    "products": _Family(
        {"easy": {"min_digits": 2, "max_digits": 3}, "hard": {"min_digits": 5, "max_digits": 6}},
        lambda item: (_sorted_numbers(item["metadata"]["expression"]),),
    ),
    "chain_sum": _Family(
        {
            "easy": {"min_terms": 2, "max_terms": 4, "min_digits": 2, "max_digits": 3},
            "hard": {"min_terms": 5, "max_terms": 7, "min_digits": 4, "max_digits": 5},
        },
        lambda item: (_signed_terms(item["metadata"]["expression"]),),
    ),
    "lcm": _Family(
        {
            "easy": {"min_value": 10, "max_value": 150},
            "hard": {"min_numbers": 3, "max_numbers": 3, "min_value": 100, "max_value": 999},
        },
        lambda item: (",".join(map(str, sorted(item["metadata"]["numbers"]))),),
    ),
    "calendar_arithmetic": _Family(
        {
            "easy": {"tasks": _WEEKDAYS, "offset_upper_bound": 30},
            "hard": {"tasks": _WEEKDAYS, "offset_upper_bound": 1000},
        },
        _calendar_keys,
        scorer="exact",
        years={"easy": (2000, 2029), "hard": (1700, 2299)},
    ),
    "letter_counting": _Family(
        {"easy": {"min_words": 5, "max_words": 8}, "hard": {"min_words": 12, "max_words": 20}},
        lambda item: (f"{item['metadata']['target_letter']}|{' '.join(item['metadata']['span'])}",),
    ),
    "simple_equations": _Family(
        {
            "easy": {"min_terms": 2, "max_terms": 2, "max_value": 20},
            "hard": {"min_terms": 3, "max_terms": 4, "max_value": 100},
        },
        lambda item: (_equation_key(item),),
    ),
    "count_primes": _Family(
        {"easy": {"max_n": 300}, "hard": {"min_n": 300, "max_n": 10_000}},
        lambda item: (f"{item['metadata']['start']},{item['metadata']['end']}",),
    ),
    "base_conversion": _Family(
        {
            "easy": {"max_base": 10, "min_value": 10, "max_value": 2000},
            "hard": {"max_base": 36, "min_value": 2001, "max_value": 200_000},
        },
        # The same value in another pair of bases would give the answer away.
        lambda item: (str(item["metadata"]["decimal_value"]),),
        scorer="exact",
        shorten=_shorten_conversion,
    ),
    "gsm_symbolic": _Family({"any": {}}, _gsm_keys),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""The families that the "gym" taskset knows."""


def levels_of(family: str) -> tuple[str, ...]:
    """The difficulty levels of a family; ("any",) for one that has no levels."""
    return tuple(_family(family).levels)


def _family(name: str) -> _Family:
    if name in _FAMILIES:
        return _FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known families: {', '.join(FAMILIES)}."
    raise ConfigError(f"There is no reasoning-gym family {name!r} here.", hint)


def gym_streams(spec: str, split: str, seed: int) -> list[Iterator[Task]]:
    """One endless stream of tasks for each family in a spec.

    Args:
        spec: families separated by commas, each with an optional ``@easy`` or ``@hard``; without
            one the levels alternate.
        split: "train" or "test".
        seed: draws of different seeds differ; the splits stay disjoint.

    Raises:
        ConfigError: an unknown family or level, or reasoning-gym is not installed.
    """
    streams = []
    for part in spec.split(","):
        name, _, level = part.strip().partition("@")
        if not name:
            raise ConfigError(f"A family is missing in {spec!r}.", f"Known families: {', '.join(FAMILIES)}.")
        known = levels_of(name)
        if level and level not in known:
            raise ConfigError(f"{name} has no level {level!r}.", f"It has: {', '.join(known)}.")
        streams.append(gym_tasks(name, (level,) if level else known, split, seed))
    return streams


def gym_tasks(family: str, levels: tuple[str, ...], split: str, seed: int) -> Iterator[Task]:
    """Endless tasks of one family, its levels in turn; no question comes twice.

    Raises:
        ConfigError: reasoning-gym is not installed, or the family has no further question.
    """
    streams = [_level_tasks(family, level, split, seed) for level in levels]
    while True:
        for stream in streams:
            yield next(stream)


def _level_tasks(family: str, level: str, split: str, seed: int) -> Iterator[Task]:
    settings = _family(family)
    seen: set[str] = set()
    dry = 0
    for item in _items(family, level, split, seed):
        keys = settings.keys(item)
        question = settings.shorten(item["question"]).strip()
        if question in seen or not all_in_split((f"{family}:{key}" for key in keys), split):
            dry += 1
            if dry > _DRY_LIMIT:
                raise ConfigError(
                    f"{family}@{level} has no more than {len(seen)} different {split} questions.",
                    "Ask for fewer tasks.",
                )
            continue
        dry = 0
        seen.add(question)
        yield Task(
            id=f"{family}-{level}-{stable_hash(family, level, question):016x}",
            question=question,
            answer=item["answer"],
            scorer=settings.scorer,
            family=family,
            level=level,
            split=split,
            meta={"keys": list(keys)},
        )


def _items(family: str, level: str, split: str, seed: int) -> Iterator[Item]:
    try:
        from reasoning_gym import create_dataset
    except ImportError as exc:
        raise ConfigError(
            "reasoning-gym is not installed.", "Install it by: pip install 'agentkd[tasks]'."
        ) from exc

    settings = _family(family)
    options = dict(settings.levels[level])
    # reasoning-gym seeds item i with seed + i, so seeds must lie far apart to give other items.
    base = stable_hash("gym", family, level, split, seed) % 2**40
    years = settings.years[level] if settings.years else None
    datasets: dict[int, Any] = {}
    for index in itertools.count():
        if index % _BLOCK == 0:
            datasets.clear()
        year = random.Random(base + index).randint(*years) if years else 0
        if year not in datasets:
            given = {"year": year} if years else {}
            start = base + index - index % _BLOCK
            datasets[year] = create_dataset(family, size=_BLOCK, seed=start, **options, **given)
        yield datasets[year][index % _BLOCK]
