"""Tasks of the almanac: questions drawn from one world, with answers that its facts prove."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from agentkd.errors import ConfigError
from agentkd.task import Task
from agentkd.taskset.almanac.question import (
    Arithmetic,
    Chain,
    Compare,
    Question,
    heldout_pair,
    phrase_question,
    solve,
)
from agentkd.taskset.almanac.relation import RELATIONS, Relation
from agentkd.taskset.almanac.world import World, build_world
from agentkd.taskset.split import stable_hash

__all__ = ["HELDOUT_PAIR_SHARE", "HELDOUT_PHRASING_SHARE", "KINDS", "almanac_tasks"]

HELDOUT_PAIR_SHARE = 0.25
"""Share of test questions, of the kinds that combine relations, that combine a held-out pair."""
HELDOUT_PHRASING_SHARE = 0.15
"""Share of test questions in a phrasing that the train split never uses."""
_DRY_LIMIT = 5_000


def almanac_tasks(kind: str, split: str, seed: int) -> Iterator[Task]:
    """Endless tasks of one kind (see ``KINDS``); no question comes twice.

    All kinds of a split and seed share the world ``build_world(seed, split)``.

    Raises:
        ConfigError: an unknown kind, or the world has no further question of it.
    """
    if kind not in KINDS:
        raise ConfigError(f"The almanac has no {kind!r} questions.", f"It has: {', '.join(KINDS)}.")
    world = build_world(seed, split)
    rng = random.Random(stable_hash("almanac tasks", kind, split, seed))
    seen: set[str] = set()
    dry = 0
    while True:
        task = _draw(kind, world, rng)
        if task is None or task.question in seen:
            dry += 1
            if dry > _DRY_LIMIT:
                raise ConfigError(
                    f"The almanac has no more than {len(seen)} different {kind} questions in this world.",
                    "Ask for fewer tasks.",
                )
            continue
        dry = 0
        seen.add(task.question)
        yield task


def _draw(kind: str, world: World, rng: random.Random) -> Task | None:
    wants_pair = world.split == "test" and kind in _WITH_PAIRS and rng.random() < HELDOUT_PAIR_SHARE
    wants_phrasing = world.split == "test" and rng.random() < HELDOUT_PHRASING_SHARE
    make, level = KINDS[kind]
    question = make(world, rng)
    while heldout_pair(question) != wants_pair:
        question = make(world, rng)
    answer = solve(question, world.lookup)
    steps = _steps(question, world)
    if answer is None or _shortcut(question, steps, world):
        return None
    text, template = phrase_question(question, rng, heldout=wants_phrasing)
    return Task(
        id=f"almanac-{kind}-{stable_hash(world.split, world.seed, text):016x}",
        question=text,
        answer=answer,
        scorer="numeric" if answer.isdigit() else "exact",
        family=f"almanac_{kind}",
        level=level,
        split=world.split,
        meta={
            "hops": len(dict.fromkeys(entity for entity, _ in steps)),
            "relations": [relation for _, relation in steps],
            "template": template,
            "passages": [
                world.passage_ids[entity] for entity in dict.fromkeys(entity for entity, _ in steps)
            ],
            "heldout": wants_pair or wants_phrasing,
            "heldout_pair": wants_pair,
            "heldout_phrasing": wants_phrasing,
        },
    )


def _steps(question: Question, world: World) -> list[tuple[str, str]]:
    """The (entity, relation) facts that the answer needs, in order."""
    if isinstance(question, Compare):
        pairs = [(question.first, question.by), (question.second, question.by)]
        return [*pairs, (question.first, question.want), (question.second, question.want)]
    chains = [question] if isinstance(question, Chain) else [question.left, question.right]
    steps = []
    for chain in chains:
        entities = [chain.entity, *chain.follow(world.lookup)[:-1]]
        steps += list(zip(entities, chain.relations, strict=True))
    return steps


def _shortcut(question: Question, steps: list[tuple[str, str]], world: World) -> bool:
    """True when the answer, or a choice between two, could be had without taking all steps."""
    if isinstance(question, Compare):
        values = [world.lookup(entity, relation) for entity, relation in steps]
        return values[0] == values[1] or values[2] == values[3]
    if isinstance(question, Arithmetic):
        return solve(question.left, world.lookup) == solve(question.right, world.lookup)
    entities = [entity for entity, _ in steps]
    answer = solve(question, world.lookup)
    if answer in entities or len(set(entities)) < len(entities):
        return True
    stated = {world.lookup(entity, relation) for entity in entities[:-1] for relation in RELATIONS}
    return answer in stated


def _of_kind(kind: str) -> list[Relation]:
    return [relation for relation in RELATIONS.values() if kind in relation.domains]


def _chain(length: int) -> Callable[[World, random.Random], Chain]:
    def make(world: World, rng: random.Random) -> Chain:
        kinds = [kind for kind in world.entities if length == 1 or any(r.target for r in _of_kind(kind))]
        kind = start = rng.choice(kinds)
        relations = []
        for hop in range(length):
            last = hop == length - 1
            relation = rng.choice([r for r in _of_kind(kind) if last or r.target])
            relations.append(relation.name)
            kind = relation.target
        return Chain(rng.choice(world.entities[start]), tuple(relations))

    return make


def _compare(world: World, rng: random.Random) -> Compare:
    kind = rng.choice([kind for kind in world.entities if any(r.comparison for r in _of_kind(kind))])
    by = rng.choice([relation for relation in _of_kind(kind) if relation.comparison])
    want = rng.choice([relation for relation in _of_kind(kind) if relation is not by])
    first, second = rng.sample(world.entities[kind], 2)
    return Compare(kind, first, second, by.name, rng.random() < 0.5, want.name)


def _arithmetic(world: World, rng: random.Random) -> Arithmetic:
    kind = rng.choice(list(world.entities))
    counted = [relation for relation in _of_kind(kind) if relation.comparison]
    relation = rng.choice(counted)
    first, second = rng.sample(world.entities[kind], 2)
    assert relation.comparison is not None
    if relation.comparison.unit:
        return Arithmetic("sum", Chain(first, (relation.name,)), Chain(second, (relation.name,)))
    left = Chain(first, (relation.name,))
    people = [r for r in _of_kind(kind) if r.target == "person"]
    # Now and then the second event is the birth of a person who has to be found first.
    if people and rng.random() < 0.25:
        return Arithmetic("difference", left, Chain(first, (rng.choice(people).name, "born")))
    return Arithmetic("difference", left, Chain(second, (relation.name,)))


KINDS: Mapping[str, tuple[Callable[[World, random.Random], Question], str]] = {
    "1hop": (_chain(1), "easy"),
    "2hop": (_chain(2), "easy"),
    "3hop": (_chain(3), "hard"),
    "compare": (_compare, "hard"),
    "arithmetic": (_arithmetic, "hard"),
}
"""The kinds of question, with what makes them and their level."""

_WITH_PAIRS = frozenset({"2hop", "3hop", "compare"})
