"""The almanac's world: entities with facts that nobody can guess, and one passage for each.

Every value is drawn independently over many values, so knowing one fact says nothing about
another. A name belongs to one split by a stable hash: no train world and test world, of whatever
seeds, share an entity.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from agentkd.retrieval import Passage
from agentkd.taskset.almanac.relation import LAYOUTS, RELATIONS
from agentkd.taskset.almanac.words import NAME_PARTS
from agentkd.taskset.split import check_split, split_of, stable_hash

__all__ = ["SIZES", "World", "build_world"]

SIZES = {"town": 120, "person": 220, "company": 90, "book": 110, "ship": 80}
"""How many entities of each kind a world has; one passage each."""


@dataclass(frozen=True)
class World:
    """A closed fictional world."""

    seed: int
    split: str
    passages: tuple[Passage, ...]
    entities: Mapping[str, tuple[str, ...]]
    """Names by kind."""
    facts: Mapping[tuple[str, str], str]
    """Value by (entity, relation)."""
    passage_ids: Mapping[str, str]
    """Passage id by entity."""

    def lookup(self, entity: str, relation: str) -> str | None:
        """The value of a fact, or None for one that this world does not have."""
        return self.facts.get((entity, relation))


@lru_cache(maxsize=8)
def build_world(seed: int = 0, split: str = "train") -> World:
    """Make the world of a split and seed; the same arguments give the same world.

    Args:
        seed: another seed gives another world.
        split: "train" or "test"; their worlds have no entity in common.

    Raises:
        ConfigError: an unknown split.
    """
    check_split(split)
    rng = random.Random(stable_hash("almanac world", split, seed))
    entities = {kind: _names(kind, count, split, rng) for kind, count in SIZES.items()}
    facts = _facts(entities, rng)
    ids: dict[str, str] = {}
    passages: list[Passage] = []
    for kind, names in entities.items():
        for name in names:
            ids[name] = f"{split}-{seed}-{len(passages):04d}"
            text = _text(kind, name, facts, rng)
            passages.append(Passage(id=ids[name], title=name, text=text))
    rng.shuffle(passages)
    return World(
        seed=seed,
        split=split,
        passages=tuple(passages),
        entities=MappingProxyType(entities),
        facts=MappingProxyType(facts),
        passage_ids=MappingProxyType(ids),
    )


def _names(kind: str, count: int, split: str, rng: random.Random) -> tuple[str, ...]:
    pattern, first, second = NAME_PARTS[kind]
    names = [pattern.format(one, two) for one in first for two in second if one != two]
    return tuple(rng.sample([name for name in names if split_of(f"almanac:{name}") == split], count))


def _facts(entities: Mapping[str, tuple[str, ...]], rng: random.Random) -> dict[tuple[str, str], str]:
    facts = {}
    for relation in RELATIONS.values():
        for kind in relation.domains:
            for name in entities[kind]:
                if relation.numeric:
                    value = str(rng.randint(*relation.span))
                elif relation.words:
                    value = rng.choice(relation.words)
                else:
                    value = rng.choice([other for other in entities[relation.target] if other != name])
                facts[name, relation.name] = value
    return facts


def _text(kind: str, name: str, facts: Mapping[tuple[str, str], str], rng: random.Random) -> str:
    values = {r.name: facts[name, r.name] for r in RELATIONS.values() if kind in r.domains}
    occupation = values.get("occupation", "")
    article = "an" if occupation[:1] in tuple("aeiou") else "a"
    return rng.choice(LAYOUTS[kind]).format(name=name, a_occupation=f"{article} {occupation}", **values)
