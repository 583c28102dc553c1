"""The almanac: its world, and questions that only the world answers."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from agentkd.errors import ConfigError
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.task import Task
from agentkd.taskset.almanac import (
    HELDOUT_PAIRS,
    KINDS,
    RELATIONS,
    Chain,
    World,
    almanac_tasks,
    build_world,
    heldout_pair,
    parse_question,
    solve,
)


def draw(kind: str, split: str, seed: int = 0, n: int = 150) -> list[Task]:
    return list(itertools.islice(almanac_tasks(kind, split, seed), n))


@pytest.fixture(scope="module", params=["train", "test"])
def world(request: pytest.FixtureRequest) -> World:
    return build_world(0, request.param)


def test_world_is_deterministic_and_of_modest_size(world: World) -> None:
    build_world.cache_clear()
    again = build_world(0, world.split)
    assert again.passages == world.passages and again.facts == world.facts
    assert again is not world
    assert build_world(1, world.split).passages != world.passages
    assert 300 <= len(world.passages) <= 1000


def test_titles_and_ids_are_unique(world: World) -> None:
    assert (
        len({p.title for p in world.passages}) == len({p.id for p in world.passages}) == len(world.passages)
    )
    assert max(len(p.text.split()) for p in world.passages) <= 40


def test_every_fact_can_be_read_in_its_own_passage(world: World) -> None:
    texts = {p.title: p.text for p in world.passages}
    for (entity, relation), value in world.facts.items():
        assert RELATIONS[relation].read(texts[entity]) == value


def test_values_are_spread(world: World) -> None:
    for name in RELATIONS:
        values = Counter(value for (_, relation), value in world.facts.items() if relation == name)
        assert max(values.values()) / sum(values.values()) < 0.12, name


def test_worlds_of_the_splits_have_no_entity_in_common() -> None:
    train = {p.title for seed in range(4) for p in build_world(seed, "train").passages}
    test = {p.title for seed in range(4) for p in build_world(seed, "test").passages}
    assert not train & test
    stated = {value for seed in range(4) for value in build_world(seed, "train").facts.values()}
    assert not stated & test


def test_searching_a_name_finds_its_passage(world: World) -> None:
    retriever = BM25Retriever(world.passages)
    found = retriever.search([p.title for p in world.passages], 3)
    at_top = sum(hits[0].passage.title == p.title for hits, p in zip(found, world.passages, strict=True))
    assert at_top == len(world.passages)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_proved_by_the_facts(kind: str, world: World) -> None:
    for task in draw(kind, world.split):
        question = parse_question(task.question)
        assert question is not None, task.question
        assert solve(question, world.lookup) == task.answer
        # Without any one of the passages the answer cannot be had.
        titles = {p.id: p.title for p in world.passages}
        for missing in task.meta["passages"]:
            hidden = titles[missing]
            assert solve(question, lambda e, r, h=hidden: None if e == h else world.lookup(e, r)) is None


@pytest.mark.parametrize("kind", ["2hop", "3hop"])
def test_no_earlier_passage_states_the_answer(kind: str, world: World) -> None:
    texts = {p.id: p.text for p in world.passages}
    for task in draw(kind, world.split):
        assert len(task.meta["passages"]) == task.meta["hops"] == int(kind[0])
        assert task.answer not in task.question
        for passage in task.meta["passages"][:-1]:
            # A number may stand inside a longer one, so compare whole words.
            assert f" {task.answer} " not in f" {texts[passage].replace('.', ' ').replace(',', ' ')} "


@pytest.mark.parametrize("kind", KINDS)
def test_heldout_forms_are_for_the_test_split_only(kind: str) -> None:
    train, test = draw(kind, "train", n=300), draw(kind, "test", n=300)
    assert not any(task.meta["heldout"] or "heldout" in task.meta["template"] for task in train)
    assert not any(heldout_pair(question) for t in train if (question := parse_question(t.question)))
    pairs = sum(task.meta["heldout_pair"] for task in test)
    phrasings = sum(task.meta["heldout_phrasing"] for task in test)
    assert (45 <= pairs <= 110) if kind in ("2hop", "3hop", "compare") else pairs == 0
    assert 20 <= phrasings <= 80
    for task in test:
        question = parse_question(task.question)
        assert question is not None and heldout_pair(question) == task.meta["heldout_pair"]
        assert task.meta["heldout"] == (task.meta["heldout_pair"] or task.meta["heldout_phrasing"])
    assert not {t.question for t in train} & {t.question for t in test}


def test_each_half_of_a_heldout_pair_is_trained_in_other_pairs() -> None:
    seen = [tuple(task.meta["relations"]) for task in draw("2hop", "train", n=600)]
    for first, second in HELDOUT_PAIRS:
        if RELATIONS[first].target:
            assert (first, second) not in seen
            assert first in {pair[0] for pair in seen} and second in {pair[1] for pair in seen}


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_deterministic_and_unique(kind: str) -> None:
    first = draw(kind, "test", seed=5)
    assert draw(kind, "test", seed=5, n=40) == first[:40]
    assert draw(kind, "test", seed=6) != first
    assert len({task.question for task in first}) == len({task.id for task in first}) == len(first)


def test_who_where_when_and_how_many_are_asked() -> None:
    words = Counter(task.question.split()[0] for task in draw("1hop", "train", n=300))
    text = " ".join(task.question for task in draw("1hop", "train", n=300))
    assert {"Who", "Where", "When", "How", "What"} <= set(words)
    assert "How many" in text


def test_goal_names_the_whole_chain() -> None:
    assert Chain("Silver Harbor", ("mayor", "born")).goal() == "the birth year of the mayor of Silver Harbor"


@pytest.mark.parametrize(
    "text", ["", "What is 2 + 2?", "Who is the mayor of nobody?", "Consider the towns A and B."]
)
def test_other_questions_are_not_understood(text: str) -> None:
    assert parse_question(text) is None


def test_unknown_kind_and_used_up_world() -> None:
    with pytest.raises(ConfigError, match="no '4hop' questions"):
        next(almanac_tasks("4hop", "train", 0))
    with pytest.raises(ConfigError, match="no more than"):
        for _ in almanac_tasks("1hop", "train", 0):
            pass
